"""Schedule: how fade's zeros are shared among the branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate

from ..checks import real
from ..errors import SpecError
from ..registry import Choice

DEFAULT_EXPONENT = 2.0
MAX_FADE = 2.0  # at 2 the last half of the branches is empty; beyond, only branch 0 would be left
ROUNDING = 1e-12  # by which a share may lie above what can be reached


@dataclass(frozen=True)
class Schedule(Choice):
    """A way to share zeros: what branch i of B loses in relation to the others."""

    _: KW_ONLY
    part: Callable[[int, int, float | None], float]  # of i, B and the exponent; 0 or more
    exponent: float | None = None  # the usual one; None: it takes none
    alone: float = 0.0  # what a single branch loses in relation to the strength


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(
        "rising in equal steps (MLPMoE)",
        "more in later branches",
        part=lambda i, branches, exponent: i / branches,
    ),
    "uniform": Schedule(
        "the same in every branch",
        "evenly in all branches",
        part=lambda i, branches, exponent: 1.0,
        alone=0.5,  # what each of many branches loses
    ),
    "reverse": Schedule(
        "falling in equal steps",
        "more in earlier branches",
        part=lambda i, branches, exponent: (branches - 1 - i) / branches,
    ),
    "power": Schedule(
        "rising as a power",
        "much more in later branches",
        part=lambda i, branches, exponent: (i / branches) ** exponent,
        exponent=DEFAULT_EXPONENT,
    ),
}


def branch_sparsities(
    branches: int, strength: float, schedule: str = "linear", exponent: float | None = None
) -> list[float]:
    """The share to zero in each branch. exponent: None is the schedule's usual one.

    The published ramp is s_i = min(1, strength·i/B), which leaves branch 0 untouched (MLPMoE,
    section 3.2). All other schedules zero as much as the ramp in the mean over the branches, as
    long as none is emptied, so that a change of schedule moves the zeros and not their number.
    That mean, strength·(B-1)/2B, is nothing for a single branch; "uniform" then zeroes what it
    tends to with many branches, strength/2.
    """
    return [min(1.0, strength * each) for each in _per_strength(branches, schedule, exponent)]


def strength_for(
    sparsity: float,
    branches: int,
    schedule: str = "linear",
    exponent: float | None = None,
    kept: int | None = None,
) -> float:
    """The strength at which the shares of `branch_sparsities` have this mean; 0 for none.

    kept: mean over the first K branches, those that stay; None: over all. SpecError if it takes
    more than MAX_FADE, with the largest share that there is.
    """
    sparsity = real("sparsity", sparsity, 0, 1)
    if sparsity == 0:
        return 0.0
    rising = sorted(_per_strength(branches, schedule, exponent)[:kept])
    wanted, sums = sparsity * len(rising), list(accumulate(rising))
    largest = sum(min(1.0, MAX_FADE * each) for each in rising) / len(rising)
    if sparsity > largest + ROUNDING:
        raise SpecError(
            f"sparsity is {sparsity:g}, but with the schedule {schedule} fade zeroes at most "
            f"{largest:.6g} of the weights in {_of(branches, kept)}."
        )
    for full in range(len(rising)):  # branches that have lost all
        left = len(rising) - full - 1  # the last of the others
        if sums[left] == 0:
            break
        strength = (wanted - full) / sums[left]
        if strength * rising[left] <= 1:
            return min(strength, MAX_FADE)
    return MAX_FADE


def _per_strength(branches: int, schedule: str, exponent: float | None) -> list[float]:
    """The share of each branch in relation to the strength, before any has lost all."""
    chosen = SCHEDULES[schedule]
    if branches == 1:
        return [chosen.alone]
    exponent = chosen.exponent if exponent is None else exponent
    parts = [chosen.part(i, branches, exponent) for i in range(branches)]
    # sorted, so that the same parts in another order have exactly the same sum
    total, ramp = sum(sorted(parts)), sum(i / branches for i in range(branches))
    factor = ramp / total if total else 0.0
    return [factor * part for part in parts]


def _of(branches: int, kept: int | None) -> str:
    count = f"{branches} branch{'es' if branches > 1 else ''}"
    return count if kept in (None, branches) else f"the first {kept} of {count}"
