"""The values of the page's controls, as the page sends them."""

from __future__ import annotations

from typing import Any

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


def shown_values(
    text: Any = "proxy", layer: Any = 0, projection: Any = "gate", quantity: Any = "nonzero",
    model: Any = "demo", **change: Any,
) -> tuple:  # fmt: skip
    """What a measurement gets: model, spec, text and views."""
    return model, *controls(**change), text, layer, projection, quantity


def preview_values(before: Any = 16, **change: Any) -> tuple:
    """What a preview gets: the same, and B at the preview before."""
    return *shown_values(**change), before


def chosen(shown: tuple) -> tuple:
    """The values that the controls have after an update from `show_spec`, without its last, B."""
    assert len(shown) == len(CONTROLS) + 1
    return tuple(v["value"] if isinstance(v, dict) else v for v in shown[:-1])
