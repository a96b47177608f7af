"""Perplexity by windows, with its uncertainty, and the change between two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite, isnan, log, nan, sqrt

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import UserError
from .encoding import EncodedText, Window, encode_text, scored_tokens, windows
from .head import token_losses

# The losses of neighbouring tokens are alike, so an error is taken over blocks of tokens: over
# documents, or over parts of this many tokens of long ones and of streams. On WikiText-2 the
# error of a ratio over blocks of 1,023 tokens is 3.5 times that over single tokens, and 1.3 times
# that over 512.
BLOCK = 1024
LEAST_BLOCKS = 8  # where there are fewer tokens, blocks are shorter
LONGEST = 2**40  # tokens of a text: more than any has
FEW_FREEDOM = (inf, 12.706, 4.303, 3.182)  # half-widths for 0 to 3 degrees of freedom


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss per predicted token."""

    value: float
    stderr: float  # standard error of the value, over blocks of text: see BLOCK
    tokens: int  # predicted tokens
    bits_per_byte: float  # total loss in bits / UTF-8 bytes of the predicted text
    losses: Tensor = field(repr=False, compare=False)  # (tokens,) float32, nats
    blocks: Tensor = field(repr=False, compare=False)  # (tokens,) int64, of each loss


@dataclass(frozen=True)
class PerplexityChange:
    """How much worse one model is than another on the same tokens, pairwise."""

    ratio: float  # perplexity of the other / perplexity of the dense model
    stderr: float  # standard error of the ratio, from the differences block by block; nan for one
    measurable: bool  # the difference is outside its 95 % interval around 0


def window_losses(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> Iterator[Tensor]:
    """The loss in nats of every predicted token, in order, one tensor per window of `windows`."""
    for part in windows(model, text, window, stride):
        yield token_losses(model, part.ids, part.first)


def summarise(losses: Tensor, parts: Sequence[Window]) -> Perplexity:
    """The perplexity that the token losses of these windows amount to, joined in their order."""
    blocks = _blocks(parts)
    mean, stderr, _ = _mean(losses, blocks)
    value = exp(mean) if mean < 700 else inf
    return Perplexity(
        value=value,
        stderr=value * stderr,
        tokens=len(losses),
        bits_per_byte=mean * len(losses) / log(2) / max(1, sum(part.size for part in parts)),
        losses=losses,
        blocks=blocks,
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
    stride: from 1 to window, which is the default: no overlap. Raises UserError for other values
    and for a text without anything to predict.
    """
    return measure(model, encode_text(tokenizer, text), window, stride)


def measure(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """`perplexity` of a text that is encoded already."""
    parts = windows(model, text, window, stride)
    return summarise(torch.cat(list(window_losses(model, text, window, stride))), parts)


def compare(dense: Perplexity, other: Perplexity) -> PerplexityChange:
    """The change from `dense` to `other`, measured on the same tokens of the same text.

    Differences are taken token by token, which removes most of the noise of the text itself, and
    their error block by block, since neighbouring tokens suffer alike. UserError where `dense` is
    infinite or undefined itself.
    """
    if dense.tokens != other.tokens or not torch.equal(dense.blocks, other.blocks):
        raise UserError("perplexities of different texts cannot be compared.")
    if not dense.losses.isfinite().all():
        raise UserError(
            "the dense model has infinite or undefined losses on this text, so nothing can be "
            "compared with it."
        )
    mean, stderr, count = _mean(other.losses - dense.losses, dense.blocks)
    ratio = exp(mean) if mean < 700 else inf
    measurable = not isfinite(mean) or abs(mean) > student_t(count - 1) * stderr
    return PerplexityChange(ratio, ratio * stderr, measurable)


def student_t(freedom: int) -> float:
    """The half-width of a 95 % interval in standard errors, with so many degrees of freedom: from
    4 on the expansion of Abramowitz and Stegun 26.7.5, within 0.3 %."""
    if freedom < len(FEW_FREEDOM):
        return FEW_FREEDOM[freedom]
    z, v = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def _blocks(parts: Sequence[Window]) -> Tensor:
    """(scored tokens,) int64: the block of text that each token of these windows belongs to."""
    length = max(1, min(BLOCK, scored_tokens(parts) // LEAST_BLOCKS))
    found = [
        # the first token of a document is context: 1 + BLOCK tokens are one block
        part.text * LONGEST + (part.place + torch.arange(part.first, len(part.ids)) - 1) // length
        for part in parts
    ]
    return torch.cat(found)


def _mean(values: Tensor, blocks: Tensor) -> tuple[float, float, int]:
    """Mean of all values, its standard error over the blocks they belong to (nan where that is
    unknown), and the number of blocks: the ratio estimator for clusters of unequal size (Cochran,
    Sampling Techniques). Undefined losses of a broken model count as infinite."""
    values = values.double()
    mean = values.mean().item()
    if isnan(mean):
        mean = inf
    labels, at = torch.unique(blocks, return_inverse=True)
    count = len(labels)
    if count < 2 or not isfinite(mean):
        return mean, nan, count
    residuals = torch.zeros(count, dtype=torch.float64).index_add_(0, at, values - mean)
    spread = residuals.square().sum().item() * count / (count - 1)
    return mean, sqrt(spread) / len(values), count
