"""Step 3: the first K branches in place of all, and what √(B/K) takes for granted."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ....core.spec import ConversionSpec
from ....core.wide import widened
from ....measure.notation import number
from ...plots.lesson_plots import keep_curves
from .reading import Reading
from .step import BRANCHES, Question, Step, View

HALF = BRANCHES // 2
START = 3 * BRANCHES // 4  # as published
NEAR = 0.05  # factors that differ by less count as the same


@dataclass(frozen=True)
class Kept:
    """What the first K branches say against the whole, for K = 1 to B; all (B,) float32."""

    size: Tensor  # norm of what is kept / norm of the whole
    cosine: Tensor  # between both

    @property
    def restoring(self) -> Tensor:
        """α that gives what is kept the size of the whole."""
        return 1 / self.size

    @property
    def best(self) -> Tensor:
        """α of least squared error: the projection of the whole on what is kept."""
        return self.cosine / self.size

    @property
    def error(self) -> Tensor:
        """What is missing with the best α, against the size of the whole."""
        return (1 - self.cosine.square()).clamp(min=0).sqrt()


def kept(reading: Reading) -> Kept:
    said, _ = reading.looped(BRANCHES)
    sums = widened(said).cumsum(0).flatten(1)  # (B, tokens · d_model)
    whole, sizes = sums[-1], sums.norm(dim=1).clamp(min=1e-30)
    cosine = (sums @ whole) / (sizes * sizes[-1])
    return Kept(size=(sizes / sizes[-1]).float().cpu(), cosine=cosine.float().cpu())


def words(reading: Reading) -> str:
    return f"""
$$\\mathrm{{MLP}}(x)\\approx\\alpha\\sum_{{b=0}}^{{K-1}}y_b(x)\\qquad\\alpha=\\sqrt{{B/K}}$$

Only the first K of B = {BRANCHES} branches run: this does save time. What they say is smaller \
than the whole. Were branches equally large, zero on average and uncorrelated, it would have \
√(K/B) of the size, and α = √(B/K) would restore it. But a factor cannot turn the output: the \
**cosine** says how far its direction is right.
"""


def view(reading: Reading, keep: float, answered: bool) -> View:
    found, k = kept(reading), int(keep)
    size, cosine = float(found.size[k - 1]), float(found.cosine[k - 1])
    numbers = (
        f"With K = {k}, what is kept has <strong>{100 * size:.0f} %</strong> of the size of the "
        f"whole; √(K/B) predicts {100 * sqrt(k / BRANCHES):.0f} %. The cosine is "
        f"<strong>{cosine:.2f}</strong>. As published, α is {sqrt(BRANCHES / k):.2f}"
    )
    if answered:
        restoring, best = float(found.restoring[k - 1]), float(found.best[k - 1])
        numbers += (
            f"; {number(restoring)} restores the size, {number(best)} leaves the least error, "
            f"{100 * float(found.error[k - 1]):.0f} % of the whole"
        )
    return View(keep_curves(found, k, answered), f"<p>{numbers}.</p>")


def judge(reading: Reading) -> tuple[int, str]:
    found = kept(reading)
    best, published = float(found.best[HALF - 1]), sqrt(BRANCHES / HALF)
    ratio = best / published
    right = 1 if abs(ratio - 1) < NEAR else 0 if ratio < 1 else 2
    size, cosine = float(found.size[HALF - 1]), float(found.cosine[HALF - 1])
    return right, (
        f"Measured at layer {reading.layer}: α = {number(best)} leaves the least error, against "
        f"√(B/K) = {published:.2f}. It is the cosine over the size, {cosine:.2f} / {size:.2f}: a "
        "large α also enlarges the part that points elsewhere. Were the branches really "
        "uncorrelated, both would be √(K/B), and the best α would be 1."
    )


STEP = Step(
    key="keep",
    title="Keep K",
    words=words,
    control={
        "minimum": 1, "maximum": BRANCHES, "value": START, "step": 1, "precision": 0,
        "label": f"K: branches kept of {BRANCHES}",
    },
    view=view,
    spec=lambda reading, keep: ConversionSpec(branches=BRANCHES, keep=int(keep)),
    question=Question(
        f"{HALF} of {BRANCHES} branches are kept. Which α brings their sum nearest to the whole "
        "output?",
        (
            f"One below √({BRANCHES}/{HALF}) = {sqrt(BRANCHES / HALF):.2f}",
            "That one, give or take 5 %",
            "One above it",
        ),
    ),
    judge=judge,
)  # fmt: skip
