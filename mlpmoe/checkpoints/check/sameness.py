"""Whether a checkpoint, opened elsewhere, is the model in memory: what is judged, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...measure.quality.encoding import Window
from ...measure.quality.perplexity import Perplexity, compare, summarise
from ..forms.form import EXACT

# Where a token may get another expert, that token's logits say nothing about the others: the
# difference of the median token counts, and how many keep their likeliest next token.
TYPICAL, AGREEMENT = 2e-3, 0.97
# What rounding to 16 bits may add: some times the rounding step of the dtype (2^-8 and 2^-11),
# since it grows over the layers. Random models have near ties where trained ones are sure.
ROUNDING, ROUNDED_AGREEMENT = {torch.bfloat16: 0.05, torch.float16: 0.007}, 0.85
# Rounding gives tokens other experts where scores are close, in 30 layers most of them: they say
# something else, and predict a text as well. So there a text may decide: its loss changes by less
# than so many nats per token, or than so many of its standard errors, which are small themselves.
SAME_LOSS, SAME_ERRORS, MOST_ERROR = 0.01, 3.0, 0.03
LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class Verification:
    """How exactly a checkpoint, opened in a fresh process, repeats the model in memory.

    Differences are relative to the largest logit of all compared tokens, but for the first.
    """

    max_logit_difference: float  # max|Δlogit|
    relative_difference: float  # the same, relative
    typical_difference: float  # max|Δlogit| of the median token, relative
    argmax_agreement: float  # share of the compared tokens whose likeliest next token is the same
    kl: float  # nats per token, from the model in memory to the reloaded one
    compared_tokens: int
    strict: bool  # whether every token counts; else the median one and the agreement
    allowed: float  # of the relative, or of the typical difference
    allowed_agreement: float
    perplexity: float | None  # of the model in memory; None without a text
    reloaded_perplexity: float | None
    stderr: float | None  # of the first
    scored_tokens: int
    saved_dtypes: str  # of the matrices on disk, as safetensors calls them: F32, BF16, ...
    dtype: str  # that both computed in
    # perplexity reloaded to that in memory and its error, where these may decide; else None
    ratio: float | None = None
    ratio_stderr: float | None = None

    @property
    def passed(self) -> bool:
        return self.repeats or self.predicts_as_well

    @property
    def repeats(self) -> bool:
        """Whether it says the same for each token, or for nearly all where not `strict`."""
        judged = self.relative_difference if self.strict else self.typical_difference
        return judged <= self.allowed and self.argmax_agreement >= self.allowed_agreement

    @property
    def predicts_as_well(self) -> bool:
        """Whether it is a routed model that was rounded, or nearly holds, and predicts the text as
        well as the one in memory."""
        if self.ratio is None or not self.ratio_stderr <= MOST_ERROR:  # NaN is no error
            return False
        same = max(SAME_LOSS, SAME_ERRORS * self.ratio_stderr)
        return abs(math.log(self.ratio)) <= same and self.argmax_agreement >= LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compared(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], dtypes: str, dtype: torch.dtype,
    exact: bool = True, parts: Sequence[Window] | None = None, routed: bool = False,
) -> Verification:  # fmt: skip
    """The two sets of answers side by side; parts: the windows of the text they are for, if any.
    routed: whether tokens choose experts, so that a text may decide."""
    logits, other = mine["logits"], theirs["logits"]
    by_token = (logits - other).abs().amax(-1)  # (tokens,)
    largest = logits.abs().max().item() or 1.0
    same = (logits.argmax(-1) == other.argmax(-1)).float().mean().item()
    values: list[Perplexity | None] = [None, None]
    if parts is not None:
        values = [summarise(said["losses"], parts) for said in (mine, theirs)]
    rounding = _rounding(dtypes, dtype)
    strict = exact and not rounding
    changed = compare(*values) if routed and not strict and parts is not None else None
    return Verification(
        max_logit_difference=by_token.max().item(),
        relative_difference=by_token.max().item() / largest,
        typical_difference=by_token.median().item() / largest,
        argmax_agreement=same,
        kl=F.kl_div(
            other.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
        ).item(),
        compared_tokens=len(logits),
        strict=strict,
        allowed=(EXACT if strict else TYPICAL) + rounding,
        allowed_agreement=0.0 if strict else ROUNDED_AGREEMENT if rounding else AGREEMENT,
        perplexity=values[0] and values[0].value,
        reloaded_perplexity=values[1] and values[1].value,
        stderr=values[0] and values[0].stderr,
        scored_tokens=0 if parts is None else len(mine["losses"]),
        saved_dtypes=dtypes,
        dtype=str(dtype).removeprefix("torch."),
        ratio=changed and changed.ratio,
        ratio_stderr=changed and changed.stderr,
    )


def _rounding(dtypes: str, dtype: torch.dtype) -> float:
    """What rounding may do: the coarsest of the formats on disk and the one computed in."""
    names = {"BF16": torch.bfloat16, "F16": torch.float16}
    formats = [dtype, *(names[name] for name in dtypes.split(",") if name in names)]
    return max(ROUNDING.get(format, 0.0) for format in formats)
