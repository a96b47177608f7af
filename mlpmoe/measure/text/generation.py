"""Dense and converted model writing side by side, one token each in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ...core.calibration import check_tokens
from ...core.checks import check_characters
from ...core.errors import UserError, not_finite
from ...core.mlps import context_length
from ...core.one_device import check_one_device
from .decoding import Reader

TOP_P = 0.95  # share of probability that sampling chooses from
logger = logging.getLogger(__name__)


@dataclass
class Writing:
    """What one model has written so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0  # spent on all tokens but the first, which also reads the prompt
    finished: bool = False  # wrote its end-of-text token

    @property
    def tokens_per_second(self) -> float | None:
        steps = len(self.tokens) - 1
        return steps / self.seconds if steps > 0 and self.seconds > 0 else None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids (1, tokens) of a prompt, in the model's chat format if it has one for a message of
    the user alone."""
    if not prompt.strip():
        raise UserError("the prompt is empty: write a few words for the models to go on from.")
    check_characters(prompt, "the prompt")
    ids = _as_chat(tokenizer, prompt) or tokenizer(prompt, verbose=False)["input_ids"]
    return torch.tensor([ids])


def _as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the prompt as a message; none where the model has no format for that."""
    if not tokenizer.chat_template:
        return []
    chat = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    except Exception:  # a template is a program: it may want a system message, a name, or be wrong
        logger.debug("the chat template cannot be used", exc_info=True)
        return []


def write_side_by_side(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[Writing, ...]]:
    """All models continue the same prompt in lockstep; yields their state after every token.

    temperature 0 takes the most likely token, as `generate` does with greedy search. Above 0,
    tokens are sampled (top-p 0.95) with the same random numbers for every model, so texts part
    only where the models differ. Stops early when every model has written its end-of-text token.
    Raises UserError if the prompt is empty or longer than the model's context, and where float16
    has no numbers for what a model computes; UnsupportedModelError for a model that is spread over
    several devices.
    """
    ids = encode_prompt(tokenizer, prompt)
    for model in models:
        check_one_device(model)
        check_tokens(model, ids)
    limit = min(context_length(model) or 2**31 for model in models)
    if ids.shape[1] >= limit:
        raise UserError(
            f"the prompt is {ids.shape[1]} tokens long; this model reads at most {limit - 1}."
        )
    writings = tuple(Writing() for _ in models)
    most = ids.shape[1] + min(max_new_tokens, limit - ids.shape[1])
    steps = [_decode(model, ids, most, _Sampler(temperature, seed)) for model in models]
    stops = [_stop_tokens(model, tokenizer) for model in models]
    skip = len(tokenizer.decode(ids[0], skip_special_tokens=True))
    for _ in range(most - ids.shape[1]):
        for writing, step, stop in zip(writings, steps, stops, strict=True):
            if writing.finished:
                continue
            start = perf_counter()
            token = next(step)
            if writing.tokens:
                writing.seconds += perf_counter() - start
            writing.tokens.append(token)
            writing.finished = token in stop
            # Decoded with the prompt: one token alone may be half a character or lose its space.
            whole = tokenizer.decode([*ids[0].tolist(), *writing.tokens], skip_special_tokens=True)
            writing.text = whole[skip:]
        yield writings
        if all(writing.finished for writing in writings):
            return


def parted_at(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ; None as long as they agree."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None


class _Sampler:
    """Picks tokens from logits (1, vocabulary) with a random stream that only the seed decides."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.warpers = None
        if temperature > 0:
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(TOP_P)]
            )

    def pick(self, ids: Tensor, logits: Tensor) -> int:
        if self.warpers is None:
            return int(logits.argmax())
        probabilities = self.warpers(ids, logits.float()).softmax(-1).cpu()
        # argmax of p / Exp(1) noise is a draw from p; equal noise keeps equal models together
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return int((probabilities / noise).argmax())


def _decode(model: PreTrainedModel, ids: Tensor, most: int, sampler: _Sampler) -> Iterator[int]:
    """Tokens one by one, of at most so many with the prompt."""
    reader, current = Reader(model, most), ids.to(model.device)
    while True:
        with torch.inference_mode():
            logits = reader.read(current)
            if logits.dtype == torch.float16 and logits.isnan().any():
                raise not_finite("this model", logits.dtype)
            token = sampler.pick(current, logits)
        yield token
        current = torch.tensor([[token]], device=model.device)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id
    stops = set(configured if isinstance(configured, list) else [configured])
    return (stops | {tokenizer.eos_token_id}) - {None}
