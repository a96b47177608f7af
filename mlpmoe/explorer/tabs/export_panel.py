"""The tab that makes checkpoints: its components and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ...checkpoints.forms.choose import AUTO, FORM_WORDS
from ...checkpoints.write.export import SAVED
from ..server.events import IN_TURNS, QUIET, readable
from ..shell.inputs import OpenRadio
from .export_result import EMPTY
from .pushing import PushHandlers, PushPanel, can_push, push_panel, wire_push

if TYPE_CHECKING:
    from .exporting import ExportHandlers

TAB = "export"


@dataclass(frozen=True)
class ExportPanel:
    form: gr.Dropdown
    dtype: gr.Radio
    make: gr.Button
    stop: gr.Button
    plan: gr.HTML
    status: gr.HTML
    stale: gr.HTML
    result: gr.HTML
    download: gr.DownloadButton
    opening: gr.Code
    command: gr.Code
    push: PushPanel | None  # where visitors can sign in
    file: gr.File
    opened: gr.HTML

    @property
    def choices(self) -> list:
        return [self.form, self.dtype]


def export_panel() -> ExportPanel:
    gr.Markdown(
        "#### Take the converted model with you\n"
        "A **checkpoint** is a folder with a model's weights and settings, which other software "
        "opens. Here it is written, opened again in a fresh process and compared with the model "
        "that was measured, before you get it."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            form = gr.Dropdown(
                [(words, name) for name, words in FORM_WORDS.items()], value=AUTO, label="Form",
                info="architecture of the checkpoint", filterable=False, elem_id="export-form",
            )  # fmt: skip
            dtype = OpenRadio(
                [("as the base model was saved", SAVED)], value=SAVED,
                label="Number format of the weights", elem_id="export-dtype",
            )  # fmt: skip
            with gr.Row():
                make = gr.Button(
                    "Make checkpoint", variant="primary", scale=3, min_width=160,
                    elem_id="make-checkpoint",
                )  # fmt: skip
                stop = gr.Button("Stop", scale=1, min_width=70, elem_id="stop-export")
        with gr.Column(scale=5, min_width=320):
            plan = gr.HTML("", elem_id="export-plan")
            status = gr.HTML("", elem_id="export-status")
            stale = gr.HTML("", elem_id="export-stale")
            result = gr.HTML(EMPTY, elem_id="export-result")
            download = gr.DownloadButton(
                "Download", visible=False, variant="primary", elem_id="download-checkpoint"
            )
            opening = gr.Code(
                language="python", label="Open it in Python, where the zip was unpacked",
                buttons=["copy"], interactive=False, lines=3, wrap_lines=True, visible=False,
                show_line_numbers=False, elem_id="export-opening",
            )  # fmt: skip
    push = push_panel() if can_push() else None
    gr.Markdown("#### On your own machine\nThe same checkpoint from the shell, and to the hub:")
    command = gr.Code(
        language="shell", show_label=False, buttons=["copy"], interactive=False, lines=2,
        wrap_lines=True, show_line_numbers=False, elem_id="export-command",
    )  # fmt: skip
    gr.Markdown(
        "#### Open a conversion.json\nEvery checkpoint has one: it sets all controls as they were."
    )
    file = gr.File(
        label="conversion.json", file_types=[".json"], height=120, elem_id="open-conversion"
    )
    opened = gr.HTML("", elem_id="opened-conversion")
    return ExportPanel(
        form, dtype, make, stop, plan, status, stale, result, download, opening, command,
        push, file, opened,
    )  # fmt: skip


def wire_export(
    handlers: ExportHandlers, panel: ExportPanel, model: gr.State, text: gr.Dropdown,
    settings: list, told: gr.Textbox, taken: gr.Textbox, demo: gr.Blocks,
) -> None:  # fmt: skip
    """The plan follows the settings; the checkpoint is made and stopped by its buttons.

    told: changes with the settings, while the tab is open. taken: what is to be restored.
    """
    inputs = [model, *panel.choices, text, *settings]
    shown = [panel.status, panel.stale, panel.result, panel.download, panel.opening]
    described = [panel.plan, panel.command, panel.dtype, panel.stale]
    gr.on(
        [component.change for component in (told, *panel.choices)],
        readable(handlers.describe), inputs, described,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    turn = panel.make.click(
        readable(handlers.begin), None, panel.status, trigger_mode="once", **QUIET
    )
    made = turn.success(
        readable(handlers.make), inputs, shown,
        trigger_mode="multiple",  # a turn that is taken is used
        **IN_TURNS, **QUIET,
    )  # fmt: skip
    # once it is made, more is known of its form; and the settings may have moved meanwhile
    made.success(readable(handlers.describe), inputs, described, **QUIET)
    made.failure(handlers.failed, None, panel.status, **QUIET)
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.status, **QUIET)
    opened = panel.file.upload(
        readable(handlers.open_record), [panel.file, model, text],
        [taken, panel.opened], **QUIET,
    )  # fmt: skip
    # empty again, so that the same file can be chosen twice
    opened.success(lambda: None, None, panel.file, **QUIET)
    opened.failure(lambda: ("", None), None, [panel.opened, panel.file], **QUIET)
    demo.unload(handlers.leave)
    if panel.push:
        wire_push(PushHandlers(handlers.handed_out), panel.push, demo)
