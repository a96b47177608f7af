"""The values of the page's controls, as the page sends them."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from mlpmoe.explorer.shell.front import FRONT
from mlpmoe.explorer.shell.settings import CONTROLS, USED

UNTOUCHED = {
    "method": "mlpmoe",
    "branches": 16, "fade": 0.0, "keep": 16, "compensation": "sqrt", "order": "contiguous",
    "fade_schedule": "linear", "fade_exponent": 2.0, "fade_projections": ["gate", "up"],
    "fade_score": "magnitude", "fade_unit": "weight", "allocation": "uniform",
    "active": 0.75, "experts": 64, "shared": 0.25, "own_share": True, "router": "own",
    "selection": "topk", "fill": "none",
    "progressive": False, "spared": "", "recover": "none", "recover_steps": 200,
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
    text: Any = "proxy", axis: Any = "compute", mine: Any = (), layer: Any = 0,
    model: Any = "demo", **change: Any,
) -> tuple:  # fmt: skip
    """What a measurement gets: model, conversion, text and how it is looked at."""
    return model, *settings(**change), text, axis, mine, layer


def preview_values(share: Any = "16 16 16 0 -", budget: Any = 100, **change: Any) -> tuple:
    """What a preview gets: the same, the share that K stood for before, and the budget."""
    return *shown_values(**change), share, budget


class Previewed(NamedTuple):
    """What a preview gives."""

    branches: Any
    fade: Any
    keep: Any
    share: Any
    shared: Any
    recover: Any
    budget: Any
    preset: Any
    query: Any
    code: Any
    axis: Any
    arrived: Any
    perplexity: Any
    nonzero: Any
    compute: Any
    speed: Any
    sentence: Any
    curve: Any
    network: Any


assert len(Previewed._fields) == USED + 5 + FRONT


class Measured(NamedTuple):
    """What a step of a measurement gives."""

    perplexity: Any
    nonzero: Any
    compute: Any
    speed: Any
    sentence: Any
    curve: Any
    network: Any
    training_note: Any
    training_says: Any
    training_curve: Any
    new: Any


class Opened(NamedTuple):
    """What opening a link gives."""

    taken: Any
    status: Any
    model: Any
    note: Any
    name: Any
    text: Any
    calibration: Any
    controls: dict
    share: Any
    tab: Any
    linked: Any


def opened_link(step: tuple) -> Opened:
    """The outputs of `open_link`, with the controls put together."""
    *rest, share, tab, linked = step
    assert len(rest) == 7 + len(CONTROLS)
    return Opened(*rest[:7], dict(zip(CONTROLS, rest[7:], strict=True)), share, tab, linked)


def chosen(shown: tuple) -> tuple:
    """The values that the controls have after an update from `show_spec`, without the share; what
    is left alone is as it was at first."""
    assert len(shown) == len(CONTROLS) + 1
    return tuple(
        UNTOUCHED[name] if v == gr.skip() else v["value"] if isinstance(v, dict) else v
        for name, v in zip(CONTROLS, shown[:-1], strict=True)
    )
