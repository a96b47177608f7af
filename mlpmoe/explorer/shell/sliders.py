"""Sliders whose value is checked by the handlers and not by Gradio.

The ends of B, K and layer follow other controls, and a value from before may be on its way from
the visitor's page; plain sliders answer it with an error. Gradio writes a `.pyi` file beside the
source of every component class.
"""

from __future__ import annotations

import gradio as gr

LARGEST = 1e300  # whole numbers may have any size, and be too large for a float


class OpenSlider(gr.Slider):
    """Gives the handler whatever finite number the page shows: it says what is used instead, and
    the page then shows that (`settings.settle`)."""

    is_template = True  # in the browser it is a plain slider

    def preprocess(self, payload: float) -> float:
        return _number(payload, self.label)


class LimitedSlider(gr.Slider):
    """Takes a value beyond its ends as the end: for what is only looked at, such as a layer."""

    is_template = True

    def preprocess(self, payload: float) -> float:
        payload = _number(payload, self.label)
        return super().preprocess(min(max(payload, self.minimum), self.maximum))


def _number(payload: object, label: str | None) -> float:
    """What was sent, if it is a number of a sensible size: an emptied field sends nothing."""
    is_number = isinstance(payload, int | float) and not isinstance(payload, bool)
    if not is_number or not -LARGEST <= payload <= LARGEST:
        raise gr.Error(f"{label} needs a number.", title="Not possible", print_exception=False)
    return payload
