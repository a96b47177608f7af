"""What a recovery did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Look(NamedTuple):
    """Both divergences after so many steps, in nats per token."""

    step: int
    train: float | None  # mean over the steps since the look before
    held_out: float


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained, for how long, and what it brought on calibration text kept apart."""

    what: str  # a key of RECOVERIES
    steps: int  # that were done
    parameters: int  # numbers that were trained
    seconds: float
    tokens: int  # trained on, each time they were read
    held_out_tokens: int
    looks: tuple[Look, ...]
    best: int  # the step whose weights the model has; 0: as it was before
    stopped: str | None = None  # why it ended before its last step
    active: float | None = None  # share of the neurons that a token runs, where that is trained

    @property
    def before(self) -> float:
        """KL divergence on the held-out text before training, in nats per token."""
        return self.looks[0].held_out

    @property
    def after(self) -> float:
        """The same of the weights that the model has now."""
        return next(look.held_out for look in self.looks if look.step == self.best)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"looks": [look._asdict() for look in self.looks]}

    def __str__(self) -> str:
        kept = "" if self.best == self.steps else f", of which step {self.best} was best"
        ended = f". Stopped: {self.stopped}" if self.stopped else ""
        runs = "" if self.active is None else f", a token runs {self.active:.4g} of the neurons"
        return (
            f"trained {self.what} ({self.parameters:,} parameters): held-out KL "
            f"{self.before:.4g} → {self.after:.4g} nats per token, {self.steps} steps{kept}, "
            f"{self.seconds:.0f} s{runs}{ended}"
        )
