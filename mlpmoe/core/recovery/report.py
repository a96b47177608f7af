"""What a recovery did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..spec import ConversionSpec


class Look(NamedTuple):
    """Both divergences after so many steps, in nats per token."""

    step: int
    train: float | None  # mean over the steps since the look before
    held_out: float


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained, for how long, and what it brought on calibration text kept apart; or what
    was done so far."""

    what: str  # a key of RECOVERIES
    steps: int  # that were done
    planned: int  # that the rate falls over: those asked for, or as many as fit into a time limit
    asked: int  # steps of the spec
    rate: float  # of learning, at its highest
    parameters: int  # numbers that were trained
    seconds: float
    tokens: int  # trained on, each time they were read
    held_out_tokens: int
    looks: tuple[Look, ...]
    best: int  # the step whose weights the model has; 0: as it was before
    stopped: str | None = None  # why it ended before its last step
    cut_short: bool = False  # by the time limit, so that no spec gives the same again
    active: float | None = None  # share of the neurons that a token runs, where that is trained
    result: str | None = None  # fingerprint of what the model has of it, once it is done

    @property
    def before(self) -> float:
        """KL divergence on the held-out text before training, in nats per token."""
        return self.looks[0].held_out

    @property
    def after(self) -> float:
        """The same of the weights that the model has now."""
        return next(look.held_out for look in self.looks if look.step == self.best)

    @property
    def limited(self) -> bool:
        """Whether a time limit left steps out."""
        return self.planned < self.asked

    def done(self, spec: ConversionSpec) -> ConversionSpec:
        """The spec that was asked for, with as many steps as fitted into the time: it gives the
        same result without a limit, unless `cut_short`."""
        return replace(spec, recover_steps=self.planned) if self.limited else spec

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"looks": [look._asdict() for look in self.looks]}

    def __str__(self) -> str:
        kept = "" if self.best == self.steps else f", of which step {self.best} was best"
        limit = f" (of {self.asked}, what the time limit had room for)" if self.limited else ""
        ended = f". Stopped: {self.stopped}" if self.stopped else ""
        runs = "" if self.active is None else f", a token runs {self.active:.4g} of the neurons"
        result = f", result {self.result}" if self.result else ""
        return (
            f"trained {self.what} ({self.parameters:,} parameters): held-out KL "
            f"{self.before:.4g} → {self.after:.4g} nats per token, {self.steps} steps{limit}"
            f"{kept}, {self.seconds:.0f} s{runs}{result}{ended}"
        )
