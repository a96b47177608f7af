"""Perplexity by sliding windows, with its uncertainty, and the change between two models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp, log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import DOCUMENT_SEPARATOR
from ..core.errors import UserError

DEFAULT_WINDOW = 1024  # tokens; less if the model's context is shorter
STREAM_WINDOW = 2048  # tokens, of published figures on WikiText-2 and C4
LOGIT_ROWS = 256  # positions turned into float32 losses at a time: bounds the memory


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss per predicted token."""

    value: float
    stderr: float  # value · standard deviation of the losses / √tokens
    tokens: int  # predicted tokens
    bits_per_byte: float  # total loss in bits / UTF-8 bytes of the predicted text
    losses: Tensor = field(repr=False, compare=False)  # (tokens,) float32, nats


@dataclass(frozen=True)
class PerplexityChange:
    """How much worse one model is than another on the same tokens, pairwise."""

    ratio: float  # perplexity of the other / perplexity of the dense model
    stderr: float  # standard error of the ratio, from the differences token by token
    measurable: bool  # the difference is larger than 1.96 standard errors


@dataclass(frozen=True)
class EncodedText:
    """A text as token documents, ready to be scored."""

    documents: tuple[Tensor, ...]  # each (tokens,) int64; the first token is context only
    scored_bytes: int  # UTF-8 bytes of all that is predicted
    # tokens per window, if documents are windows already, each to be scored in one pass
    window: int | None = None

    @property
    def scored_tokens(self) -> int:
        return sum(len(document) - 1 for document in self.documents)

    @property
    def comparable(self) -> bool:
        """Whether the windows are those of published figures."""
        return self.window == STREAM_WINDOW


def encode_protocol(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: str,
    context: int | None = None,
    most_windows: int | None = None,
    window: int | None = None,
) -> EncodedText:
    """Encode a text as its protocol, "documents" or "stream", has it: `encode_text` or
    `encode_stream`, which alone uses the other arguments."""
    if protocol == "stream":
        return encode_stream(tokenizer, text, context, most_windows, window)
    if protocol != "documents":
        raise UserError(f"protocol must be documents or stream, not {protocol!r:.60}.")
    return encode_text(tokenizer, text)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Cut `text` into documents at lines of `<|endoftext|>` and encode each by itself.

    Each document begins as the tokenizer begins a text (with its BOS, if it has one); where it
    adds none, the first token of a document serves as context and is not scored. Raises
    UserError if there is nothing to predict.
    """
    documents, scored_bytes = [], 0
    for document in text.split(DOCUMENT_SEPARATOR):
        document = document.strip()
        ids = tokenizer(document, verbose=False)["input_ids"] if document else []
        if len(ids) < 2:
            continue
        documents.append(torch.tensor(ids))
        scored_bytes += len(document.encode())
        if ids[0] not in tokenizer.all_special_ids:
            scored_bytes -= len(tokenizer.decode(ids[:1]).encode())
    if not documents:
        raise UserError("the text is too short to measure: give it at least a sentence.")
    return EncodedText(tuple(documents), scored_bytes)


def encode_stream(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context: int | None = None,
    most_windows: int | None = None,
    window: int | None = None,
) -> EncodedText:
    """Encode a text in one go and cut it into windows without overlap, as the GPTQ, SparseGPT and
    Wanda code bases do with WikiText-2 and C4, so that figures compare with published ones.

    context: tokens that the model can look at. window: tokens; by default STREAM_WINDOW, or the
    context where that is shorter (figures then do not compare). The first token of a window is
    context only; what does not fill a window is left out, as is what follows the first
    `most_windows`. Of a character that the end of a window cuts, all bytes count where it begins.
    Raises UserError for a window out of range, and if the text fills no window.
    """
    if window is None:
        window = min(STREAM_WINDOW, context or STREAM_WINDOW)
    _check_window(window, context)
    encoding = tokenizer(text, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.long)
    windows = ids[: len(ids) // window * window].view(-1, window)[:most_windows]
    if not len(windows):
        raise UserError(
            f"the text has {len(ids):,} tokens; at least one window of {window:,} is needed."
        )
    if tokenizer.is_fast:
        # A tokenizer's own marks lie at (0, 0), and end where the text before them ends.
        ends = list(accumulate((end for _, end in encoding["offset_mapping"]), max))
        firsts = range(0, windows.numel(), window)
        size = sum(len(text[ends[i] : ends[i + window - 1]].encode()) for i in firsts)
    else:  # it does not say where its tokens lie: their share
        size = round(len(text.encode()) * len(windows) * (window - 1) / len(ids))
    return EncodedText(tuple(windows), size, window)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest input the model was built for, in tokens; None if it states no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def choose_window(
    model: PreTrainedModel, window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Window and stride, in tokens, with the defaults of `perplexity` filled in; UserError if they
    do not fit the model or each other."""
    limit = context_length(model)
    if window is None:
        window = min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    _check_window(window, limit)
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise UserError(f"stride must lie between 1 and window - 1 = {window - 1}, not {stride}.")
    return window, stride


