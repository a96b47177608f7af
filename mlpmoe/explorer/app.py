"""build_demo(): the page, its panels put together and their events wired."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.events import Dependency

from ..models import host_allows_any_model, open_page_to
from .api import add_endpoints
from .server.events import IN_TURNS, PRIVATE, QUIET, Together, readable
from .server.first_model import FirstModel
from .server.housekeeping import begin_housekeeping
from .server.looks import Looks
from .server.refusals import refuse_too_few
from .server.workbench import Workbench
from .shell.answer import AnswerHandlers
from .shell.answer_panel import answer_panel, wire_answer
from .shell.components import ModelPanel, PicturesPanel, cards_panel, model_panel, pictures_panel
from .shell.convert_panel import ConvertPanel, convert_panel
from .shell.glossary import WORDS
from .shell.handlers import Handlers
from .shell.links import FIRST_TAB, TABS
from .shell.opening import OpeningHandlers
from .shell.settings import within_reach
from .shell.training import TrainingHandlers
from .shell.training_panel import training_panel
from .tabs.export_panel import export_panel, wire_export
from .tabs.exporting import ExportHandlers
from .tabs.lesson import LessonHandlers
from .tabs.lesson_panel import lesson_panel, wire_lesson
from .tabs.paper import PaperHandlers
from .tabs.paper_panel import wire_paper
from .tabs.suggest import SuggestHandlers
from .tabs.suggest_panel import suggest_panel, wire_suggest
from .tabs.sweep_panel import wire_sweep
from .tabs.sweeping import SweepHandlers
from .tabs.tokens import TokenHandlers
from .tabs.tokens_panel import tokens_panel, wire_tokens
from .tabs.trade_offs import TradeOffHandlers
from .tabs.trade_offs_panel import RunFields, run_fields, trade_offs_panel, wire_trade_offs
from .tabs.weights import WeightsHandlers
from .tabs.weights_panel import WeightsPanel, weights_panel, wire_weights

# After each event Gradio sums up the latest 10,000 for a page that is switched off here; once after
# this many instead.
NEVER = {"GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**12)}
QUEUE_LENGTH = 500  # waiting events of all visitors; more are told that the queue is full
ADDRESS = f"(query, tab, says) => mlpmoe.address(query, tab || '{FIRST_TAB}', '{FIRST_TAB}', says)"
TOLD = ("weights", "lesson", "tokens", "runs", "export")
TELL = f"(...shown) => mlpmoe.tell({json.dumps(TOLD)}, '{FIRST_TAB}', ...shown)"
# Values set from here reach sliders later than other components, and long before this ends.
ARRIVED = "() => new Promise(done => setTimeout(() => done(String(Date.now())), 100))"
FOOTER = """Nothing is trained unless asked for.
Method: [MLPMoE, arXiv 2511.21089](https://arxiv.org/abs/2511.21089).
Perplexity and speed are measured, parameters and compute are counted, on this server."""


@dataclass(frozen=True)
class PageState:
    """What a visitor's page remembers beside its visible controls."""

    model: gr.State  # key of the loaded model; "" until one is, so that the first is a change too
    # The share that K stands for, see `settings.Share`. A component and no gr.State, because the
    # page must send it together with the B and K it belongs to.
    share: gr.Textbox
    arrived: gr.Textbox  # changes once what was set has reached all controls: asks for a preview
    taken: gr.Textbox  # a run, point or link to restore: a query string, see page.js
    query: gr.Textbox  # of the link to the present settings
    tab: gr.Textbox  # key of the open tab
    budget: gr.Textbox  # that the visitor has set last, in per cent, and when: see page.js
    told: dict[str, gr.Textbox]  # by tab: changes with what it shows, while it is open: see tabs.js
    linked: gr.State  # the result of a training that a link names: `Linked`, or None
    mine: gr.State  # the runs that the browser keeps, as records


def _page_state() -> PageState:
    fields = (
        gr.Textbox("", visible="hidden", elem_id=name)
        for name in ("share-kept", "arrived", "taken", "query", "open-tab", "budget-asked")
    )
    told = {key: gr.Textbox("", visible="hidden", elem_id=f"told-{key}") for key in TOLD}
    return PageState(gr.State(""), *fields, told, gr.State(None), gr.State([]))


def build_demo(workbench: Workbench | None = None) -> gr.Blocks:
    """The page over a workbench. Its first model is loaded meanwhile, see `FirstModel`."""
    os.environ.update(NEVER)
    shared = os.environ.get("GRADIO_SHARE", "").lower() == "true"
    open_page_to(os.environ.get("GRADIO_SERVER_NAME"), shared)
    workbench = workbench or Workbench()
    begin_housekeeping()
    first = FirstModel(workbench)
    first.start()
    with gr.Blocks(
        title="mlpmoe", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as demo:
        state, fields = _page_state(), run_fields()
        picker = model_panel(host_allows_any_model())
        sentence = gr.HTML("", elem_id="sentence")
        with gr.Row(elem_id="instrument"):
            with gr.Column(scale=1, min_width=290, elem_id="controls"):
                convert = convert_panel()
            with gr.Column(scale=4, min_width=320, elem_id="front"):
                pictures = pictures_panel()
                cards = cards_panel()
                training = training_panel()
                answer = answer_panel()
        with gr.Tabs(elem_id="tabs") as tabs:
            opened = {key: gr.Tab(name, id=key) for key, name in TABS.items()}
            with opened["weights"]:
                weights = weights_panel()
            with opened["tokens"]:
                tokens = tokens_panel()
            with opened["runs"]:
                trade_offs = trade_offs_panel()
            with opened["suggest"]:
                suggestions = suggest_panel()
            with opened["lesson"]:
                lesson = lesson_panel()
            with opened["export"]:
                export = export_panel()
        with gr.Accordion("Glossary", open=False, elem_id="words"):
            gr.Markdown(WORDS)
        gr.Markdown(FOOTER, elem_id="footer")
        add_endpoints(workbench)  # first, since a listener's name would be taken from them
        looks, another_model = Looks(), Together()
        handlers, model = Handlers(workbench, looks), state.model
        spec = [model, *convert.settings]
        shown = [
            cards.perplexity, cards.nonzero, cards.compute, cards.speed, sentence, pictures.curve,
            pictures.network,
        ]  # fmt: skip
        _wire_opening(demo, OpeningHandlers(workbench, first), state, picker, convert, tabs)
        _wire_address(state, picker, convert, training.says, opened)
        _wire_tabs(state, fields, weights.layer, lesson.layer)
        changed = _wire_preview(handlers, state, convert, pictures, weights, spec, shown)
        trained = [convert.training_note, training.says, training.curve]
        measured = _wire_measurement(
            handlers, state, convert, pictures, weights, spec,
            [*shown, *trained, fields.measured], changed,
        )  # fmt: skip
        # the card of compute has its figure as soon as the training is done
        after = [changed.then, cards.compute.change, *(event.then for event in measured)]
        _wire_training(TrainingHandlers(workbench), [*spec, state.linked], trained, after)
        _wire_pictures(handlers, state, convert, pictures, weights, spec, tabs)
        another_model.add(handlers.another_model, [model], [pictures.network])
        wire_answer(
            AnswerHandlers(workbench, looks), answer, model, spec, convert.text, weights.layer,
            pictures.network, [changed.success, measured[1].success], another_model,
        )  # fmt: skip
        wire_weights(
            WeightsHandlers(workbench), weights, model, spec, state.told["weights"],
            opened["weights"], another_model,
        )  # fmt: skip
        wire_suggest(
            SuggestHandlers(workbench), model, suggestions, opened["suggest"], state.taken,
            fields.measured, another_model,
        )  # fmt: skip
        wire_trade_offs(
            TradeOffHandlers(workbench), model, convert.text, trade_offs, state.told["runs"],
            opened["runs"], fields, state.mine, another_model,
        )  # fmt: skip
        wire_sweep(
            SweepHandlers(workbench), model, convert.text, fields.stored, fields.measured,
            trade_offs.sweep, state.told["runs"],
        )  # fmt: skip
        wire_paper(PaperHandlers(workbench), model, trade_offs.paper, state.told["runs"])
        wire_tokens(
            TokenHandlers(workbench), model, spec, convert.text, tokens, state.told["tokens"],
            opened["tokens"], another_model,
        )  # fmt: skip
        wire_lesson(
            LessonHandlers(workbench), lesson, model, convert, state.query, sentence,
            state.told["lesson"], opened["lesson"], another_model,
        )  # fmt: skip
        wire_export(
            ExportHandlers(workbench), export, model, convert.text, convert.settings,
            state.told["export"], state.taken, demo,
        )  # fmt: skip
        another_model.on(model.change)
    _report_progress_on(demo, picker.title)
    refuse_too_few(demo)
    return demo.queue(max_size=QUEUE_LENGTH, api_open=False)


def _report_progress_on(demo: gr.Blocks, component: gr.HTML) -> None:
    """Let hidden progress be reported to one component instead of to every output.

    At each message of any event, Gradio's page tells all components that ever had some progress of
    their state, and looks for each through the whole tree: that took 0.7 s of every step of a
    slider. The first component of the page is found at once.
    """
    for fn in demo.fns.values():
        if fn.show_progress == "hidden":
            fn.show_progress_on = [component]


def _wire_opening(
    demo: gr.Blocks, handlers: OpeningHandlers, state: PageState, picker: ModelPanel,
    convert: ConvertPanel, tabs: gr.Tabs,
) -> None:  # fmt: skip
    """What sets the controls: the link, a run that is restored, a preset, a loaded model."""
    controls = [*convert.settings[:-1], state.share]
    texts = [convert.text, convert.calibration]
    shown = [picker.status, state.model, picker.note]
    restored = [picker.name, *texts, *controls, tabs, state.linked]
    asked = [state.model, convert.branches, convert.keep, *texts]
    loads = [*shown, convert.branches, convert.keep, state.share, *texts]
    loading = {**IN_TURNS, **QUIET}
    opened = demo.load(
        readable(handlers.open_link), None, [state.taken, *shown, *restored],
        concurrency_limit=None,  # visitors wait for the same model
        **QUIET,
    )  # fmt: skip
    opened.then(None, js="() => mlpmoe.show()", **PRIVATE)
    convert.preset.input(
        readable(handlers.choose_preset),
        [state.model, convert.preset, *convert.settings],
        controls,
        trigger_mode="always_last",
        **QUIET,
    )
    convert.method.change(
        readable(handlers.choose_method),
        [state.model, *convert.settings, state.share, convert.budget],
        [
            convert.method, *convert.static, *convert.routed, convert.selection, convert.experts,
            convert.shared, convert.own_share, convert.router, convert.keep, convert.active,
        ],
        **QUIET,
    )  # fmt: skip
    convert.own_share.change(
        lambda own: gr.update(interactive=not own), convert.own_share, convert.shared, **QUIET
    )
    by_name = picker.load.click(
        readable(handlers.load), [picker.name, *asked], loads, trigger_mode="once",
        **loading,
    )  # fmt: skip
    by_run = state.taken.change(
        readable(handlers.load_taken), [state.taken, *asked], loads,
        **loading,
    )  # fmt: skip
    by_run = by_run.success(
        readable(handlers.restore_taken), [state.taken, state.model], restored,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    for loaded in (by_name, by_run):
        loaded.failure(
            readable(handlers.load_failed), state.model,
            [picker.name, picker.status, state.share], **QUIET,
        )  # fmt: skip
    for done in (opened, by_name, by_run):
        done.then(None, None, state.arrived, js=ARRIVED, **PRIVATE)
    convert.use_calibration.click(
        readable(handlers.use_calibration), convert.own_text, convert.calibration, **QUIET
    )
    convert.use_text.click(readable(handlers.use_text), convert.own_text, convert.text, **QUIET)
    uploaded = convert.own_file.upload(
        readable(handlers.use_file), convert.own_file, convert.text, **QUIET
    )
    uploaded.failure(lambda: None, None, convert.own_file, **QUIET)


def _wire_address(
    state: PageState, picker: ModelPanel, convert: ConvertPanel, trained: gr.HTML,
    tabs: dict[str, gr.Tab],
) -> None:  # fmt: skip
    """The address follows the settings and the open tab; undo and redo go through what it was. The
    link names the result of a training, too."""
    for key, tab in tabs.items():
        tab.select(None, None, state.tab, js=f"() => '{key}'", **PRIVATE)
    gr.on(
        [state.query.change, state.tab.change, trained.change], None,
        [state.query, state.tab, trained], convert.link, js=ADDRESS, **PRIVATE,
    )  # fmt: skip
    picker.undo.click(None, js="() => mlpmoe.step(-1)", **PRIVATE)
    picker.redo.click(None, js="() => mlpmoe.step(1)", **PRIVATE)


def _wire_tabs(state: PageState, fields: RunFields, *layers: gr.Slider) -> None:
    """A tab is told while it is open. layers: of the weights, and of the lesson."""
    shown = [state.tab, state.query, fields.measured, fields.stored, *layers]
    told = [*state.told.values()]
    gr.on([each.change for each in shown], None, [*shown, *told], told, js=TELL, **PRIVATE)


def _wire_preview(
    handlers: Handlers, state: PageState, convert: ConvertPanel, pictures: PicturesPanel,
    weights: WeightsPanel, spec: list, shown: list,
) -> Dependency:  # fmt: skip
    """Every change shows its structure at once. `change`, not `release`: the keyboard counts."""
    choices = [convert.fade_unit, convert.fade_schedule]
    gr.on(
        [choice.change for choice in choices], within_reach, choices,
        [convert.fade, convert.fade_exponent], **QUIET,
    )  # fmt: skip
    state.budget.change(
        readable(handlers.budget), [*spec, state.budget], [convert.keep, convert.active],
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    return gr.on(
        [component.change for component in (state.arrived, *spec[1:], convert.text)],
        readable(handlers.preview),
        [
            *spec, convert.text, pictures.axis, state.mine, weights.layer, state.share,
            convert.budget,
        ],
        [
            convert.branches, convert.fade, convert.keep, state.share, convert.shared,
            convert.recover, convert.budget, convert.preset, state.query, convert.snippet,
            pictures.axis,
            state.arrived, *shown,
        ],
        trigger_mode="always_last",
        # One after the other: setting several controls at once asks for several previews, and an
        # older one that took longer would end up on the page.
        concurrency_limit=1,
        **QUIET,
    )  # fmt: skip


def _wire_measurement(
    handlers: Handlers, state: PageState, convert: ConvertPanel, pictures: PicturesPanel,
    weights: WeightsPanel, spec: list, shown: list, changed: Dependency,
) -> tuple[Dependency, Dependency]:  # fmt: skip
    """Perplexity and speed, as they sharpen by themselves; to the end on the button."""
    inputs = [*spec, convert.text, pictures.axis, state.mine, weights.layer]
    by_itself = changed.success(
        readable(handlers.measure_live), inputs, shown,
        trigger_mode="multiple", **IN_TURNS, **QUIET,
    )  # fmt: skip
    on_button = convert.measure.click(
        readable(handlers.measure), inputs, shown, trigger_mode="once", **IN_TURNS, **QUIET
    )
    convert.stop.click(readable(handlers.stop_measuring), inputs, shown, **QUIET)
    for measured in (by_itself, on_button):
        measured.failure(readable(handlers.measuring_failed), inputs, shown, **QUIET)
    return by_itself, on_button


def _wire_training(
    handlers: TrainingHandlers, inputs: list, shown: list, after: Sequence[Callable]
) -> None:
    """How long training takes, and what it did once it is done."""
    for event in after:
        event(readable(handlers.show), inputs, shown, trigger_mode="always_last", **QUIET)


def _wire_pictures(
    handlers: Handlers, state: PageState, convert: ConvertPanel, pictures: PicturesPanel,
    weights: WeightsPanel, spec: list, tabs: gr.Tabs,
) -> None:  # fmt: skip
    """A click in the network looks at a layer or spares it; the axis of the curve is a choice."""
    gr.on(
        [pictures.axis.input, weights.layer.change, state.mine.change],
        readable(handlers.look),
        [*spec, convert.text, pictures.axis, state.mine, weights.layer],
        [pictures.curve, pictures.network],
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    pictures.network.click(
        readable(handlers.picked), convert.spared, [weights.layer, convert.spared, tabs],
        trigger_mode="multiple", **QUIET,
    )  # fmt: skip
