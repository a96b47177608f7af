"""Step 2: a threshold that moves over the sizes of the weights, further in later branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.spec import ConversionSpec
from ....core.static.branched import branch_sizes
from ....core.static.fade import magnitude_threshold
from ....core.static.schedule import branch_sparsities
from ....measure.notation import number
from ...plots.lesson_plots import fade_ridges
from .reading import Reading
from .step import BRANCHES, Question, Step, View

BINS = 60
VIEW = 0.999  # share of the weights that the axis shows: single giants would squeeze the rest


@dataclass(frozen=True)
class FadedBranch:
    """One branch of one matrix, and what fade does to it."""

    branch: int
    counts: Tensor  # (BINS,) int64: weights by |w|
    requested: float
    realised: float  # share of its weights that is zero afterwards
    threshold: float  # |w| up to which weights are zeroed; 0: none are
    lost_squares: float  # share of Σ w² that goes


@dataclass(frozen=True)
class Faded:
    """First, middle and last branch, counted on the same bins."""

    projection: str
    edges: Tensor  # (BINS + 1,)
    branches: tuple[FadedBranch, ...]


def faded(reading: Reading, strength: float) -> Faded:
    projection = "up" if reading.weights.gate is None else "gate"
    matrix = reading.weights.up if reading.weights.gate is None else reading.weights.gate
    pieces = matrix.detach().split(branch_sizes(len(matrix), BRANCHES))
    shares = branch_sparsities(BRANCHES, strength)
    chosen = (0, BRANCHES // 2, BRANCHES - 1)
    sizes = {b: pieces[b].abs().float().flatten().cpu() for b in chosen}
    together = torch.cat(list(sizes.values()))
    upper = magnitude_threshold(together, VIEW).value or 1.0
    found = []
    for b, size in sizes.items():
        cut, value = -1.0, 0.0
        if shares[b] > 0:
            threshold = magnitude_threshold(pieces[b], shares[b])
            cut, value = threshold.cut, threshold.value
        zero = (size <= cut) | (size == 0)
        squares = size.double().square()
        found.append(
            FadedBranch(
                branch=b,
                counts=torch.histc(size, BINS, min=0, max=upper).long(),
                requested=shares[b],
                realised=float(zero.double().mean()),
                threshold=value,
                lost_squares=float(squares[zero].sum() / squares.sum().clamp(min=1e-30)),
            )
        )
    return Faded(projection, torch.linspace(0, upper, BINS + 1), tuple(found))


def words(reading: Reading) -> str:
    gated = reading.weights.gate is not None
    matrices = "gate and up" if gated else "up"
    return f"""
$$s_i=s\\cdot\\frac{{i}}{{B}}\\qquad\\text{{branch }}i:\\;\\;w\\mapsto 0\\;\\text{{ if }}\\;\
|w|\\le Q(s_i)$$

Fade sets the smallest weights of {matrices} to zero: branch 0 loses none, and of B = \
{BRANCHES} branches, branch i loses the share s · i / B. Each has a threshold Q of its own, the \
size |w| below which that share lies. The zeros stay in the matrix and are multiplied like any \
other number, so fade saves no time.
"""


def view(reading: Reading, strength: float, answered: bool) -> View:
    found = faded(reading, strength)
    rows = "".join(
        f'<tr><th scope="row">branch {b.branch}</th><td>{_percent(b.requested)}</td>'
        f"<td>{_percent(b.realised)}</td><td>{number(b.threshold, 3)}</td></tr>"
        for b in found.branches
    )
    numbers = (
        '<table><thead><tr><th scope="col"></th><th scope="col">asked for</th>'
        '<th scope="col">zero</th><th scope="col">threshold</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    return View(fade_ridges(found, reading.layer), numbers)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def judge(reading: Reading) -> tuple[int, str]:
    found = faded(reading, 1.0)
    middle = found.branches[1]
    lost, zero = middle.lost_squares, middle.realised
    right = 2 if lost > zero else 0 if lost < zero else 1
    return right, (
        f"Measured in branch {middle.branch} of {found.projection}, layer {reading.layer}: "
        f"{_percent(zero)} of the weights are zero and {_percent(lost)} of the squares are lost. "
        "The smallest half cannot weigh more than the other half. It is still no free gift: what "
        "the weights are multiplied by counts too."
    )


STEP = Step(
    key="fade",
    title="Fade",
    words=words,
    control={
        "minimum": 0, "maximum": 1, "value": 0.9, "step": 0.05, "label": "s: strength of fade",
    },
    view=view,
    spec=lambda reading, strength: ConversionSpec(branches=BRANCHES, fade=strength),
    question=Question(
        "At s = 1, the middle branch loses half of its weights. How much of its squares, Σ w², "
        "goes with them?",
        ("Less than half", "Just half", "More than half"),
    ),
    judge=judge,
)  # fmt: skip
