"""What happens on the tab Lesson: values of its controls in, what its steps show out."""

from __future__ import annotations

import threading
from time import time_ns
from typing import Any
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

import gradio as gr
import plotly.graph_objects as go

from ...core.spec import ConversionSpec
from ..plots.lesson_plots import enlarged
from ..server.asked import spec_of
from ..server.loaded import LoadedModel
from ..server.workbench import Workbench
from ..shell.front import shares_of
from ..shell.settings import parted, read_asked
from ..shell.shipped import shipped
from .lesson_steps import STEPS, Reading, Step, View, feedback, read_layers
from .lesson_turn import PUBLISHED, challenge, good_start, verdict, words

PRESENT, LEAVE = "Present", "Leave (Esc)"


class LessonHandlers:
    """The events of the lesson over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._readings: WeakKeyDictionary[LoadedModel, list[Reading]] = WeakKeyDictionary()
        self._reading = threading.Lock()

    def another_model(self, model: str) -> tuple[dict[str, Any], str]:
        """The slider of layers: as many as the model has, at the one in the middle; and the words
        of the challenge."""
        layers = len(self.workbench.loaded(model).mlps)
        slider = gr.update(maximum=max(1, layers - 1), value=middle(layers))
        return slider, words(challenge(_runs(model)))

    def show(self, model: str, layer: int, large: bool, *values: Any) -> tuple:
        """All steps that teach: words, figure, numbers, feedback and plan of each.

        values: of the controls, then the answers (0 to 2, or None).
        """
        reading = self.reading(model, layer)
        controls, answers = values[: len(STEPS)], values[len(STEPS) :]
        shown = []
        for step, value, answer in zip(STEPS, controls, answers, strict=True):
            view = step.view(reading, value, answer is not None)
            shown += [
                step.words(reading),
                figure(view, large),
                view.numbers,
                feedback(step, reading, answer),
                plan(model, step.spec(reading, value)),
            ]
        return tuple(shown)

    def view(
        self, step: Step, model: str, layer: int, large: bool, value: float, answer: int | None
    ) -> tuple:
        """Figure, numbers and plan of one step."""
        reading = self.reading(model, layer)
        view = step.view(reading, value, answer is not None)
        return figure(view, large), view.numbers, plan(model, step.spec(reading, value))

    def answer(
        self, step: Step, model: str, layer: int, large: bool, value: float, answer: int | None
    ) -> tuple:
        """The same, which may show more now, and what is said to the answer."""
        said = feedback(step, self.reading(model, layer), answer)
        return *self.view(step, model, layer, large, value, answer), said

    def start_published(self, model: str) -> str:
        return f"{plan(model, PUBLISHED)} {time_ns()}"  # the same may be asked for again

    def start_well(self, model: str) -> str:
        return f"{plan(model, good_start(_runs(model)))} {time_ns()}"

    def check(self, model: str, *values: Any) -> str:
        """Whether the page's settings meet the challenge. values: of its controls, and the text."""
        settings, (text,) = parted(values)
        loaded = self.workbench.loaded(model)
        conversion = read_asked(loaded, settings)
        return verdict(
            challenge(_runs(model)), spec_of(conversion), shares_of(loaded, conversion).compute,
            loaded.known_evaluation(conversion, text),
        )  # fmt: skip

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


def plan(model: str, spec: ConversionSpec) -> str:
    """The link to a setting, on whatever text the visitor measures: see lesson.js."""
    return f"{urlencode({'model': model})}&{spec.canonical().to_query()}"


def _runs(model: str) -> list:
    return [record.run for record in shipped(model)]


def middle(layers: int) -> int:
    return layers // 2


def figure(view: View, large: bool) -> go.Figure | str:
    return enlarged(view.figure) if large and isinstance(view.figure, go.Figure) else view.figure
