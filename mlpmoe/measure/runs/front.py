"""The front: the best recipe known of each kind, beside the published one that it has to beat."""

from __future__ import annotations

from ...core.spec import ConversionSpec
from .sweep import comparison

KEPT = {"75 %": 0.75, "50 %": 0.5}  # of the multiply-adds of the MLPs
ZEROS = {"28.1 %": 0.6, "50 %": 16 / 15}  # of their weights: strength of an even fade at B = 16
BRANCHES = 64  # for whole neurons: fine enough to share them out among layers
ROUTED = (  # names in `comparison`
    "Co-activation, down refitted",
    "Neurons, by output, threshold, down refitted",
    "Inputs, top-k (TEAL's rule)",
    "Inputs by open gates, threshold, down refitted",
)


def front(d_ff: int, gated: bool = True) -> dict[str, ConversionSpec]:
    """Name -> spec, at each budget, for MLPs of d_ff neurons. gated: whether they have a gate
    beside up and down."""
    found, branches = {}, min(BRANCHES, d_ff)
    for share, active in KEPT.items():
        specs = _static(branches, max(1, round(branches * active)))
        specs |= {name: s for name, (_, s) in comparison(active, gated).items() if name in ROUTED}
        found |= {f"{share}: {name}": spec for name, spec in specs.items()}
    for share, fade in ZEROS.items():
        found |= {f"{share} zeros: {name}": spec for name, spec in _zeros(fade).items()}
    return found


def _static(branches: int, keep: int) -> dict[str, ConversionSpec]:
    """The same neurons for every token."""
    rows = {
        "FLAP, ranked over all layers": ("fluctuation", "mean", "global"),
        "by least squares, down refitted": ("least-squares", "refit", "uniform"),
        "by the model's loss, down refitted": ("loss", "refit", "uniform"),
        "… shared out among layers": ("loss", "refit", "sensitivity"),
    }
    return {
        name: ConversionSpec(
            branches=branches, keep=keep, order=order, compensation=fill, allocation=allocation
        )
        for name, (order, fill, allocation) in rows.items()
    }


def _zeros(fade: float) -> dict[str, ConversionSpec]:
    """Zeros spread evenly over all three matrices."""
    scores = {
        "small ones": "magnitude",
        "small ones beside others on their input": "relative",
        "by SparseGPT": "sparsegpt",
    }
    return {
        name: ConversionSpec(
            branches=16, fade=round(fade, 6), fade_schedule="uniform", fade_score=score,
            fade_projections="gate-up-down",
        )
        for name, score in scores.items()
    }  # fmt: skip
