"""Everything the page shows of a spec without a forward pass over a text: numbers and plots."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from typing import Any

import plotly.graph_objects as go

from ..core.errors import UserError
from ..core.presets import PRESETS
from ..core.spec import ConversionSpec
from ..measure.magnitudes import branch_weights, branched_mlps, magnitudes
from .cards import Card, compute_card, nonzero_card
from .loaded import Conversion, LoadedModel, spec_of
from .plots import branch_histograms, branches_left

HISTOGRAM_BINS = 60
HISTOGRAM_REACH = 4.0  # the axis ends at this many root mean squares of the weights
QUANTITY_NAMES = {"nonzero": "non-zero weights", "energy": "squared weights"}


@dataclass(frozen=True)
class Preview:
    """The structure of one conversion: what needs no text to be measured on."""

    nonzero: Card
    compute: Card
    histograms: go.Figure
    heat: go.Figure


def preview(
    loaded: LoadedModel, asked: Conversion, layer: int, projection: str, quantity: str
) -> Preview:
    """Cards and plots of the structure of one conversion."""
    spec, report = spec_of(asked), loaded.converted_report(asked)
    left = loaded.left(asked, _known(quantity, QUANTITY_NAMES))
    return Preview(
        nonzero=nonzero_card(loaded.report, report, spec, loaded.zeros(asked)),
        compute=compute_card(loaded.report, report, spec),
        histograms=histograms(loaded, asked, layer, _known(projection, loaded.projections)),
        heat=branches_left(left, QUANTITY_NAMES[quantity]),
    )


def histograms(loaded: LoadedModel, asked: Conversion, layer: int, projection: str) -> go.Figure:
    """Branch histograms before and after, on the same bins."""
    whole = loaded.converted(loaded.whole(asked))
    mlps = branched_mlps(whole)
    layer = min(layer, len(mlps) - 1)
    weights = branch_weights(mlps[layer], projection)
    square = sum(float(w.float().square().sum()) for w in weights)
    upper = HISTOGRAM_REACH * (square / sum(w.numel() for w in weights)) ** 0.5 or 1.0
    dense, converted = (
        magnitudes(model, layer, projection, HISTOGRAM_BINS, upper)
        for model in (whole, loaded.converted(asked))
    )
    return branch_histograms(dense, converted, layer, projection, spec_of(asked).fades)


def summary(loaded: LoadedModel, asked: Conversion) -> dict[str, Any]:
    """The numbers of the structure as plain values, for the API."""
    spec, zeros = spec_of(asked), loaded.zeros(asked)
    dense, converted = loaded.report, loaded.converted_report(asked)
    return {
        "model": loaded.label,
        "spec": spec.to_dict(),
        "parameters": {"dense": dense.total, "converted": converted.total},
        "nonzero": {"dense": dense.nonzero, "converted": converted.nonzero},
        "mlp_nonzero": {"dense": dense.mlp_nonzero, "converted": converted.mlp_nonzero},
        "macs_per_token": {"dense": dense.macs_per_token, "converted": converted.macs_per_token},
        "faded": asdict(zeros) if zeros else None,
    }


def preset_name(spec: ConversionSpec) -> str | None:
    """The preset that says the same, if there is one."""
    same = (name for name, preset in PRESETS.items() if _effect(preset) == _effect(spec))
    return next(same, None)


def _effect(spec: ConversionSpec) -> ConversionSpec:
    """The spec with all branches kept in one way of writing."""
    if spec.kept < spec.branches:
        return spec
    fitted = spec.fades and spec.fits
    return replace(spec, keep=None, compensation=spec.compensation if fitted else "sqrt")


def snippet(model: str, spec: ConversionSpec) -> str:
    """The run in Python, and in the shell as a comment."""
    if spec.needs_calibration:
        python = (
            "from mlpmoe import Calibration, ConversionSpec, convert, load\n\n"
            f"model, tokenizer = load({model!r})\n"
            'text = open("assets/texts/calibration.txt", encoding="utf-8").read()\n'
            "calibration = Calibration.from_text(tokenizer, text)\n"
            f"converted = convert(model, {spec.to_python()}, calibration)\n\n"
        )
    else:
        python = (
            "from mlpmoe import ConversionSpec, convert, load\n\n"
            f"model, tokenizer = load({model!r})\n"
            f"converted = convert(model, {spec.to_python()})\n\n"
        )
    return (
        f"{python}"
        f"# or: python -m mlpmoe evaluate {shlex.quote(model)} {spec.to_flags()}\n"
        f"# or, in the address of this page: ?{spec.to_query()}\n"
    )


def _known(name: Any, allowed: Any) -> Any:
    if name not in allowed:
        raise UserError(f"{name!r:.60} is not one of {', '.join(allowed)}.")
    return name
