"""Everything the page shows of a spec without a forward pass over a text: numbers and plots."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ..core.errors import UserError
from ..core.spec import PRESETS, ConversionSpec
from ..measure.magnitudes import branch_weights, branched_mlps, magnitudes
from .cards import Card, compute_card, nonzero_card
from .plots import branch_histograms, branches_left
from .workbench import LoadedModel

HISTOGRAM_BINS = 60
HISTOGRAM_REACH = 4.0  # the axis ends at this many root mean squares of the weights
QUANTITY_NAMES = {"nonzero": "non-zero weights", "energy": "squared weights"}


@dataclass(frozen=True)
class Preview:
    """What a change of a slider shows at once."""

    nonzero: Card
    compute: Card
    histograms: go.Figure
    heat: go.Figure
    snippet: str


def preview(
    loaded: LoadedModel, spec: ConversionSpec, layer: int, projection: str, quantity: str
) -> Preview:
    """Cards and plots of the structure of one conversion."""
    report = loaded.converted_report(spec)
    left = loaded.left(spec, _known(quantity, QUANTITY_NAMES))
    return Preview(
        nonzero=nonzero_card(loaded.report, report, spec, loaded.zeros(spec)),
        compute=compute_card(loaded.report, report, spec),
        histograms=histograms(loaded, spec, layer, _known(projection, loaded.projections)),
        heat=branches_left(left, QUANTITY_NAMES[quantity]),
        snippet=snippet(loaded.key, spec),
    )


def histograms(loaded: LoadedModel, spec: ConversionSpec, layer: int, projection: str) -> go.Figure:
    """Branch histograms before and after, on the same bins."""
    whole = loaded.converted(ConversionSpec(branches=spec.branches))
    mlps = branched_mlps(whole)
    layer = min(layer, len(mlps) - 1)
    weights = branch_weights(mlps[layer], projection)
    square = sum(float(w.float().square().sum()) for w in weights)
    upper = HISTOGRAM_REACH * (square / sum(w.numel() for w in weights)) ** 0.5 or 1.0
    dense, converted = (
        magnitudes(model, layer, projection, HISTOGRAM_BINS, upper)
        for model in (whole, loaded.converted(spec))
    )
    return branch_histograms(dense, converted, layer, projection)


def summary(loaded: LoadedModel, spec: ConversionSpec) -> dict[str, Any]:
    """The numbers of the structure as plain values, for the API."""
    dense, converted, zeros = loaded.report, loaded.converted_report(spec), loaded.zeros(spec)
    return {
        "model": loaded.label,
        "spec": spec.to_dict(),
        "parameters": {"dense": dense.total, "converted": converted.total},
        "nonzero": {"dense": dense.nonzero, "converted": converted.nonzero},
        "mlp_nonzero": {"dense": dense.mlp_nonzero, "converted": converted.mlp_nonzero},
        "macs_per_token": {"dense": dense.macs_per_token, "converted": converted.macs_per_token},
        "gate_and_up_zeroed": {"requested": zeros.requested, "realised": zeros.realised},
    }


def preset_name(spec: ConversionSpec) -> str | None:
    """The preset that says the same, if there is one."""
    alpha = spec.alpha
    for name, preset in PRESETS.items():
        same = (preset.branches, preset.fade, preset.kept) == (spec.branches, spec.fade, spec.kept)
        if same and preset.alpha == alpha:
            return name
    return None


def snippet(model: str, spec: ConversionSpec) -> str:
    """The run in Python, and in the shell as a comment."""
    return (
        "from mlpmoe import ConversionSpec, convert, load\n\n"
        f"model, tokenizer = load({model!r})\n"
        f"converted = convert(model, {spec.to_python()})\n\n"
        f"# or: python -m mlpmoe evaluate {shlex.quote(model)} {spec.to_flags()}\n"
        f"# or, in the address of this page: ?{spec.to_query()}\n"
    )


def _known(name: Any, allowed: Any) -> Any:
    if name not in allowed:
        raise UserError(f"{name!r:.60} is not one of {', '.join(allowed)}.")
    return name
