"""The tab "How it works": its components, and how they are wired."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from .events import PRIVATE, QUIET, readable
from .lesson import PRESENT
from .lesson_steps import STEPS, Step
from .sliders import LimitedSlider

if TYPE_CHECKING:
    from .lesson import LessonHandlers

MATHS = [{"left": "$$", "right": "$$", "display": True}]
INTRO = (
    "What a conversion does to one MLP, in four steps with figures of the loaded model: about "
    "**10 minutes**. Each step has one control to move and one question. Your settings at the "
    "other tabs stay as they are."
)
# one after the other: sliders that are dragged ask faster than a slow model answers
LESSON_QUEUE = {"concurrency_id": "lesson", "concurrency_limit": 1}
# To the heading of the step that has come: there reading goes on, also by keyboard.
ARRIVE = """() => setTimeout(() => {
  window.dispatchEvent(new Event("resize"));
  setTimeout(() => window.dispatchEvent(new Event("resize")), 400);  // once plots are there
  const here = [...document.querySelectorAll("#lesson .lesson-where h2")]
    .find((heading) => heading.offsetParent !== null);
  if (!here) return;
  here.tabIndex = -1;
  here.focus({ preventScroll: true });
  document.querySelector("#lesson").scrollIntoView({ block: "start" });
}, 60)"""
# Shows nothing but the lesson, or the whole page again, and tells the server which. Esc presses
# the button, so that there is one way back.
TOGGLE = """() => {
  const large = document.body.classList.toggle("lesson-present");
  const button = document.querySelector("#lesson-present");
  const onKey = (event) => {
    if (!document.body.classList.contains("lesson-present")) {
      document.removeEventListener("keydown", onKey);
    } else if (event.key === "Escape" && !event.defaultPrevented) {
      button.click();
    }
  };
  if (large) document.addEventListener("keydown", onKey);
  button.setAttribute("aria-pressed", large);
  button.focus({ preventScroll: true });
  setTimeout(() => {
    window.dispatchEvent(new Event("resize"));
    if (large) window.scrollTo(0, 0);
    else button.scrollIntoView({ block: "center" });
  }, 60);
  return large;
}"""


@dataclass(frozen=True)
class StepPanel:
    tab: gr.Tab
    words: gr.Markdown
    control: gr.Slider
    figure: gr.Plot | gr.HTML
    numbers: gr.HTML
    question: gr.Radio
    feedback: gr.HTML
    moves: dict[int, gr.Button]  # button to the step of this number, from 1

    @property
    def shown(self) -> list:
        return [self.words, self.figure, self.numbers, self.feedback]


@dataclass(frozen=True)
class LessonPanel:
    layer: gr.Slider
    present: gr.Button
    large: gr.Checkbox  # whether figures are made for a projector
    walk: gr.Tabs
    steps: tuple[StepPanel, ...]


def lesson_panel() -> LessonPanel:
    with gr.Column(elem_id="lesson"):
        with gr.Row(elem_id="lesson-top"):
            with gr.Column(scale=3, min_width=280):
                gr.Markdown(INTRO, elem_id="lesson-intro")
            with gr.Column(scale=2, min_width=240):
                layer = LimitedSlider(
                    0, 1, 0, step=1, precision=0,
                    label="Layer", elem_id="lesson-layer",
                )  # fmt: skip
            present = gr.Button(
                PRESENT, size="sm", scale=0, min_width=130, elem_id="lesson-present"
            )
        with gr.Tabs(selected=1, elem_id="lesson-steps") as walk:
            steps = tuple(_step_panel(number, step) for number, step in enumerate(STEPS, 1))
        large = gr.Checkbox(False, visible="hidden", elem_id="lesson-large")
    return LessonPanel(layer, present, large, walk, steps)


def _step_panel(number: int, step: Step) -> StepPanel:
    def name(part: str) -> str:
        return f"lesson-{step.key}-{part}"

    with gr.Tab(f"{number} · {step.title}", id=number, elem_id=f"lesson-{step.key}") as tab:
        gr.HTML(
            f"<h2>Step {number} of {len(STEPS)} · {step.title}</h2>",
            elem_id=name("where"),
            elem_classes=["lesson-where"],
        )
        with gr.Row(elem_classes=["lesson-body"]):
            with gr.Column(scale=4, min_width=300):
                words = gr.Markdown(
                    "", latex_delimiters=MATHS, elem_id=name("words"),
                    elem_classes=["lesson-words"],
                )  # fmt: skip
                control = LimitedSlider(**step.control, elem_id=name("control"))
                numbers = gr.HTML("", elem_id=name("numbers"), elem_classes=["lesson-numbers"])
            with gr.Column(scale=5, min_width=300):
                if step.plots:
                    figure = gr.Plot(show_label=False, elem_id=name("figure"))
                else:
                    figure = gr.HTML("", elem_id=name("figure"), elem_classes=["lesson-sums"])
        with gr.Column(elem_classes=["lesson-asks"]):
            question = gr.Radio(
                [(text, index) for index, text in enumerate(step.question.answers)],
                value=None, label=step.question.text, elem_id=name("question"),
            )  # fmt: skip
            feedback = gr.HTML("", elem_id=name("feedback"), elem_classes=["lesson-feedback"])
        with gr.Row(elem_classes=["lesson-moves"]):
            moves = {}
            for target, label, kind in _moves(number):
                moves[target] = gr.Button(
                    label, variant=kind, scale=0, min_width=190, elem_id=name(f"to-{target}")
                )
    return StepPanel(tab, words, control, figure, numbers, question, feedback, moves)


def _moves(number: int) -> list[tuple[int, str, str]]:
    """Where the buttons of a step lead, and how they look."""
    titles = [step.title for step in STEPS]
    moves = []
    if number > 1:
        moves.append((number - 1, f"Back: {titles[number - 2]}", "secondary"))
    if number < len(STEPS):
        moves.append((number + 1, f"Next: {titles[number]}", "primary"))
    else:
        moves.append((1, "Again from 1", "secondary"))
    return moves


def wire_lesson(handlers: LessonHandlers, model: gr.State, panel: LessonPanel, tab: gr.Tab) -> None:
    """All steps are shown when the tab is opened, and when model, layer or size of type change;
    a control and a question each answer for their own step."""
    where = [model, panel.layer, panel.large]
    gr.on(
        [tab.select, model.change, panel.layer.change, panel.large.change],
        readable(handlers.show),
        [
            *where,
            *(step.control for step in panel.steps),
            *(step.question for step in panel.steps),
        ],
        [component for step in panel.steps for component in step.shown],
        trigger_mode="always_last",
        **LESSON_QUEUE,
        **QUIET,
    )
    model.change(readable(handlers.another_model), model, panel.layer, **QUIET)
    panel.present.click(
        readable(handlers.present), panel.large, [panel.large, panel.present], js=TOGGLE, **QUIET
    )
    for step, shown in zip(STEPS, panel.steps, strict=True):
        shown.control.change(
            readable(_bound(handlers.view, step)),
            [*where, shown.control],
            [shown.figure, shown.numbers],
            trigger_mode="always_last",
            **LESSON_QUEUE,
            **QUIET,
        )
        shown.question.input(
            readable(_bound(handlers.answer, step)),
            [model, panel.layer, shown.question],
            shown.feedback,
            trigger_mode="always_last",
            **LESSON_QUEUE,
            **QUIET,
        )
        for target, button in shown.moves.items():
            button.click(partial(_go, target), None, panel.walk, **QUIET)
    panel.walk.change(None, js=ARRIVE, **PRIVATE)


def _bound(handler: Any, step: Step) -> Any:
    """The handler of one step, with a name of its own, as logs want it."""

    def call(*values: Any) -> Any:
        return handler(step, *values)

    call.__name__ = f"{handler.__name__}_{step.key}"
    return call


def _go(target: int) -> gr.Tabs:
    return gr.Tabs(selected=target)
