"""The tab that looks into one layer: its components and their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ...core.spec import PROJECTIONS
from ..server.events import QUIET, RESIZE, Together, readable
from ..shell.inputs import LimitedSlider, OpenRadio

if TYPE_CHECKING:
    from .weights import WeightsHandlers


@dataclass(frozen=True)
class WeightsPanel:
    layer: gr.Slider
    projection: gr.Radio
    static: gr.Column
    histograms: gr.Plot
    routed: gr.Column
    split: gr.Plot
    variation: gr.Plot
    words: gr.HTML
    about: gr.HTML

    @property
    def shown(self) -> list:
        return [
            self.static, self.histograms, self.routed, self.split, self.variation, self.words,
            self.about,
        ]  # fmt: skip


def weights_panel() -> WeightsPanel:
    layer = LimitedSlider(
        0, 1, 0, step=1, precision=0, label="Layer", elem_id="layer",
        info="also by a click in the picture of the network",
    )  # fmt: skip
    with gr.Column() as static:
        gr.Markdown(
            "#### Size of the weights, branch by branch\n"
            "Each ridge is one branch: how many of its weights have which size. "
            "The dashed line is the fade threshold: weights to its left are set to zero. "
            "As published, fade works on gate and up only."
        )
        projection = OpenRadio(
            list(PROJECTIONS), value="gate", label="Projection", elem_id="projection"
        )
        histograms = gr.Plot(show_label=False, elem_id="histograms")
    with gr.Column(visible=False) as routed:
        gr.Markdown("#### What runs for a token: always, by routing, or not at all")
        with gr.Row():
            split = gr.Plot(show_label=False, elem_id="split", min_width=320)
            variation = gr.Plot(show_label=False, elem_id="variation", visible=False, min_width=320)
        gr.Markdown(
            "#### Which words an expert runs for\n"
            "Hold the pointer over a word: the picture of the network shows its experts. Hold it "
            "over an expert there: here the words that it runs for are marked."
        )
        words = gr.HTML("", elem_id="words-by-expert")
        about = gr.HTML("", elem_id="about-experts")
    return WeightsPanel(
        layer, projection, static, histograms, routed, split, variation, words, about
    )  # fmt: skip


def wire_weights(
    handlers: WeightsHandlers, panel: WeightsPanel, model: gr.State, spec: list,
    told: gr.Textbox, tab: gr.Tab, another_model: Together,
) -> None:  # fmt: skip
    """told: changes with what the tab shows, while it is open."""
    gr.on(
        [told.change, panel.projection.input],
        readable(handlers.show), [*spec, panel.layer, panel.projection], panel.shown,
        trigger_mode="always_last", concurrency_limit=1, **QUIET,
    )  # fmt: skip
    another_model.add(handlers.another_model, [model], [panel.layer, panel.projection])
    tab.select(None, js=RESIZE, **QUIET)
