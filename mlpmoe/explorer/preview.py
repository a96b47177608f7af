"""Everything the page shows of a spec without a forward pass over a text: numbers and plots."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

import plotly.graph_objects as go

from ..core.errors import UserError
from ..core.presets import PRESETS
from ..core.spec import ConversionSpec
from ..models import default_calibration
from ..models.texts import TEXTS
from .asked import Conversion, spec_of
from .cards import Card, compute_card, nonzero_card
from .loaded import LoadedModel
from .plots import branch_histograms, branches_left
from .texts import OWN_PREFIX

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
    spec, report = spec_of(asked), loaded.structure.report(asked)
    left = loaded.structure.left(asked, _known(quantity, QUANTITY_NAMES))
    return Preview(
        nonzero=nonzero_card(loaded.report, report, spec, loaded.structure.zeros(asked)),
        compute=compute_card(loaded.report, report, spec),
        histograms=histograms(loaded, asked, layer, _known(projection, loaded.projections)),
        heat=branches_left(left, QUANTITY_NAMES[quantity]),
    )


def histograms(loaded: LoadedModel, asked: Conversion, layer: int, projection: str) -> go.Figure:
    """Branch histograms before and after, on the same bins."""
    layer = min(int(layer), len(loaded.mlps) - 1)
    weight = getattr(loaded.mlps[layer].weights, projection).detach().float()
    upper = HISTOGRAM_REACH * float(weight.square().mean()) ** 0.5 or 1.0
    dense, converted = (
        loaded.structure.histogram(each, layer, projection, HISTOGRAM_BINS, upper)
        for each in (loaded.structure.whole(asked), asked)
    )
    return branch_histograms(dense, converted, layer, projection, spec_of(asked).fades)


def summary(loaded: LoadedModel, asked: Conversion) -> dict[str, Any]:
    """The numbers of the structure as plain values, for the API."""
    spec, zeros = spec_of(asked), loaded.structure.zeros(asked)
    dense, converted = loaded.report, loaded.structure.report(asked)
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
    if spec.routed:
        return None
    same = (name for name, preset in PRESETS.items() if effect_of(preset) == effect_of(spec))
    return next(same, None)


def effect_of(spec: ConversionSpec) -> ConversionSpec:
    """A spec in one way of writing."""
    return spec.canonical()


def snippet(model: str, spec: ConversionSpec, text: str, calibration: str | None = None) -> str:
    """The run in Python, and in the shell as a comment; both give the figures of the page.

    text, calibration: names of texts, or the file of an own one; calibration None: the default.
    """
    calibration = calibration or default_calibration(model)
    if calibration.startswith(OWN_PREFIX):
        calibration = "own-calibration.txt"
    names = ["ConversionSpec", "compare", "convert", "load", "perplexity"]
    setting, argument, flag = [], "", ""
    if spec.needs_calibration:
        names.append("Calibration")
        setting.append(f"seen = {_reading(calibration, names, 'named_calibration')}")
        argument = ", Calibration.from_text(tokenizer, seen)"
        flag = f" --calibration {calibration}"
    shown = "own-text.txt" if text.startswith(OWN_PREFIX) else text
    stream = text in TEXTS and TEXTS[text].protocol == "stream"
    if stream:
        most = TEXTS[text].most_windows
        names.remove("perplexity")
        setting += [
            f"text = {_reading(text, names, 'named_text')}",
            f"windows = encode_stream(tokenizer, text, context_length(model), {most})",
        ]
        measure = "measure(m, windows)"
    else:
        setting.append(f"text = {_reading(shown, names, 'named_text')}")
        measure = "perplexity(m, tokenizer, text)"
    lines = [
        f"from mlpmoe import {', '.join(sorted(names))}",
        *(
            [
                "from mlpmoe.measure.encoding import context_length, encode_stream",
                "from mlpmoe.measure.perplexity import measure",
            ]
            if stream
            else []
        ),
        "",
        f"model, tokenizer = load({model!r})",
        *setting,
        f"converted = convert(model, {spec.to_python()}{argument})",
        f"dense, other = [{measure} for m in (model, converted)]",
        "print(dense.value, other.value, compare(dense, other))",
        "",
        f"# or: python -m mlpmoe evaluate {shlex.quote(model)} --text {shown}{flag} "
        f"{spec.to_flags()}",
    ]
    return "\n".join(lines) + "\n"


def _reading(text: str, names: list[str], by_name: str) -> str:
    """The expression that reads a text; what it needs is added to the names."""
    if text.endswith(".txt"):
        return f"open({text!r}, encoding='utf-8').read()"
    names.append(by_name)
    return f"{by_name}({text!r})"


def _known(name: Any, allowed: Any) -> Any:
    if name not in allowed:
        raise UserError(f"{name!r:.60} is not one of {', '.join(allowed)}.")
    return name
