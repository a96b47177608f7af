"""The tables of the MLPMoE paper as it prints them, and what their rows are made of on any model.

Source: arXiv 2511.21089, section 6. Figures only; what the paper does not say, such as its proxy
text or the length of its generations, is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

from transformers import PreTrainedModel

from ...core.conversion import loop_over_branches
from ...core.spec import ConversionSpec
from ...core.static.schedule import branch_sparsities
from ..cost.parameters import ParameterReport
from ..cost.speed import LEAST_ROUNDS, ROUNDS, Ratio, decode, ratio, rounds_in_turn
from ..quality.estimate import Evaluation

SOURCE = "arXiv 2511.21089, section 6"
BRANCHES, STRENGTH = 16, 0.9
DENSE = "Dense-Original"
FADED = "MLPMoE-DiffSparsity"
VARIANTS = {  # as the paper names them, beside DENSE
    "MLPMoE-All-16": ConversionSpec(branches=BRANCHES),
    FADED: ConversionSpec(branches=BRANCHES, fade=STRENGTH),
}
ASKED = mean(branch_sparsities(BRANCHES, STRENGTH))  # of gate and up, in the mean over branches
WRITTEN = 16  # tokens in each timed generation


@dataclass(frozen=True)
class ZeroShares:
    """Zeros as shares of what they may be counted in, 0 to 1."""

    faded: float  # of the matrices that fade works on
    mlps: float
    whole: float  # of all parameters

    @classmethod
    def of(cls, zeros: float, faded: int, mlps: int, whole: int) -> ZeroShares:
        return cls(zeros / faded, zeros / mlps, zeros / whole)


@dataclass(frozen=True)
class PublishedRow:
    """One line of a table."""

    variant: str
    total: int  # parameters, α included
    nonzero: int
    perplexity: float  # on a proxy text that is not published
    seconds: float  # of a generation whose length is not stated


@dataclass(frozen=True)
class PublishedTable:
    """One of the two tables."""

    number: int
    key: str  # of the model, in the catalogue
    model: str
    mlp_weights: int  # layers · 3 · d_model · d_ff, by the model's configuration
    rows: tuple[PublishedRow, ...]  # dense first

    @property
    def dense(self) -> PublishedRow:
        return self.rows[0]

    def row(self, variant: str) -> PublishedRow:
        return next(row for row in self.rows if row.variant == variant)

    @property
    def zeros(self) -> ZeroShares:
        """What fade has zeroed."""
        faded = self.row(FADED)
        count = faded.total - faded.nonzero
        return ZeroShares.of(count, self.mlp_weights * 2 // 3, self.mlp_weights, faded.total)


TABLES = (
    PublishedTable(
        1, "qwen2.5-0.5b", "Qwen2.5-0.5B-Instruct", 24 * 3 * 896 * 4864,
        (
            PublishedRow(DENSE, 494_032_768, 494_032_768, 1.0833, 1.300),
            PublishedRow("MLPMoE-All-16", 494_033_152, 494_033_152, 1.0838, 1.633),
            PublishedRow(FADED, 494_033_152, 405_604_020, 1.2233, 1.619),
        ),
    ),
    PublishedTable(
        2, "r1-distill-llama-8b", "DeepSeek-R1-Distill-Llama-8B", 32 * 3 * 4096 * 14_336,
        (
            PublishedRow(DENSE, 8_030_261_248, 8_030_261_248, 1.0908, 5.665),
            PublishedRow("MLPMoE-All-16", 8_030_261_760, 8_030_261_760, 1.0906, 7.203),
            PublishedRow(FADED, 8_030_261_760, 6_441_409_340, 1.1157, 8.166),
        ),
    ),
)  # fmt: skip


def published_table(key: str) -> PublishedTable | None:
    """The table of the model with this key; None for a model that the paper has not."""
    return next((table for table in TABLES if table.key == key), None)


@dataclass(frozen=True)
class GenerationTime:
    """How long a conversion takes to write WRITTEN tokens, by rounds of one run."""

    dense: float  # seconds, median
    loop: Ratio  # to dense: the branches one after the other, as the paper runs them
    fused: Ratio  # to dense: all branches in three matrix products, as `convert` makes them
    rounds: int


@dataclass(frozen=True)
class ReproducedRow:
    """The same line for another model, as far as it is known."""

    variant: str
    report: ParameterReport | None
    perplexities: tuple[Evaluation | None, ...]  # on each text
    time: GenerationTime | None


def generation_rounds(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    rounds: int = ROUNDS,
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[GenerationTime | None]:
    """Time a static conversion, looped and fused, against dense: what is known after each round,
    None before LEAST_ROUNDS. `turn`: see `rounds_in_turn`."""
    models = (dense, loop_over_branches(converted), converted)
    # by torch alone, as in the paper
    actions = [partial(decode, model, WRITTEN, compiled=False) for model in models]
    taken = []
    for seconds in rounds_in_turn(actions, rounds, turn):
        taken.append(seconds)
        if len(taken) < LEAST_ROUNDS:
            yield None
            continue
        base, *others = zip(*taken, strict=True)
        yield GenerationTime(median(base), *(ratio(times, base) for times in others), len(taken))
