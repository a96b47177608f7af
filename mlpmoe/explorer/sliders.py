"""Sliders whose ends follow another control.

When the ends move, a value from before may be on its way from the visitor's page; plain sliders
answer it with an error. Gradio writes a `.pyi` file beside the source of every component class.
"""

from __future__ import annotations

from math import isfinite

import gradio as gr


class LimitedSlider(gr.Slider):
    """Takes a value beyond its ends as the end."""

    is_template = True  # in the browser it is a plain slider

    def preprocess(self, payload: float) -> float:
        payload = _number(payload, self.label)
        return super().preprocess(min(max(payload, self.minimum), self.maximum))


class KeepSlider(gr.Slider):
    """K as the visitor's page has it, even where B has become smaller meanwhile: only so can a
    handler tell by B before and after whether all branches were meant (`settle_keep`)."""

    is_template = True

    def preprocess(self, payload: float) -> int:
        return int(_number(payload, self.label))


def _number(payload: object, label: str | None) -> float:
    """What was sent, if it is a finite number: an emptied field sends nothing."""
    if isinstance(payload, bool) or not isinstance(payload, int | float) or not isfinite(payload):
        raise gr.Error(f"{label} needs a number.", title="Not possible", print_exception=False)
    return payload
