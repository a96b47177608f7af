"""The tab of routed experts: its components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ..core.choices import SELECTIONS
from ..core.compensation import FILLS
from ..core.registry import choices
from ..core.routed import ROUTED_METHODS
from ..core.routed.routers import ROUTERS
from .events import MODEL_QUEUE, QUIET, readable
from .expert_settings import DEFAULT_SHARED, MAX_EXPERTS, OWN
from .sliders import LimitedSlider

if TYPE_CHECKING:
    from .experts import ExpertHandlers

EMPTY = "<p>Choose a method and press <strong>Convert and measure</strong>.</p>"
MAX_CALIBRATION = 1_000_000  # characters


@dataclass(frozen=True)
class ExpertsPanel:
    method: gr.Dropdown
    about: gr.Markdown
    active: gr.Slider
    experts: gr.Slider
    shared: gr.Slider
    own_share: gr.Checkbox
    router: gr.Dropdown
    selection: gr.Radio
    fill: gr.Radio
    calibration: gr.Radio
    own_text: gr.Textbox
    own_file: gr.File
    measure: gr.Button
    stop: gr.Button
    static: gr.Button
    status: gr.HTML
    result: gr.HTML
    tradeoff: gr.Plot
    details: gr.Column
    split: gr.Plot
    variation: gr.Plot
    load: gr.Plot
    layer: gr.Slider
    tokens: gr.HTML
    snippet: gr.Code

    @property
    def settings(self) -> list:
        """The inputs that make the spec and the calibration text."""
        return [
            self.method, self.active, self.experts, self.shared, self.own_share, self.router,
            self.selection, self.fill, self.calibration, self.own_text,
        ]  # fmt: skip


def experts_panel() -> ExpertsPanel:
    gr.Markdown(
        "#### Experts, chosen token by token\n"
        "Instead of the same branches for every token, a **router** picks a few groups of neurons, "
        "the **experts**, for each token. **Shared** neurons always run. Nothing is trained: "
        "experts and router are computed from the weights, and from what the neurons do on a "
        "**calibration text**. This tab has settings and figures of its own; the cards above stay "
        "with the branches."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            method = gr.Dropdown(
                choices(ROUTED_METHODS, star=""), value="expertweaver", label="Method",
                filterable=False, elem_id="method",
            )  # fmt: skip
            about = gr.Markdown("", elem_id="method-about")
            active = LimitedSlider(
                0.05, 1, 0.75, step=0.05, label="Active share", elem_id="active",
                info="of the neurons, per token; shared ones included",
            )  # fmt: skip
            experts = LimitedSlider(
                2, MAX_EXPERTS, 64, step=1, precision=0, label="Experts per MLP",
                elem_id="experts", info="of equal size; fewer where d_ff forbids it",
            )  # fmt: skip
            with gr.Row():
                measure = gr.Button(
                    "Convert and measure", variant="primary", min_width=160,
                    elem_id="measure-experts",
                )  # fmt: skip
                stop = gr.Button("Stop", min_width=80, elem_id="stop-experts")
            static = gr.Button(
                "Add static recipes at this share", size="sm", elem_id="measure-static"
            )
            with gr.Accordion("More: shared share, router, calibration", open=False):
                own_share = gr.Checkbox(True, label="Shared share as the method has it")
                shared = LimitedSlider(
                    0, 0.95, DEFAULT_SHARED, step=0.05, label="Shared share", elem_id="shared",
                    info="counts if the box above is not ticked",
                )  # fmt: skip
                router = gr.Dropdown(
                    [("the method's own", OWN), *choices(ROUTERS, star="")], value=OWN,
                    label="Router", filterable=False, elem_id="router",
                )  # fmt: skip
                selection = gr.Radio(
                    choices(SELECTIONS, star=""), value="topk", label="Which experts run",
                    elem_id="selection",
                )  # fmt: skip
                fill = gr.Radio(
                    choices(FILLS, star=""), value="none", label="What stands in for the others",
                    elem_id="fill",
                )  # fmt: skip
                calibration = gr.Radio(
                    [("ours", "ours"), ("own text", OWN)],
                    value="ours", label="Calibration text", elem_id="calibration",
                )  # fmt: skip
                own_text = gr.Textbox(
                    label="Own calibration text", lines=3, max_lines=6,
                    max_length=MAX_CALIBRATION, elem_id="own-calibration",
                    info="at least 1,024 tokens; must not be what perplexity is measured on",
                )  # fmt: skip
                own_file = gr.File(
                    label="… or a text file", file_types=[".txt"], height=90,
                    elem_id="calibration-file",
                )  # fmt: skip
            with gr.Accordion("The same in Python and in the shell", open=False):
                snippet = gr.Code(
                    language="python", show_label=False, buttons=["copy"], interactive=False,
                    lines=6, wrap_lines=True, show_line_numbers=False, elem_id="experts-snippet",
                )  # fmt: skip
        with gr.Column(scale=5, min_width=320):
            status = gr.HTML("", elem_id="experts-status")
            result = gr.HTML(EMPTY, elem_id="experts-result")
            gr.Markdown("#### Does routing pay? Perplexity against compute")
            tradeoff = gr.Plot(show_label=False, elem_id="tradeoff")
    with gr.Column(visible=False) as details:
        gr.Markdown("#### Which experts are busy, layer by layer")
        load = gr.Plot(show_label=False, elem_id="expert-load")
        gr.Markdown("#### What runs for a token: always, by routing, or not at all")
        with gr.Row():
            split = gr.Plot(show_label=False, elem_id="split", min_width=320)
            variation = gr.Plot(show_label=False, elem_id="variation", visible=False, min_width=320)
        gr.Markdown("#### The words of a story, coloured by their favourite expert")
        layer = LimitedSlider(0, 1, 0, step=1, precision=0, label="Layer", elem_id="experts-layer")
        tokens = gr.HTML("", elem_id="tokens-by-expert")
    return ExpertsPanel(
        method, about, active, experts, shared, own_share, router, selection, fill, calibration,
        own_text, own_file, measure, stop, static, status, result, tradeoff, details, split,
        variation, load, layer, tokens, snippet,
    )  # fmt: skip


def wire_experts(
    handlers: ExpertHandlers, model: gr.State, panel: ExpertsPanel, tab: gr.Tab,
    kept: gr.Textbox,
) -> None:  # fmt: skip
    """The tab of routed experts: its settings, and what is measured on its buttons.

    kept: new runs, for the browser to keep.
    """
    settings = [model, *panel.settings]
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
    model.change(
        readable(handlers.another_model), model, [panel.result, panel.details, panel.layer],
        **QUIET,
    )  # fmt: skip
    panel.own_file.upload(
        readable(handlers.read_file), panel.own_file, [panel.own_text, panel.calibration], **QUIET
    )
    measured = panel.measure.click(
        readable(handlers.measure),
        [model, panel.layer, *panel.settings],
        [
            panel.status, panel.result, panel.tradeoff, panel.details, panel.load, panel.split,
            panel.variation, panel.tokens, kept,
        ],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )  # fmt: skip
    static = panel.static.click(
        readable(handlers.measure_static),
        [model, panel.active],
        [panel.status, panel.tradeoff, kept],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )
    panel.stop.click(
        lambda: "<p>Stopped.</p>", None, panel.status, cancels=[measured, static], **QUIET
    )
    panel.layer.change(
        readable(handlers.recolour),
        [model, panel.layer, *panel.settings],
        panel.tokens,
        trigger_mode="always_last",
        **QUIET,
    )
