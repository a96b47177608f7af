"""The part of the trade-offs that shows the paper's tables: its components and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ..server.events import IN_TURNS, QUIET, readable
from .paper_table import published_notes, published_tables

if TYPE_CHECKING:
    from .paper import PaperHandlers


@dataclass(frozen=True)
class PaperPanel:
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    table: gr.HTML
    snippet: gr.Code


def paper_panel() -> PaperPanel:
    with gr.Accordion(
        "The paper's tables, and the same on this model", open=False, elem_id="paper"
    ):
        gr.HTML(published_tables() + published_notes(), elem_id="paper-published")
        gr.Markdown("#### The same rows for the loaded model")
        with gr.Row():
            start = gr.Button(
                "Reproduce on this model", variant="primary", min_width=200, elem_id="reproduce"
            )
            stop = gr.Button("Stop", min_width=80, elem_id="stop-reproducing")
        status = gr.HTML("", elem_id="reproduce-status")
        table = gr.HTML("", elem_id="paper-reproduced")
        snippet = gr.Code(
            language="shell", label="The same in the shell", buttons=["copy"], interactive=False,
            lines=5, wrap_lines=True, show_line_numbers=False, elem_id="paper-snippet",
        )  # fmt: skip
    return PaperPanel(start, stop, status, table, snippet)


def wire_paper(
    handlers: PaperHandlers, model: gr.State, panel: PaperPanel, told: gr.Textbox
) -> None:
    """The loaded model's table on the buttons; what is known of it whenever the tab is opened.
    told: changes with the model, while the tab is open."""
    shown = [panel.status, panel.table]
    told.change(
        readable(handlers.show), model, [*shown, panel.snippet],
        trigger_mode="always_last", concurrency_limit=1, **QUIET,
    )  # fmt: skip
    panel.start.click(
        readable(handlers.reproduce), model, shown, trigger_mode="once", **IN_TURNS, **QUIET
    ).failure(lambda: "<p>Not finished.</p>", None, panel.status, **QUIET)
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.status, **QUIET)
