"""A static spec in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.spec import ConversionSpec

ORDER_WORDS = {
    "random": "in random order",
    "norm": "those with the longest weights first",
    "activation": "the most active first",
    "fluctuation": "the most varying first",
    "least-squares": "those hardest to make up for first",
}
SCORE_WORDS = {
    "magnitude": "the smallest",
    "wanda": "the smallest on small inputs (Wanda)",
    "sparsegpt": "those the others make up for best (SparseGPT)",
}
SCHEDULE_WORDS = {
    "linear": "more in later branches",
    "uniform": "evenly in all branches",
    "reverse": "more in earlier branches",
    "power": "much more in later branches",
}
COMPENSATION_WORDS = {
    "sqrt": "scales what stays by √(B/K)",
    "ratio": "scales what stays by B/K",
    "alpha": "fits a factor for every branch",
    "mean": "adds the mean of what is lost as a bias",
    "refit": "fits down again by least squares",
}


def in_words(spec: ConversionSpec) -> str:
    """What a static spec does, as the rest of a sentence: "keeps 12 of 16 branches; …"."""
    parts = []
    drops = spec.kept < spec.branches
    if drops:
        order = ORDER_WORDS.get(spec.order)
        neurons = f" of neurons, {order}" if order else ", as they are stored"
        parts.append(f"keeps {spec.kept} of {spec.branches} branches{neurons}")
    if spec.pattern:
        n, m = spec.pattern
        parts.append(
            f"zeroes {n} of every {m} weights of {joined(spec.projections)}, {_first(spec)}"
        )
    elif spec.fade and spec.fade_unit == "neuron":
        parts.append(f"drops whole neurons, {SCHEDULE_WORDS[spec.fade_schedule]}")
    elif spec.fade:
        parts.append(
            f"zeroes weights of {joined(spec.projections)}, {SCHEDULE_WORDS[spec.fade_schedule]}, "
            f"{_first(spec)}"
        )
    compensation = COMPENSATION_WORDS.get(spec.compensation)
    if compensation and (drops or (spec.fits and parts)):
        parts.append(compensation)
    if spec.allocation == "sensitivity" and parts:
        parts.append("takes less from layers that suffer more")
    if spec.progressive:
        parts.append("calibrates layer by layer on the converted model")
    if spec.spared and parts:
        parts.append(spared_in_words(spec))
    return "; ".join(parts) or "cuts into branches and removes nothing"


def spared_in_words(spec: ConversionSpec) -> str:
    """Which layers are spared, e.g. "layers 0 and 11 kept dense"."""
    layers = spec.spared_layers
    return f"layer{'s' if len(layers) > 1 else ''} {joined(list(map(str, layers)))} kept dense"


def joined(names: Sequence[str]) -> str:
    """Names as in a sentence: gate, up and down."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _first(spec: ConversionSpec) -> str:
    return f"{SCORE_WORDS[spec.fade_score]} first"
