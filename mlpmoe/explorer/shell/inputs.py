"""Inputs whose value is checked by the handlers and not by Gradio.

The ends of B, K and layer, and the texts, routers and projections that can be chosen, follow other
controls, and a value from before may be on its way from the visitor's page; Gradio's own
components answer it with an error. Gradio writes a `.pyi` file beside the source of every component
class.
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


class OpenDropdown(gr.Dropdown):
    """Gives the handler whatever name the page shows, also of a choice that was there before."""

    is_template = True

    def preprocess(self, payload: str) -> str:
        return _name(payload, self.label)


class OpenRadio(gr.Radio):
    """The same, with all choices in sight."""

    is_template = True

    def preprocess(self, payload: str) -> str:
        return _name(payload, self.label)


def _number(payload: object, label: str | None) -> float:
    """What was sent, if it is a number of a sensible size: an emptied field sends nothing."""
    is_number = isinstance(payload, int | float) and not isinstance(payload, bool)
    if not is_number or not -LARGEST <= payload <= LARGEST:
        raise _refused(f"{label} needs a number.")
    return payload


def _name(payload: object, label: str | None) -> str:
    if not isinstance(payload, str):
        raise _refused(f"{label} needs a choice.")
    return payload


def _refused(message: str) -> gr.Error:
    return gr.Error(message, title="Not possible", print_exception=False)
