"""Schedule: how fade's zeros are shared among the branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from ..registry import Choice

DEFAULT_EXPONENT = 2.0


@dataclass(frozen=True)
class Schedule(Choice):
    """A way to share zeros: what branch i of B loses in relation to the others."""

    _: KW_ONLY
    part: Callable[[int, int, float | None], float]  # of i, B and the exponent; 0 or more
    exponent: float | None = None  # the usual one; None: it takes none


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
    """
    chosen = SCHEDULES[schedule]
    exponent = chosen.exponent if exponent is None else exponent
    parts = [chosen.part(i, branches, exponent) for i in range(branches)]
    # sorted, so that the same parts in another order have exactly the same sum
    total, ramp = sum(sorted(parts)), sum(i / branches for i in range(branches))
    factor = ramp / total if total else 0.0
    return [min(1.0, strength * (factor * part)) for part in parts]
