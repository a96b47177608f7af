"""The tab on which both models write: its components and their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from .events import MODEL_QUEUE, QUIET, readable
from .sliders import LimitedSlider

if TYPE_CHECKING:
    from .generations import GenerationHandlers

MAX_PROMPT = 2000  # characters
MAX_NEW_TOKENS = 256
# What a model can go on from: one that tells stories, one that answers, one that completes.
STORIES = (
    "Once upon a time, there was a little fox who could not sleep.",
    "Tom and his sister found a red box under the bed.",
    "One day, a small boat wanted to see the big sea.",
)
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Name three animals that live in the sea.",
)
BEGINNINGS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "In the middle of the nineteenth century, the railway",
)


@dataclass(frozen=True)
class GenerationsPanel:
    prompt: gr.Textbox
    examples: gr.Dataset
    tokens: gr.Slider
    temperature: gr.Slider
    write: gr.Button
    stop: gr.Button
    dense: gr.Textbox
    converted: gr.Textbox
    report: gr.HTML


def generations_panel() -> GenerationsPanel:
    prompt = gr.Textbox(
        STORIES[0],
        label="Prompt",
        info="both models continue it, taking turns token by token",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        elem_id="prompt",
    )
    examples = gr.Examples(
        [[example] for example in STORIES], prompt, label="Examples", elem_id="examples",
        api_visibility="private",
    ).dataset  # fmt: skip
    with gr.Row():
        tokens = LimitedSlider(
            16, MAX_NEW_TOKENS, 128, step=16, precision=0, label="Tokens to write",
            min_width=200, elem_id="tokens",
        )  # fmt: skip
        temperature = LimitedSlider(
            0, 1.5, 0.6, step=0.1, label="Temperature", min_width=200, elem_id="temperature",
            info="0: always the most likely token; above: sampled, with the same seed for both",
        )  # fmt: skip
    with gr.Row():
        write = gr.Button("Write", variant="primary", min_width=120, elem_id="write")
        stop = gr.Button("Stop", min_width=80, elem_id="stop-writing")
    with gr.Row():
        panes = [
            gr.Textbox(
                label=label,
                lines=12,
                max_lines=12,
                min_width=280,
                interactive=False,
                autoscroll=True,
                placeholder="Press Write.",
                buttons=["copy"],
                elem_id=f"{label.lower()}-text",
                elem_classes=[label.lower()],
            )
            for label in ("Dense", "Converted")
        ]
    report = gr.HTML("", elem_id="writing-report")
    return GenerationsPanel(prompt, examples, tokens, temperature, write, stop, *panes, report)


def wire_generations(
    handlers: GenerationHandlers, panel: GenerationsPanel, model: gr.State, spec: list
) -> None:
    model.change(
        readable(handlers.another_model), [model, panel.prompt],
        [
            panel.prompt, panel.examples, panel.temperature, panel.dense, panel.converted,
            panel.report,
        ],
        **QUIET,
    )  # fmt: skip
    writing = gr.on(
        [panel.write.click, panel.prompt.submit],
        readable(handlers.write),
        [*spec, panel.prompt, panel.tokens, panel.temperature],
        [panel.dense, panel.converted, panel.report],
        trigger_mode="once",
        **MODEL_QUEUE,
        **QUIET,
    )
    panel.stop.click(lambda: "<p>Stopped.</p>", None, panel.report, cancels=[writing], **QUIET)
