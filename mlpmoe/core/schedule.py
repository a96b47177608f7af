"""Schedule: how fade's zeros are shared among the branches."""

from __future__ import annotations

DEFAULT_EXPONENT = 2.0
SCHEDULES = {  # name -> what it says, in a line
    "linear": "rising in equal steps (MLPMoE)",
    "uniform": "the same in every branch",
    "reverse": "falling in equal steps",
    "power": "rising as a power",
}


def branch_sparsities(
    branches: int, strength: float, schedule: str = "linear", exponent: float = DEFAULT_EXPONENT
) -> list[float]:
    """The share to zero in each branch.

    The published ramp is s_i = min(1, strength·i/B), which leaves branch 0 untouched (MLPMoE,
    section 3.2). All other schedules zero as much as the ramp in the mean over the branches, as
    long as none is emptied, so that a change of schedule moves the zeros and not their number.
    """
    ramp = [i / branches for i in range(branches)]
    if schedule == "linear":
        shape = ramp
    elif schedule == "uniform":
        shape = [sum(ramp) / branches] * branches
    elif schedule == "reverse":
        shape = ramp[::-1]
    else:
        powers = [share**exponent for share in ramp]
        factor = sum(ramp) / sum(powers) if branches > 1 else 0.0
        shape = [factor * power for power in powers]
    return [min(1.0, strength * share) for share in shape]
