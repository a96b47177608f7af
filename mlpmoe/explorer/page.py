"""build_demo(): the page, its panels put together and their events wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import Dependency

from ..core.spec import ConversionSpec
from ..models import assets_folder, host_allows_any_model
from ..models.catalogue import DEMO_KEY
from .components import (
    BranchesPanel,
    CardsPanel,
    GenerationsPanel,
    LessonPanel,
    ModelPanel,
    branches_panel,
    cards_panel,
    generations_panel,
    lesson_panel,
    model_panel,
)
from .convert_panel import ConvertPanel, convert_panel
from .endpoints import MODEL_QUEUE, add_endpoints
from .experts import ExpertHandlers
from .experts_panel import ExpertsPanel, experts_panel
from .handlers import Handlers, readable
from .style import CSS_VARIABLES
from .suggest import SuggestHandlers
from .suggest_panel import SuggestPanel, suggest_panel
from .workbench import Workbench

QUEUE_LENGTH = 32  # waiting events; more are told that the queue is full
PRIVATE = {"api_visibility": "private"}
QUIET = {**PRIVATE, "show_progress": "hidden"}
RESIZE = "() => { setTimeout(() => window.dispatchEvent(new Event('resize')), 50) }"
# gr.Plot knows no clicks: the spec of a clicked point goes into a hidden text field
CLICKS = """() => setTimeout(() => {
    const plot = document.querySelector('#front .js-plotly-plot');
    const field = document.querySelector('#front-clicked textarea, #front-clicked input');
    if (!plot || !plot.on || !field || plot.heard) return;
    plot.heard = true;
    plot.on('plotly_click', event => {
        const spec = event.points.map(point => point.customdata).find(Boolean);
        if (!spec) return;
        field.value = spec + ' ' + Date.now();  // a second click on the same counts too
        field.dispatchEvent(new Event('input'));
    });
}, 300)"""
HEADER = """# mlpmoe
Cut the MLPs of a language model into branches, zero or drop some, and see what that costs and \
what it saves. Nothing is trained."""
FOOTER = """Method: [MLPMoE, arXiv 2511.21089](https://arxiv.org/abs/2511.21089). \
Perplexity and speed are measured, parameters and compute are counted, on this server."""
WORDS = """
* **Perplexity**: among how many tokens the model hesitates, on average. Lower is better.
* **Bits per byte**: how many bits the model needs to guess one byte of the text. Lower is better.
* **MLP**: the part of each layer that treats every token by itself. It has two or three matrices: \
**gate** and **up** compute the neurons, **down** adds up what they say.
* **d_model, d_ff**: numbers a token is made of between layers; neurons of one MLP.
* **Branch**: a group of neurons. Each branch has a factor **α**, 1 at first.
* **Compensation**: what makes up for the dropped branches; as published the factor √(B/K) on \
those that are kept.
* **Calibration text**: text that a recipe may look at before it cuts. It is never the text that \
perplexity is measured on.
* **Down refitted**: down is computed anew, by least squares, so that the neurons that stay say \
as nearly as possible what all said.
* **Wanda, SparseGPT, FLAP**: published ways to choose what to remove by looking at activations.
* **Squared weights**: the share of the sum of w², in which large weights count more.
* **Proxy mixture**: a short artificial text, as in the paper; it shows whether a model \
broke, not which one is better."""


@dataclass(frozen=True)
class PageState:
    """What a visitor's page remembers beside its visible controls."""

    model: gr.State  # key of the loaded model
    # B at the last preview: tells whether K meant "all". A component and no gr.State, because the
    # page must send it together with the B and K it belongs to.
    branches_before: gr.Number
    opened: gr.State  # turns true once the page is open, which asks for the first preview


def launch_kwargs() -> dict[str, Any]:
    """What every launch of the page passes, so that tests and hosts serve the same one."""
    return {
        "theme": _theme(),
        "css": CSS_VARIABLES,
        "css_paths": [assets_folder() / "page.css"],
        "footer_links": ["api", "settings"],
        "enable_monitoring": False,
        "max_file_size": "1mb",
        "strict_cors": True,
    }


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own system, and secondary text that stays readable on a projector."""
    subdued = {"body_text_color_subdued": "#565b63", "block_info_text_color": "#565b63"}
    subdued |= {f"{name}_dark": "#b6bbc4" for name in list(subdued)}
    return gr.themes.Default(
        primary_hue=gr.themes.colors.slate,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**subdued)


def build_demo(workbench: Workbench | None = None) -> gr.Blocks:
    """The page over a workbench. The demo model is loaded now, so that no visitor waits for it."""
    workbench = workbench or Workbench()
    first = workbench.loaded(DEMO_KEY)
    with gr.Blocks(title="mlpmoe", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(HEADER, elem_id="header")
        before = gr.Number(ConversionSpec().branches, precision=0, visible="hidden")
        state = PageState(gr.State(DEMO_KEY), before, gr.State(False))
        picker = model_panel(host_allows_any_model())
        with gr.Row():
            with gr.Column(scale=1, min_width=310, elem_id="controls"):
                convert = convert_panel()
            with gr.Column(scale=4, min_width=320):
                cards = cards_panel()
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Branches", id="branches") as branches_tab:
                        branches = branches_panel(len(first.mlps), first.projections)
                    with gr.Tab("Generations", id="generations"):
                        generations = generations_panel()
                    with gr.Tab("Suggest", id="suggest") as suggest_tab:
                        suggestions = suggest_panel()
                    with gr.Tab("Experts", id="experts") as experts_tab:
                        experts = experts_panel(len(first.mlps))
                    with gr.Tab("How it works", id="how"):
                        lesson = lesson_panel()
        with gr.Accordion("Words", open=False, elem_id="words"):
            gr.Markdown(WORDS)
        gr.Markdown(FOOTER, elem_id="footer")
        add_endpoints(workbench)  # first, since a listener's name would be taken from them
        handlers = Handlers(workbench)
        spec = [state.model, *convert.settings]
        _wire_choices(demo, handlers, state, picker, convert, branches)
        changed = _wire_preview(handlers, state, convert, cards, branches, lesson, spec)
        _wire_measurement(handlers, convert, cards, branches, spec, changed)
        _wire_generations(handlers, generations, spec)
        _wire_experts(ExpertHandlers(workbench), state, experts, experts_tab)
        _wire_suggest(SuggestHandlers(workbench), state, suggestions, suggest_tab, convert)
        # A plot that was redrawn while its tab was hidden had no width to fit into.
        branches_tab.select(None, js=RESIZE, **PRIVATE)
    return demo.queue(max_size=QUEUE_LENGTH, api_open=False)


def _wire_choices(
    demo: gr.Blocks, handlers: Handlers, state: PageState, picker: ModelPanel,
    convert: ConvertPanel, branches: BranchesPanel,
) -> None:  # fmt: skip
    """What sets the controls: the link, a preset, a loaded model."""
    spec_outputs = [*convert.settings, state.branches_before]
    demo.load(
        readable(handlers.open_link),
        None,
        [state.opened, picker.name, picker.status, *spec_outputs],
        **QUIET,
    )
    convert.preset.input(
        readable(handlers.choose_preset), [state.model, convert.preset], spec_outputs, **QUIET
    )
    loaded = picker.load.click(
        readable(handlers.load),
        [picker.name, convert.branches],
        [picker.status, state.model, convert.branches, branches.layer, branches.projection],
        trigger_mode="once",
        concurrency_id="load",
        **QUIET,
    )
    loaded.failure(readable(handlers.load_failed), state.model, picker.status, **QUIET)


def _wire_preview(
    handlers: Handlers, state: PageState, convert: ConvertPanel, cards: CardsPanel,
    branches: BranchesPanel, lesson: LessonPanel, spec: list,
) -> Dependency:  # fmt: skip
    """Every change shows its structure at once. `change`, not `release`: the keyboard counts."""
    views = [branches.layer, branches.projection, branches.quantity]
    changed = gr.on(
        [component.change for component in (state.opened, *spec, convert.text, *views)],
        readable(handlers.preview),
        [*spec, convert.text, *views, state.branches_before],
        [
            convert.keep, state.branches_before, convert.preset, convert.snippet, convert.fade,
            convert.fade_exponent, *_shown(cards, branches),
        ],
        trigger_mode="always_last",
        # One after the other: setting several controls at once asks for several previews, and an
        # older one that took longer would end up on the page.
        concurrency_limit=1,
        **QUIET,
    )  # fmt: skip
    changed.then(
        readable(handlers.lesson),
        [*spec, branches.layer],
        [lesson.strip, lesson.split, lesson.fade, lesson.keep],
        concurrency_limit=1,
        **QUIET,
    )
    return changed


def _shown(cards: CardsPanel, branches: BranchesPanel) -> list:
    """What a measurement fills in."""
    return [
        cards.perplexity, cards.speed, cards.nonzero, cards.compute, branches.histograms,
        branches.heat,
    ]  # fmt: skip


def _wire_measurement(
    handlers: Handlers, convert: ConvertPanel, cards: CardsPanel, branches: BranchesPanel,
    spec: list, changed: Dependency,
) -> None:  # fmt: skip
    """Perplexity and speed: by themselves when quick, else on the button."""
    views = [branches.layer, branches.projection, branches.quantity]
    inputs, outputs = [*spec, convert.text, *views], _shown(cards, branches)
    by_itself = changed.then(
        readable(handlers.measure_if_quick), inputs, outputs,
        trigger_mode="multiple", **MODEL_QUEUE, **QUIET,
    )  # fmt: skip
    on_button = convert.measure.click(
        readable(handlers.measure), inputs, outputs, trigger_mode="once", **MODEL_QUEUE, **QUIET
    )
    convert.stop.click(
        readable(handlers.stop_measuring), inputs, outputs, cancels=[by_itself, on_button], **QUIET
    )


def _wire_generations(handlers: Handlers, generations: GenerationsPanel, spec: list) -> None:
    writing = gr.on(
        [generations.write.click, generations.prompt.submit],
        readable(handlers.write),
        [*spec, generations.prompt, generations.tokens, generations.temperature],
        [generations.dense, generations.converted, generations.report],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )
    generations.stop.click(
        lambda: "<p>Stopped.</p>", None, generations.report, cancels=[writing], **QUIET
    )


def _wire_experts(
    handlers: ExpertHandlers, state: PageState, panel: ExpertsPanel, tab: gr.Tab
) -> None:
    """The tab of routed experts: its settings, and what is measured on its buttons."""
    settings = [state.model, *panel.settings]
    described = [panel.about, panel.snippet, panel.experts, panel.tradeoff]
    gr.on(
        [tab.select, *(component.change for component in settings)],
        readable(handlers.describe),
        settings,
        described,
        trigger_mode="always_last",
        concurrency_limit=1,
        **QUIET,
    )
    state.model.change(
        readable(handlers.another_model), state.model, [panel.result, panel.details, panel.layer],
        **QUIET,
    )  # fmt: skip
    panel.own_file.upload(
        readable(handlers.read_file), panel.own_file, [panel.own_text, panel.calibration], **QUIET
    )
    measured = panel.measure.click(
        readable(handlers.measure),
        [state.model, panel.layer, *panel.settings],
        [
            panel.status, panel.result, panel.tradeoff, panel.details, panel.load, panel.split,
            panel.variation, panel.tokens,
        ],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )  # fmt: skip
    static = panel.static.click(
        readable(handlers.measure_static),
        [state.model, panel.active],
        [panel.status, panel.tradeoff],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )
    panel.stop.click(
        lambda: "<p>Stopped.</p>", None, panel.status, cancels=[measured, static], **QUIET
    )
    panel.layer.change(
        readable(handlers.recolour),
        [state.model, panel.layer, *panel.settings],
        panel.tokens,
        trigger_mode="always_last",
        **QUIET,
    )


def _wire_suggest(
    handlers: SuggestHandlers, state: PageState, panel: SuggestPanel, tab: gr.Tab,
    convert: ConvertPanel,
) -> None:  # fmt: skip
    """The tab that searches for a recipe: the search on its buttons, and rows that are taken."""
    results = [panel.status, panel.sentence, panel.plot, panel.table, panel.specs]
    panel.goal.input(
        readable(handlers.choose_goal), panel.goal, [panel.share, panel.increase], **QUIET
    )
    state.model.change(readable(handlers.another_model), None, results, **QUIET)
    panel.suggest.click(
        readable(handlers.suggest),
        [state.model, *panel.settings],
        results,
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )
    panel.stop.click(readable(handlers.stop), None, panel.status, **QUIET)
    taken = [*convert.settings, state.branches_before]
    panel.table.select(readable(handlers.take), [state.model, panel.specs], taken, **QUIET)
    panel.plot.change(None, js=CLICKS, **PRIVATE)
    panel.clicked.change(readable(handlers.take_spec), [state.model, panel.clicked], taken, **QUIET)
    tab.select(None, js=RESIZE, **PRIVATE)
