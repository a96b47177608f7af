"""The calibration text: what methods may look at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checks import check_characters
from .errors import CalibrationWarning, UserError
from .mlps import read_mlps

if TYPE_CHECKING:
    from .spec import ConversionSpec

SAMPLE_TOKENS = 128  # long windows average the differences between samples away
MAX_TOKENS = 32_768
MIN_SAMPLES = 8
DOCUMENT_SEPARATOR = "<|endoftext|>"  # as published text collections write it
# Per unknown of a fit. Measured with least squares at three quarters of 1,536 neurons:
# perplexity 58.6 on 2.7 tokens for each, 44.2 on 21.
TOKENS_PER_UNKNOWN = 8
SHARED_LINE = 60  # characters; a line of this length in two texts is no accident


@dataclass(frozen=True)
class Calibration:
    """A text that a method may look at, as samples of equal length."""

    samples: Tensor  # (samples, tokens) int64

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        tokens: int = MAX_TOKENS,
        length: int = SAMPLE_TOKENS,
    ) -> Calibration:
        """The first `tokens` tokens of `text` in samples of `length` tokens, as many as fill up.

        What other projects call nsamples is tokens / length here, and their seqlen is length.
        Documents are separated by `<|endoftext|>`. Every sample begins as the tokenizer begins a
        text (with its BOS, if it has one). Raises UserError if the text is too short, and for
        samples that are too short or fewer than MIN_SAMPLES.
        """
        if length < 2:
            raise UserError(f"a calibration sample needs 2 tokens at least, not {length}.")
        if tokens < MIN_SAMPLES * length:
            raise UserError(
                f"{tokens:,} calibration tokens make {tokens // length} samples of {length:,}; at "
                f"least {MIN_SAMPLES} are needed."
            )
        check_characters(text, "the calibration text")
        ids: list[int] = []
        for document in text.split(DOCUMENT_SEPARATOR):
            if document.strip():
                ids += tokenizer(document.strip(), verbose=False)["input_ids"]
        start = ids[:1] if ids and ids[0] in tokenizer.all_special_ids else []
        found, ids = len(ids), ids[len(start) :]  # every sample gets its own
        step = length - len(start)
        count = min(len(ids) // step, tokens // length)
        if count < MIN_SAMPLES:
            raise UserError(
                f"the calibration text has {found:,} tokens; at least {MIN_SAMPLES * length:,} "
                "are needed."
            )
        body = torch.tensor(ids[: count * step]).view(count, step)
        return cls(torch.cat([torch.tensor(start).long().expand(count, len(start)), body], dim=1))


def few_tokens(spec: ConversionSpec, tokens: int, d_ff: int, d_model: int) -> str | None:
    """A sentence if a fit of `spec` solves for so many unknowns that this many calibration tokens
    say little of them; None if there are enough. d_ff, d_model: of the MLPs."""
    what, unknowns, kind = max(_fits(spec, d_ff, d_model), key=lambda fit: fit[1])
    needed = TOKENS_PER_UNKNOWN * unknowns
    if tokens >= needed:
        return None
    return (
        f"{what} solves for {unknowns:,} {kind} per layer on {tokens:,} calibration tokens; give "
        f"it at least {needed:,}."
    )


def _fits(spec: ConversionSpec, d_ff: int, d_model: int) -> Iterator[tuple[str, int, str]]:
    """The fits of a spec: name, unknowns for each output, and what these belong to."""
    yield "", 0, ""
    if spec.routed:
        if spec.router == "regression":
            yield "the router regression", d_model, "inputs"
        if spec.compensation == "refit" and spec.active < 1:
            yield "refitting down", d_ff, "neurons"
        return
    kept = round(d_ff * spec.kept / spec.branches)
    if spec.compensation == "refit" and (kept < d_ff or spec.fades):
        yield "refitting down", kept, "neurons"
    by_neuron = spec.fade > 0 and spec.fade_unit == "neuron"
    if spec.order in ("least-squares", "loss") or (by_neuron and spec.fade_score == "sparsegpt"):
        yield "least squares", d_ff, "neurons"
    elif spec.fades and spec.fade_score == "sparsegpt":
        if "down" in spec.projections:
            yield "SparseGPT", kept, "neurons"
        else:
            yield "SparseGPT", d_model, "inputs"


def warn_of_few_tokens(
    model: PreTrainedModel, specs: Iterable[ConversionSpec], calibration: Calibration
) -> None:
    """`few_tokens` of each spec as a CalibrationWarning, the same sentence once."""
    weights = max((mlp.weights for mlp in read_mlps(model)), key=lambda w: w.d_ff)
    tokens = calibration.samples.numel()
    said = (few_tokens(spec, tokens, weights.d_ff, weights.d_model) for spec in specs)
    for sentence in dict.fromkeys(said):
        if sentence:
            warnings.warn(sentence, CalibrationWarning, stacklevel=4)


def check_tokens(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise UserError for tokens, of any shape, that the model has no row for: its embedding would
    end in an error of torch, on a GPU in one that ends the process."""
    rows, largest = model.get_input_embeddings().num_embeddings, int(ids.max())
    if largest >= rows:
        raise UserError(
            f"token {largest:,} has no row in this model's embedding, which has {rows:,}: the text "
            "was encoded by the tokenizer of another model."
        )


def check_disjoint(calibration: str, evaluation: str) -> None:
    """Raise UserError if the two texts share a line of some length: a method that was allowed to
    look at the evaluation text would be measured too well."""
    if not calibration.strip():
        return
    seen = set(_long_lines(calibration))
    same = calibration.split() == evaluation.split()
    if same or any(line in seen for line in _long_lines(evaluation)):
        raise UserError(
            "the calibration text and the evaluation text share a passage. Calibrate on other "
            "text than is measured."
        )


def _long_lines(text: str) -> Iterator[str]:
    lines = (" ".join(line.split()).lower() for line in text.splitlines())
    return (line for line in lines if len(line) >= SHARED_LINE)
