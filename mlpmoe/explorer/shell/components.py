"""The components of the page, panel by panel. What they show and do is wired in page.py."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ...models import CATALOGUE
from ...models.catalogue import DEMO_KEY
from ..plots.curve import curve as draw_curve
from .network import network_component


@dataclass(frozen=True)
class ModelPanel:
    title: gr.HTML
    name: gr.Dropdown
    load: gr.Button
    status: gr.HTML
    note: gr.HTML
    undo: gr.Button
    redo: gr.Button


@dataclass(frozen=True)
class CardsPanel:
    perplexity: gr.HTML
    nonzero: gr.HTML
    compute: gr.HTML
    speed: gr.HTML


@dataclass(frozen=True)
class PicturesPanel:
    axis: gr.Radio
    curve: gr.Plot
    network: gr.HTML


def model_panel(any_model: bool) -> ModelPanel:
    choices = [
        (entry.label + (" · needs a GPU" if entry.needs_gpu else ""), entry.key)
        for entry in CATALOGUE
    ]
    any_label = "Model: list, hub owner/name, folder, .gguf"
    with gr.Row(elem_id="model-row"):
        title = gr.HTML("<h1>mlpmoe</h1>", elem_id="title", min_width=90)
        name = gr.Dropdown(
            choices,
            value=DEMO_KEY,
            label=any_label if any_model else "Model",
            allow_custom_value=any_model,
            filterable=any_model,
            min_width=300,
            scale=3,
            elem_id="model",
        )
        load = gr.Button("Load", scale=0, min_width=80, elem_id="load")
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML("<p>Opening …</p>", elem_id="status")
            note = gr.HTML("", visible=False, elem_id="model-note")
        undo = gr.Button("↶", scale=0, min_width=40, size="sm", elem_id="undo")
        redo = gr.Button("↷", scale=0, min_width=40, size="sm", elem_id="redo")
    return ModelPanel(title, name, load, status, note, undo, redo)


def pictures_panel() -> PicturesPanel:
    """The curve and the network, beside each other."""
    with gr.Row(elem_id="pictures"):
        with gr.Column(min_width=320, elem_id="curve-panel"):
            axis = gr.Radio(
                [("MLP compute", "compute"), ("non-zero weights", "nonzero")], value="compute",
                label="The curve: what it costs over", container=False, elem_id="axis",
            )  # fmt: skip
            curve = gr.Plot(draw_curve([], [], None, "compute"), show_label=False, elem_id="curve",
                            elem_classes=["drag-on"])  # fmt: skip
        with gr.Column(min_width=320, elem_id="network-panel"):
            network = network_component()
    return PicturesPanel(axis, curve, network)


def cards_panel() -> CardsPanel:
    with gr.Row(elem_id="cards"):
        names = ("perplexity", "nonzero", "compute", "speed")
        cards = [gr.HTML("", elem_id=f"card-{name}", min_width=160) for name in names]
    return CardsPanel(*cards)
