"""The components of the page, panel by panel. What they show and do is wired in page.py."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ..core.spec import PROJECTIONS
from ..models import CATALOGUE
from ..models.catalogue import DEMO_KEY
from .preview import QUANTITY_NAMES
from .sliders import LimitedSlider


@dataclass(frozen=True)
class ModelPanel:
    name: gr.Dropdown
    load: gr.Button
    status: gr.HTML
    note: gr.HTML


@dataclass(frozen=True)
class CardsPanel:
    perplexity: gr.HTML
    nonzero: gr.HTML
    compute: gr.HTML
    speed: gr.HTML


@dataclass(frozen=True)
class BranchesPanel:
    layer: gr.Slider
    projection: gr.Radio
    histograms: gr.Plot
    quantity: gr.Radio
    heat: gr.Plot


def model_panel(any_model: bool) -> ModelPanel:
    choices = [
        (entry.label + (" · needs a GPU" if entry.needs_gpu else ""), entry.key)
        for entry in CATALOGUE
    ]
    info = "from the list, any owner/name on the Hugging Face hub, a local folder, or a .gguf file"
    with gr.Row(elem_id="model-row"):
        name = gr.Dropdown(
            choices,
            value=DEMO_KEY,
            label="Model",
            info=info if any_model else "this server offers the models of the list",
            allow_custom_value=any_model,
            filterable=any_model,
            min_width=260,
            elem_id="model",
        )
        load = gr.Button("Load", scale=0, min_width=120, elem_id="load")
    status = gr.HTML("", elem_id="status")
    note = gr.HTML("", visible=False, elem_id="model-note")
    return ModelPanel(name, load, status, note)


def cards_panel() -> CardsPanel:
    with gr.Row(elem_id="cards"):
        names = ("perplexity", "nonzero", "compute", "speed")
        cards = [gr.HTML("", elem_id=f"card-{name}", min_width=200) for name in names]
    return CardsPanel(*cards)


def branches_panel() -> BranchesPanel:
    gr.Markdown(
        "#### Size of the weights, branch by branch\n"
        "Each ridge is one branch: how many of its weights have which size. "
        "The dashed line is the fade threshold: weights to its left are set to zero. "
        "As published, fade works on gate and up only."
    )
    with gr.Row():
        layer = LimitedSlider(0, 1, 0, step=1, precision=0, label="Layer", elem_id="layer")
        projection = gr.Radio(
            list(PROJECTIONS), value="gate", label="Projection", elem_id="projection"
        )
    histograms = gr.Plot(show_label=False, elem_id="histograms")
    gr.Markdown("#### What each branch loses, layer by layer")
    quantity = gr.Radio(
        [(label, key) for key, label in QUANTITY_NAMES.items()],
        value="nonzero",
        label="What is counted",
        show_label=False,
        container=False,
        elem_id="quantity",
    )
    heat = gr.Plot(show_label=False, elem_id="heat")
    return BranchesPanel(layer, projection, histograms, quantity, heat)
