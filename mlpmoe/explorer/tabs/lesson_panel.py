"""The tab Lesson: its components, and how they are wired."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..server.events import PRIVATE, QUIET, Together, readable
from ..shell.inputs import LimitedSlider
from .lesson import PRESENT
from .lesson_steps import STEPS, Step

if TYPE_CHECKING:
    from ..shell.convert_panel import ConvertPanel
    from .lesson import LessonHandlers

MATHS = [{"left": "$$", "right": "$$", "display": True}]
INTRO = (
    "One MLP of this model, cut, thinned and routed, and then a little training: six steps. Each "
    "also moves the controls at the top of the page, which show what it costs the whole model."
)
TURN = "Your turn"
TITLES = (*(step.title for step in STEPS), TURN)
LOOKS = [("This step", "step"), ("Curve", "curve"), ("Network", "network")]
# one after the other: sliders that are dragged ask faster than a slow model answers
LESSON_QUEUE = {"concurrency_id": "lesson", "concurrency_limit": 1}


@dataclass(frozen=True)
class StepPanel:
    tab: gr.Tab
    words: gr.Markdown
    control: gr.Slider
    figure: gr.Plot | gr.HTML
    numbers: gr.HTML
    question: gr.Radio
    feedback: gr.HTML
    ask: gr.Button  # shows the question, where it has no place of its own
    plan: gr.Textbox  # the same for the whole model, as a link: see lesson.js
    moves: dict[int, gr.Button]  # button to the step of this number, from 1

    @property
    def shown(self) -> list:
        return [self.words, self.figure, self.numbers, self.feedback, self.plan]


@dataclass(frozen=True)
class TurnPanel:
    tab: gr.Tab
    words: gr.Markdown
    published: gr.Button
    best: gr.Button
    check: gr.Button
    verdict: gr.HTML
    back: gr.Button
    moves: dict[int, gr.Button]


@dataclass(frozen=True)
class LessonPanel:
    layer: gr.Slider
    back: gr.Button
    look: gr.Radio  # what is shown beside a step on a projector
    present: gr.Button
    large: gr.Checkbox  # whether figures are made for a projector
    whole: gr.HTML  # what the settings cost the whole model
    start: gr.Textbox  # settings to start from, as a link and the time
    walk: gr.Tabs
    steps: tuple[StepPanel, ...]
    turn: TurnPanel


def lesson_panel() -> LessonPanel:
    with gr.Column(elem_id="lesson"):
        with gr.Row(elem_id="lesson-top"):
            with gr.Column(scale=3, min_width=280):
                gr.Markdown(INTRO, elem_id="lesson-intro")
            with gr.Column(scale=2, min_width=240):
                layer = LimitedSlider(
                    0, 1, 0, step=1, precision=0,
                    label="Layer of this MLP", elem_id="lesson-layer",
                )  # fmt: skip
            look = gr.Radio(
                LOOKS, value="step", label="Beside the words", container=False,
                elem_id="lesson-look",
            )  # fmt: skip
            with gr.Column(scale=0, min_width=170, elem_id="lesson-buttons"):
                present = gr.Button(PRESENT, size="sm", elem_id="lesson-present")
                back = gr.Button("Back to my settings", size="sm", elem_id="lesson-back")
        whole = gr.HTML("<p></p>", elem_id="lesson-whole")
        with gr.Tabs(selected=1, elem_id="lesson-steps") as walk:
            steps = tuple(_step_panel(number, step) for number, step in enumerate(STEPS, 1))
            turn = _turn_panel(len(TITLES))
        large = gr.Checkbox(False, visible="hidden", elem_id="lesson-large")
        start = gr.Textbox("", visible="hidden", elem_id="lesson-start")
    return LessonPanel(layer, back, look, present, large, whole, start, walk, steps, turn)


def _name(key: str, part: str) -> str:
    return f"lesson-{key}-{part}"


def _where(key: str, number: int) -> None:
    """The heading of a step."""
    gr.HTML(
        f"<h2>Step {number} of {len(TITLES)} · {TITLES[number - 1]}</h2>",
        elem_id=_name(key, "where"), elem_classes=["lesson-where"],
    )  # fmt: skip


def _step_panel(number: int, step: Step) -> StepPanel:
    name = partial(_name, step.key)
    with gr.Tab(f"{number} · {step.title}", id=number, elem_id=f"lesson-{step.key}") as tab:
        _where(step.key, number)
        with gr.Row(elem_classes=["lesson-body"]):
            with gr.Column(scale=4, min_width=300, elem_classes=["lesson-says"]):
                words = gr.Markdown(
                    "", latex_delimiters=MATHS, elem_id=name("words"),
                    elem_classes=["lesson-words"],
                )  # fmt: skip
                control = LimitedSlider(**step.control, elem_id=name("control"))
                numbers = gr.HTML("", elem_id=name("numbers"), elem_classes=["lesson-numbers"])
                with gr.Column(elem_classes=["lesson-asks"]):
                    question = gr.Radio(
                        [(text, index) for index, text in enumerate(step.question.answers)],
                        value=None, label=step.question.text, elem_id=name("question"),
                    )  # fmt: skip
                    feedback = gr.HTML(
                        "", elem_id=name("feedback"), elem_classes=["lesson-feedback"]
                    )
            with gr.Column(scale=5, min_width=300, elem_classes=["lesson-figure"]):
                if step.plots:
                    figure = gr.Plot(show_label=False, elem_id=name("figure"))
                else:
                    figure = gr.HTML("", elem_id=name("figure"))
        with gr.Row(elem_classes=["lesson-moves"]):
            moves = _move_buttons(step.key, number)
            ask = gr.Button("Question", min_width=120, scale=0, elem_classes=["lesson-ask"])
        plan = gr.Textbox("", visible="hidden", elem_id=name("plan"))
    return StepPanel(tab, words, control, figure, numbers, question, feedback, ask, plan, moves)


def _turn_panel(number: int) -> TurnPanel:
    name = partial(_name, "turn")
    with gr.Tab(f"{number} · {TURN}", id=number, elem_id="lesson-turn") as tab:
        _where("turn", number)
        with gr.Column(elem_classes=["lesson-says"]):
            words = gr.Markdown("", elem_id=name("words"), elem_classes=["lesson-words"])
            with gr.Row(elem_id=name("starts")):
                published = gr.Button("Published: K = 12", min_width=120, elem_id=name("published"))
                best = gr.Button("Best known at 75 %", min_width=120, elem_id=name("best"))
            with gr.Row(elem_id=name("ends")):
                check = gr.Button(
                    "Check my setting", variant="primary", min_width=120, elem_id=name("check")
                )
                back = gr.Button("Back to my settings", min_width=120, elem_id=name("back"))
            verdict = gr.HTML("", elem_id=name("verdict"), elem_classes=["lesson-feedback"])
        with gr.Row(elem_classes=["lesson-moves"]):
            moves = _move_buttons("turn", number)
    return TurnPanel(tab, words, published, best, check, verdict, back, moves)


def _move_buttons(key: str, number: int) -> dict[int, gr.Button]:
    """Where the buttons of a step lead."""
    led = []
    if number > 1:
        led.append((number - 1, f"Back: {TITLES[number - 2]}", "secondary"))
    if number < len(TITLES):
        led.append((number + 1, f"Next: {TITLES[number]}", "primary"))
    return {
        target: gr.Button(
            label, variant=kind, scale=0, min_width=170, elem_id=_name(key, f"to-{target}"),
            elem_classes=["lesson-next" if target > number else "lesson-previous"],
        )
        for target, label, kind in led
    }  # fmt: skip


def wire_lesson(
    handlers: LessonHandlers, panel: LessonPanel, model: gr.State, convert: ConvertPanel,
    query: gr.Textbox, sentence: gr.HTML, told: gr.Textbox, tab: gr.Tab, another_model: Together,
) -> None:  # fmt: skip
    """All steps are shown when the tab is opened, and when model, layer or size of type change;
    a control and a question each answer for their own step. convert, query, sentence: the page's
    own controls, their settings as a link, and what is said of them. told: changes with model and
    layer, while the tab is open."""
    where = [model, panel.layer, panel.large]
    queued = {"trigger_mode": "always_last", **LESSON_QUEUE, **QUIET}
    gr.on(
        [told.change, panel.large.change],
        readable(handlers.show),
        [
            *where,
            *(step.control for step in panel.steps),
            *(step.question for step in panel.steps),
        ],
        [component for step in panel.steps for component in step.shown],
        **queued,
    )
    another_model.add(handlers.another_model, [model], [panel.layer, panel.turn.words])
    for step, shown in zip(STEPS, panel.steps, strict=True):
        asks = [*where, shown.control, shown.question]
        seen = [shown.figure, shown.numbers, shown.plan]
        shown.control.change(readable(_bound(handlers.view, step)), asks, seen, **queued)
        shown.question.input(
            readable(_bound(handlers.answer, step)), asks, [*seen, shown.feedback], **queued
        )
        shown.ask.click(None, js="() => mlpmoe.lesson.ask()", **PRIVATE)
        shown.plan.change(None, js=f"() => mlpmoe.lesson.planned('{step.key}')", **PRIVATE)
    keys = (*(step.key for step in STEPS), "turn")
    for key, shown in zip(keys, (*panel.steps, panel.turn), strict=True):
        shown.tab.select(None, js=f"() => mlpmoe.lesson.arrive('{key}')", **PRIVATE)
        for target, button in shown.moves.items():
            button.click(partial(_go, target), None, panel.walk, **QUIET)
    _wire_turn(handlers, panel, model, convert, query)
    _wire_whole_page(handlers, panel, sentence, tab)


def _wire_turn(
    handlers: LessonHandlers, panel: LessonPanel, model: gr.State, convert: ConvertPanel,
    query: gr.Textbox,
) -> None:  # fmt: skip
    """Where to start from, and whether the page's settings meet the challenge."""
    turn = panel.turn
    turn.published.click(readable(handlers.start_published), model, panel.start, **QUIET)
    turn.best.click(readable(handlers.start_well), model, panel.start, **QUIET)
    panel.start.change(
        None, panel.start, js="start => mlpmoe.lesson.move(start.split(' ')[0])", **PRIVATE
    )
    turn.check.click(
        readable(handlers.check), [model, *convert.settings, convert.text], turn.verdict, **QUIET
    )
    query.change(None, None, turn.verdict, js="() => ''", **PRIVATE)  # it was about others
    turn.back.click(None, js="() => mlpmoe.lesson.back()", **PRIVATE)


def _wire_whole_page(
    handlers: LessonHandlers, panel: LessonPanel, sentence: gr.HTML, tab: gr.Tab
) -> None:
    """What is said of the page's settings is said here too; what they were comes back; and the
    lesson alone fills the window."""
    sentence.change(
        None, sentence, panel.whole, js="words => mlpmoe.lesson.whole(words)", **PRIVATE
    )
    tab.select(None, js="() => mlpmoe.lesson.begin()", **PRIVATE)
    panel.back.click(None, js="() => mlpmoe.lesson.back()", **PRIVATE)
    panel.look.input(None, panel.look, js="look => mlpmoe.lesson.look(look)", **PRIVATE)
    panel.present.click(
        readable(handlers.present), panel.large, [panel.large, panel.present],
        js="() => mlpmoe.lesson.present()", **QUIET,
    )  # fmt: skip


def _bound(handler: Any, step: Step) -> Any:
    """The handler of one step, with a name of its own, as logs want it."""

    def call(*values: Any) -> Any:
        return handler(step, *values)

    call.__name__ = f"{handler.__name__}_{step.key}"
    return call


def _go(target: int) -> gr.Tabs:
    return gr.Tabs(selected=target)
