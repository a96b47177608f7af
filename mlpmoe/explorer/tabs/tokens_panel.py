"""The tab that shows where the text breaks: its components and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ..server.events import IN_TURNS, QUIET, RESIZE, Together, readable
from ..shell.inputs import LimitedSlider

if TYPE_CHECKING:
    from .tokens import TokenHandlers

EMPTY = (
    '<p class="empty">Here the text will be coloured by what the conversion does to each token. '
    "It appears once the settings at the left are measured.</p>"
)


@dataclass(frozen=True)
class TokensPanel:
    worst: gr.HTML
    text: gr.HTML
    drift: gr.Plot
    assumed: gr.Column  # what follows, of static conversions
    layer: gr.Slider
    branches: gr.HTML
    norms: gr.Plot
    correlations: gr.Plot


def tokens_panel() -> TokensPanel:
    gr.Markdown(
        "#### Where the text breaks\n"
        "The darker a token, the more surprised the converted model is by it than the dense one. "
        "<u>Underlined</u> tokens became easier. Hold the pointer over a token for its figures."
    )
    worst = gr.HTML(EMPTY, elem_id="worst-sentences")
    with gr.Accordion("The whole text", open=False, elem_id="whole-text"):
        text = gr.HTML("", elem_id="coloured-text")
    gr.Markdown(
        "#### Where in depth it starts\n"
        "How far the state of the converted model has drifted from that of the dense one after "
        "each layer. Without a conversion the cosine is 1 and the error 0."
    )
    drift = gr.Plot(show_label=False, elem_id="drift")
    with gr.Column() as assumed:
        gr.Markdown(
            "#### What √(B/K) assumes, branch by branch\n"
            "The factor is right if the outputs of the branches are uncorrelated and zero on "
            "average."
        )
        layer = LimitedSlider(0, 1, 0, step=1, precision=0, label="Layer", elem_id="tokens-layer")
        branches = gr.HTML("", elem_id="branch-figures")
        with gr.Row():
            norms = gr.Plot(show_label=False, elem_id="branch-norms", min_width=320)
            correlations = gr.Plot(show_label=False, elem_id="branch-correlations", min_width=320)
    return TokensPanel(worst, text, drift, assumed, layer, branches, norms, correlations)


def wire_tokens(
    handlers: TokenHandlers, model: gr.State, spec: list, text: gr.Dropdown,
    panel: TokensPanel, told: gr.Textbox, tab: gr.Tab, another_model: Together,
) -> None:  # fmt: skip
    """told: changes with what the tab shows, while it is open."""
    inputs = [*spec, text, panel.layer]
    branches = [panel.assumed, panel.branches, panel.norms, panel.correlations]
    told.change(
        readable(handlers.show),
        inputs,
        [panel.worst, panel.text, panel.drift, *branches],
        trigger_mode="always_last",
        **IN_TURNS,
        **QUIET,
    )
    panel.layer.input(
        readable(handlers.branches), inputs, branches, trigger_mode="always_last", **IN_TURNS,
        **QUIET,
    )  # fmt: skip
    another_model.add(handlers.another_model, [model], [panel.layer])
    tab.select(None, js=RESIZE, api_visibility="private")
