"""The registries by the fields of a spec, and those that belong to no stage's own file."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from .recovery.kinds import RECOVERIES
from .registry import Choice, choices
from .routed import ROUTED_METHODS
from .routed.method import Method
from .routed.routers import ROUTERS
from .static.compensation import COMPENSATIONS
from .static.order import ORDERS
from .static.schedule import SCHEDULES
from .static.scores import SCORES

STATIC_FIELDS = (
    "branches", "order", "fade", "fade_schedule", "fade_exponent", "fade_projections",
    "fade_score", "fade_unit", "keep", "allocation", "progressive", "seed",
)  # fmt: skip
STATIC = Method(
    "MLPMoE",
    "Cuts each MLP into branches, the same for every token, and zeroes or drops some of them.",
    fields=STATIC_FIELDS,
)
# a view: what is added to the routed methods is here at once
METHODS: Mapping[str, Method] = ChainMap(ROUTED_METHODS, {"mlpmoe": STATIC})
UNITS = {  # beside n:m, such as 2:4
    "weight": Choice("single weights (MLPMoE)", "single weights"),
    "neuron": Choice("whole neurons", "whole neurons, which shrinks the matrices"),
}
PATTERNS = ("2:4", "4:8", "1:4")  # that a menu offers
ALLOCATIONS = {  # of K or fade to the layers; "global" shares out K only
    "uniform": Choice("the same in every layer", "takes as much from every layer"),
    # arXiv 2312.11983
    "global": Choice(
        "neurons ranked over all layers (FLAP)",
        "ranks the neurons of all layers together",
        calibrated=True,
    ),
    "sensitivity": Choice(
        "by what each layer costs the loss",
        "takes less from layers that cost the model more",
        calibrated=True,
        by_loss=True,
    ),
}
SELECTIONS = {
    "topk": Choice("the best k", "runs as many experts for every token"),
    "threshold": Choice(
        "all above a threshold", "runs all experts above a score that gives k on average",
        short="threshold", calibrated=True,
    ),
}  # fmt: skip
PROFILES = {
    "signed": Choice("with their sign", "averages gate activations with their sign"),
    "absolute": Choice("without their sign", "averages the sizes of gate activations"),
}
# field of the spec -> its choices; compensation: of the static method, the others have FILLS
REGISTRIES: dict[str, Mapping[str, Choice]] = {
    "method": METHODS,
    "order": ORDERS,
    "fade_schedule": SCHEDULES,
    "fade_score": SCORES,
    "fade_unit": UNITS,
    "allocation": ALLOCATIONS,
    "compensation": COMPENSATIONS,
    "router": ROUTERS,
    "selection": SELECTIONS,
    "profile": PROFILES,
    "recover": RECOVERIES,
}


def unit_choices() -> list[tuple[str, str]]:
    """Labels and names of the units, with some patterns."""
    patterns = [("{} of every {} weights".format(*p.split(":")), p) for p in PATTERNS]
    return choices(UNITS) + patterns