def _check_window(window: int, limit: int | None) -> None:
    if limit and not 2 <= window <= limit:
        raise UserError(
            f"window must lie between 2 and the model's context of {limit} tokens, not {window}."
        )
    if window < 2:
        raise UserError(f"window must be at least 2 tokens, not {window}.")


def windows(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """What is run to score a text: the ids of each window, and the index of the first scored one.

    Each window holds at most `window` tokens and starts `stride` after the one before; what it
    shares with that one is context and not scored again. So each token is scored once, with
    at least window - stride tokens before it (where the text has them). A text that consists of
    windows (`encode_stream`) is scored window by window, whatever is asked for here.
    """
    if text.window:
        window, stride = text.window, text.window - 1
    else:
        window, stride = choose_window(model, window, stride)
    for document in text.documents:
        scored = 1  # tokens of this document that need no (more) scoring
        for start in range(0, len(document), stride):
            end = min(start + window, len(document))
            yield document[start:end], scored - start
            scored = end
            if end == len(document):
                break


def window_losses(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> Iterator[Tensor]:
    """The loss in nats of every predicted token, in order, one tensor per window of `windows`."""
    for ids, first in windows(model, text, window, stride):
        yield _losses(model, ids, first)


def summarise(losses: Tensor, scored_bytes: int) -> Perplexity:
    """The perplexity that these token losses amount to."""
    mean = losses.double().mean().item()
    spread = losses.double().std().item() if len(losses) > 1 else float("nan")
    value = exp(mean) if mean < 700 else float("inf")
    return Perplexity(
        value=value,
        stderr=value * spread / sqrt(len(losses)),
        tokens=len(losses),
        bits_per_byte=mean * len(losses) / log(2) / scored_bytes,
        losses=losses,
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of `text` under a dense or converted model.

    window: tokens per window, at least 2; by default 1024 or the model's context, if shorter.
    stride: from 1 to window - 1; by default half a window. Raises UserError for other values and
    for a text without anything to predict.
    """
    return measure(model, encode_text(tokenizer, text), window, stride)


def measure(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """`perplexity` of a text that is encoded already."""
    losses = torch.cat(list(window_losses(model, text, window, stride)))
    return summarise(losses, text.scored_bytes)


def compare(dense: Perplexity, other: Perplexity) -> PerplexityChange:
    """The change from `dense` to `other`, measured on the same tokens of the same text.

    Differences are taken token by token, which removes most of the noise of the text itself.
    """
    if dense.tokens != other.tokens:
        raise UserError("perplexities of different texts cannot be compared.")
    difference = (other.losses - dense.losses).double()
    mean = difference.mean().item()
    stderr = difference.std().item() / sqrt(len(difference)) if len(difference) > 1 else 0.0
    ratio = exp(mean) if mean < 700 else float("inf")
    return PerplexityChange(ratio, ratio * stderr, measurable=not abs(mean) <= 1.96 * stderr)


@torch.inference_mode()
def _losses(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """Losses of ids[first:], each predicted from all ids before it."""
    logits = model(ids[None].to(model.device), use_cache=False).logits[0, first - 1 : -1]
    targets = ids[first:].to(logits.device)
    pieces = zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in pieces])
