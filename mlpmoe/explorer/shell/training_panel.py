"""A training and its curve, under the cards: there once one is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class TrainingPanel:
    says: gr.HTML
    curve: gr.Plot


def training_panel() -> TrainingPanel:
    """Both empty; see page.css."""
    with gr.Row(elem_id="training-panel"):
        with gr.Column(scale=2, min_width=240):
            says = gr.HTML("", elem_id="training-says")
        with gr.Column(scale=3, min_width=300):
            curve = gr.Plot(
                label="Held-out KL divergence by step", show_label=False, visible=False,
                elem_id="training-curve",
            )  # fmt: skip
    return TrainingPanel(says, curve)
