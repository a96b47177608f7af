"""The answer on the first screen: its components and their events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ..server.events import IN_TURNS, QUIET, Together, readable
from .inputs import LimitedSlider

if TYPE_CHECKING:
    from .answer import AnswerHandlers

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
class AnswerPanel:
    prompt: gr.Textbox
    examples: gr.Dataset
    write: gr.Button
    stop: gr.Button
    dense: gr.HTML
    converted: gr.HTML
    report: gr.HTML
    follow: gr.Checkbox  # writes by itself once a setting is measured
    tokens: gr.Slider
    temperature: gr.Slider

    @property
    def wishes(self) -> list:
        return [self.prompt, self.tokens, self.temperature]


def answer_panel() -> AnswerPanel:
    with gr.Row(elem_id="asking"):
        prompt = gr.Textbox(
            STORIES[0], label="Prompt, for both models", show_label=False, container=False,
            placeholder="A prompt for both models", lines=1, max_lines=3, scale=6,
            max_length=MAX_PROMPT, elem_id="prompt", min_width=260,
        )  # fmt: skip
        write = gr.Button("Write", min_width=80, scale=0, elem_id="write")
        stop = gr.Button("Stop", min_width=70, scale=0, elem_id="stop-writing")
    examples = gr.Examples(
        [[example] for example in STORIES], prompt, label="Try", elem_id="examples",
        api_visibility="private",
    ).dataset  # fmt: skip
    with gr.Row(elem_id="panes"):
        panes = []
        for name in ("dense", "converted"):
            with gr.Column(elem_id=f"{name}-pane", elem_classes=["pane"], min_width=280):
                gr.HTML(f'<h3 class="{name}">{name.title()}</h3>')
                panes.append(gr.HTML("", elem_id=f"{name}-text"))
    report = gr.HTML("", elem_id="writing-report")
    with gr.Accordion("How they write", open=False, elem_id="writing-options"), gr.Row():
        follow = gr.Checkbox(
            True, label="Write by itself", elem_id="follow", min_width=200,
            info="once a setting has settled",
        )  # fmt: skip
        tokens = LimitedSlider(
            16, MAX_NEW_TOKENS, 48, step=16, precision=0, label="Tokens to write",
            min_width=200, elem_id="tokens",
        )  # fmt: skip
        temperature = LimitedSlider(
            0, 1.5, 0.6, step=0.1, label="Temperature", min_width=200, elem_id="temperature",
            info="0: always the likeliest token; above: sampled, with the same seed for both",
        )  # fmt: skip
    return AnswerPanel(
        prompt, examples, write, stop, *panes, report, follow, tokens, temperature
    )  # fmt: skip


def wire_answer(
    handlers: AnswerHandlers, panel: AnswerPanel, model: gr.State, spec: list, text: gr.Dropdown,
    layer: gr.Slider, network: gr.HTML, settled: Sequence[Callable], another_model: Together,
) -> None:  # fmt: skip
    """settled: after these the page shows another setting, or has measured one that was stopped."""
    shown = [panel.dense, panel.converted, panel.report]
    another_model.add(
        handlers.another_model, [model, panel.prompt],
        [panel.prompt, panel.examples, panel.temperature, *shown],
    )  # fmt: skip
    inputs = [*spec, text, *panel.wishes, layer]
    gr.on(
        [panel.write.click, panel.prompt.submit],
        readable(handlers.write), inputs, [*shown, network],
        trigger_mode="multiple", **IN_TURNS, **QUIET,
    )  # fmt: skip
    for event in settled:
        event(
            readable(handlers.write_by_itself), [panel.follow, *inputs], [*shown, network],
            trigger_mode="multiple", **IN_TURNS, **QUIET,
        )  # fmt: skip
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.report, **QUIET)
