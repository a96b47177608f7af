"""What a little training after the conversion may change, and the limits of its settings."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from ..checks import check_choice, integer, real
from ..errors import SpecError
from ..registry import Choice

if TYPE_CHECKING:
    from ..spec import ConversionSpec

FIELDS = ("recover", "recover_steps", "recover_rate")  # of the spec
MAX_STEPS = 100_000
MAX_RATE = 10.0
NEAR = 0.5  # nats per token
NOTHING = "none"


@dataclass(frozen=True)
class Recovery(Choice):
    """What is trained, and how fast."""

    _: KW_ONLY
    # the largest learning rate: about what a step changes a number by; of routers, relative to the
    # size of their numbers
    rate: float
    near: float = 0.0  # KL divergence before training, nats per token, below which it is slower

    def rate_at(self, before: float) -> float:
        """The largest learning rate for a model that is so far from the dense one, in nats per
        token. What is near is thrown back by the rate that what is far needs: single neurons of
        SmolLM2 at 75 % (KL 0.090), all weights, 60 steps, cost 1.066 times the dense perplexity
        before, 1.055 at 2.5e-5, 1.046 at 5e-5, and more than before at 1.5e-4 and 3e-4."""
        return self.rate * min(1.0, before / self.near) if self.near else self.rate

    def is_usual(self, rate: float | None) -> bool:
        """Whether a spec may leave this rate out, since it is the one taken at any distance."""
        return rate == self.rate and not self.near


RECOVERIES: dict[str, Recovery] = {
    NOTHING: Recovery("nothing", "trains nothing", short="not trained", rate=0.0),
    "alpha": Recovery(
        "the α of the branches", "trains the factors of the branches",
        short="α trained", calibrated=True, rate=2e-2,
    ),
    "router": Recovery(
        "the routers", "trains what chooses the experts", short="routers trained",
        calibrated=True, rate=5e-2,
    ),
    # of the generator's numbers; ToMoE's is 1e-3, for a hundred times as many steps
    "masks": Recovery(
        "neurons of the experts, and routers (ToMoE)",
        "trains which neurons the experts have, and what chooses the experts",
        short="masks and routers trained", calibrated=True, rate=3e-3,
    ),
    "down": Recovery(
        "down", "trains down", short="down trained", calibrated=True, rate=1e-3, near=NEAR
    ),
    "lora": Recovery(
        "gate, up and down by LoRA", "trains a change of low rank in gate, up and down",
        short="LoRA", calibrated=True, rate=1e-3, near=NEAR,
    ),
    "all": Recovery(
        "all MLP weights", "trains all weights of the MLPs", short="MLPs trained",
        calibrated=True, rate=3e-4, near=NEAR,
    ),
}  # fmt: skip


def check_recovery(spec: ConversionSpec) -> None:
    """Check the fields of a spec that belong to recovery, and write numbers as plain ones. Raises
    SpecError."""
    set_field = object.__setattr__  # the dataclass is frozen
    check_choice("recover", spec.recover, RECOVERIES)
    set_field(spec, "recover_steps", integer("recover_steps", spec.recover_steps))
    if not 1 <= spec.recover_steps <= MAX_STEPS:
        raise SpecError(f"recover_steps must lie between 1 and {MAX_STEPS:,}.")
    if spec.recover_rate is not None:
        set_field(spec, "recover_rate", real("recover_rate", spec.recover_rate, 0, MAX_RATE))
        if spec.recover_rate == 0:
            raise SpecError("recover_rate must be more than 0.")
    if spec.recover == "alpha" and spec.routed:
        raise SpecError(
            "only branches have an α to train: recover alpha is for the method mlpmoe; take down, "
            "lora or all."
        )
    if spec.recover == "router":
        if reason := _untrainable(spec):
            raise SpecError(f"recover router: {reason}; take down, lora or all.")
    if spec.recover == "masks":
        if spec.method != "tokenclusters":
            raise SpecError(
                "only experts that overlap have masks to train: recover masks is for the method "
                "tokenclusters; take down, lora or all."
            )
        if spec.router == "oracle":
            raise SpecError(
                "recover masks: the router oracle is a bound, and has nothing to train; take "
                "another router."
            )


def _untrainable(spec: ConversionSpec) -> str | None:
    """Why there is no router that could be trained."""
    if not spec.routed:
        return f"the method {spec.method} has no router"
    if spec.method == "tokenclusters":
        return "the routers of tokenclusters are trained together with its masks (recover masks)"
    if spec.routed.partition is None:
        return f"the method {spec.method} chooses by its own weights, not by a router"
    if spec.router == "oracle":
        return "the router oracle is a bound, and has nothing to train"
    if spec.selection == "threshold":
        return "with a threshold a trained router would run more experts than were asked for"
    return None
