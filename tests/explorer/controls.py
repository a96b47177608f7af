"""The values of the page's controls, as the page sends them."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlpmoe.explorer.expert_settings import CONTROLS as ROUTED_CONTROLS
from mlpmoe.explorer.settings import CONTROLS

UNTOUCHED = {
    "branches": 16, "fade": 0.0, "keep": 16, "compensation": "sqrt", "order": "contiguous",
    "fade_schedule": "linear", "fade_exponent": 2.0, "fade_projections": ["gate", "up"],
    "fade_score": "magnitude", "fade_unit": "weight", "allocation": "uniform",
    "progressive": False,
}  # fmt: skip


def controls(**change: Any) -> tuple:
    """Those that make the spec."""
    assert set(change) <= set(UNTOUCHED)
    values = UNTOUCHED | change
    return tuple(values[name] for name in CONTROLS)


def settings(calibration: Any = "stories", **change: Any) -> tuple:
    """Those that make the conversion: the spec, and the calibration text."""
    return *controls(**change), calibration


def shown_values(
    text: Any = "proxy", layer: Any = 0, projection: Any = "gate", quantity: Any = "nonzero",
    model: Any = "demo", **change: Any,
) -> tuple:  # fmt: skip
    """What a measurement gets: model, conversion, text and views."""
    return model, *settings(**change), text, layer, projection, quantity


def preview_values(share: Any = "16 16 16", **change: Any) -> tuple:
    """What a preview gets: the same, and the share that K stood for before."""
    return *shown_values(**change), share


class Previewed(NamedTuple):
    """What a preview gives."""

    branches: Any
    fade: Any
    keep: Any
    share: Any
    preset: Any
    query: Any
    code: Any
    perplexity: Any
    speed: Any
    nonzero: Any
    compute: Any
    histograms: Any
    heat: Any


class Measured(NamedTuple):
    """What a step of a measurement gives."""

    perplexity: Any
    speed: Any
    nonzero: Any
    compute: Any
    histograms: Any
    heat: Any
    new: Any


class Opened(NamedTuple):
    """What opening a link gives."""

    taken: Any
    status: Any
    model: Any
    note: Any
    layer: Any
    projection: Any
    name: Any
    text: Any
    calibration: Any
    static: tuple
    routed: tuple
    tab: Any


def opened_link(step: tuple) -> Opened:
    """The outputs of `open_link`, with the controls put together."""
    *rest, tab = step
    first, static, routed = rest[:9], rest[9 : 10 + len(CONTROLS)], rest[10 + len(CONTROLS) :]
    assert len(routed) == len(ROUTED_CONTROLS)
    return Opened(*first, tuple(static), tuple(routed), tab)


def chosen(shown: tuple) -> tuple:
    """The values that the controls have after an update from `show_spec`, without the share."""
    assert len(shown) == len(CONTROLS) + 1
    return tuple(v["value"] if isinstance(v, dict) else v for v in shown[:-1])
