"""What happens on the tab "How it works": values of its controls in, what its steps show out."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr
import plotly.graph_objects as go

from .lesson_plots import enlarged
from .lesson_steps import STEPS, Reading, Step, View, feedback, read_layers
from .loaded import LoadedModel
from .workbench import Workbench

PRESENT, LEAVE = "Present", "Leave (Esc)"


class LessonHandlers:
    """The events of the lesson over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._readings: WeakKeyDictionary[LoadedModel, list[Reading]] = WeakKeyDictionary()
        self._reading = threading.Lock()

    def another_model(self, model: str) -> dict[str, Any]:
        """The slider of layers: as many as the model has, at the one in the middle."""
        layers = len(self.workbench.loaded(model).mlps)
        return gr.update(maximum=max(1, layers - 1), value=middle(layers))

    def show(self, model: str, layer: int, large: bool, *values: Any) -> tuple:
        """All steps: words, figure, numbers and feedback of each.

        values: of the controls, then the answers (0 to 2, or None).
        """
        reading = self.reading(model, layer)
        controls, answers = values[: len(STEPS)], values[len(STEPS) :]
        shown = []
        for step, value, answer in zip(STEPS, controls, answers, strict=True):
            view = step.view(reading, value)
            shown += [
                step.words(reading),
                figure(view, large),
                view.numbers,
                feedback(step, reading, answer),
            ]
        return tuple(shown)

    def view(self, step: Step, model: str, layer: int, large: bool, value: float) -> tuple:
        """Figure and numbers of one step."""
        view = step.view(self.reading(model, layer), value)
        return figure(view, large), view.numbers

    def answer(self, step: Step, model: str, layer: int, answer: int | None) -> str:
        return feedback(step, self.reading(model, layer), answer)

    def present(self, large: bool) -> tuple[bool, str]:
        """Large or not, and what the button says."""
        return large, LEAVE if large else PRESENT

    def reading(self, model: str, layer: int) -> Reading:
        """One MLP with its input; a layer beyond the last counts as the last."""
        loaded = self.workbench.loaded(model)
        with self._reading:
            if loaded not in self._readings:
                self._readings[loaded] = read_layers(loaded)
            readings = self._readings[loaded]
        return readings[min(int(layer), len(readings) - 1)]


def middle(layers: int) -> int:
    return layers // 2


def figure(view: View, large: bool) -> go.Figure | str:
    return enlarged(view.figure) if large and isinstance(view.figure, go.Figure) else view.figure
