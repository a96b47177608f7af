"""The tab of trade-offs: everything measured in one plot and one table, two runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ...core.spec import PROJECTIONS
from ..plots.tradeoff_plot import AXES, LAYERS, tradeoff_plot
from ..server.events import IN_TURNS, PRIVATE, QUIET, RESIZE, Together, readable
from ..shell.answer_panel import MAX_PROMPT, STORIES
from ..shell.inputs import LimitedSlider, OpenRadio
from .paper_panel import PaperPanel, paper_panel
from .runs_table import EMPTY, NOTHING_PINNED
from .sweep_panel import SweepPanel, sweep_panel

if TYPE_CHECKING:
    from .trade_offs import TradeOffHandlers

FIRST_LAYERS = ["runs", "sweep", "shipped"]
ADD = "text => { if (text) mlpmoe.add(text) }"
SAVE = """(text, name) => {
    if (!text) return;
    const type = name.endsWith('.csv') ? 'text/csv' : 'application/json';
    const url = URL.createObjectURL(new Blob([text], {type}));
    const link = Object.assign(document.createElement('a'), {href: url, download: name});
    document.body.append(link); link.click(); link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
}"""


@dataclass(frozen=True)
class TradeOffsPanel:
    x: gr.Dropdown
    y: gr.Dropdown
    layers: gr.CheckboxGroup
    plot: gr.Plot
    about: gr.HTML
    table: gr.HTML
    undo: gr.Button
    clear: gr.Button
    csv: gr.Button
    json: gr.Button
    file: gr.UploadButton
    comparison: gr.HTML
    more: gr.Column  # of the comparison
    layer: gr.Slider
    projection: gr.Radio
    prompt: gr.Textbox
    compare: gr.Button
    stop: gr.Button
    status: gr.HTML
    results: gr.Row  # with what follows
    histograms: tuple[gr.Plot, gr.Plot]
    texts: tuple[gr.Textbox, gr.Textbox]
    sweep: SweepPanel
    paper: PaperPanel


@dataclass(frozen=True)
class RunFields:
    """Hidden fields between the server and page.js. They stand outside of the tabs, since what is
    in a tab is not in the page before the tab is opened."""

    stored: gr.Textbox  # the runs that the browser keeps
    measured: gr.Textbox  # new runs, to be kept
    file: gr.Textbox  # what a download holds, and its name
    name: gr.Textbox


def run_fields() -> RunFields:
    names = ("runs-stored", "runs-measured", "runs-file", "runs-file-name")
    return RunFields(*(gr.Textbox("", visible="hidden", elem_id=name) for name in names))


def trade_offs_panel() -> TradeOffsPanel:
    gr.Markdown(
        "#### What it costs against what it saves\n"
        "All runs of this model on the chosen text. Lower left is better: the line joins the runs "
        "that no other run beats on both axes, and beaten runs are pale. Squares are presets. Grey "
        "runs ship with the app. Routed methods keep all weights, so plot them against compute. "
        "**Click a point or a recipe to restore its settings.**"
    )
    axes = [(axis.label, key) for key, axis in AXES.items()]
    with gr.Row():
        x = gr.Dropdown(
            axes, value="nonzero", label="x axis", filterable=False, elem_id="axis-x", min_width=200
        )
        y = gr.Dropdown(
            axes,
            value="perplexity",
            label="y axis",
            filterable=False,
            elem_id="axis-y",
            min_width=200,
        )
        shown = gr.CheckboxGroup(
            [(name, key) for key, name in LAYERS.items()], value=FIRST_LAYERS, label="Show",
            elem_id="layers", min_width=320, scale=2,
        )  # fmt: skip
    plot = gr.Plot(
        tradeoff_plot({}, (), "nonzero", "perplexity"), show_label=False, elem_id="trade-offs"
    )
    sweep, paper = sweep_panel(), paper_panel()
    gr.Markdown(
        "#### Runs\nThey are kept in this browser only. *Open* adds those of a file that "
        "`sweep --out` or `evaluate --out` wrote."
    )
    with gr.Row(elem_id="runs-buttons"):
        about = gr.HTML("", elem_id="runs-about", min_width=160)
        undo = gr.Button("Undo delete", size="sm", min_width=100, scale=0, interactive=False,
                         elem_id="undo-runs")  # fmt: skip
        clear = gr.Button("Delete all", size="sm", min_width=90, scale=0, elem_id="clear-runs")
        csv = gr.Button("CSV", size="sm", min_width=60, scale=0, elem_id="runs-csv")
        json = gr.Button("JSON", size="sm", min_width=60, scale=0, elem_id="runs-json")
        file = gr.UploadButton(
            "Open", size="sm", min_width=60, scale=0, file_types=[".jsonl"], elem_id="open-runs"
        )
    table = gr.HTML(EMPTY, elem_id="runs")
    gr.Markdown("#### Two runs side by side")
    comparison = gr.HTML(NOTHING_PINNED, elem_id="comparison")
    with gr.Column(visible=False) as more:
        prompt = gr.Textbox(
            STORIES[0], label="Prompt", lines=2, max_lines=4, max_length=MAX_PROMPT,
            elem_id="compare-prompt",
        )  # fmt: skip
        with gr.Row():
            layer = LimitedSlider(
                0, 1, 0, step=1, precision=0, label="Layer", elem_id="compare-layer"
            )
            projection = OpenRadio(
                list(PROJECTIONS),
                value="gate",
                label="Projection",
                elem_id="compare-projection",
            )
        with gr.Row():
            compare = gr.Button(
                "Show branches and write", variant="primary", min_width=180, elem_id="compare"
            )
            stop = gr.Button("Stop", min_width=80, elem_id="stop-comparing")
        status = gr.HTML("", elem_id="compare-status")
        with gr.Row(visible=False) as results:
            columns = [_column(letter) for letter in "AB"]
    histograms, texts = zip(*columns, strict=True)
    return TradeOffsPanel(
        x, y, shown, plot, about, table, undo, clear, csv, json, file, comparison, more,
        layer, projection, prompt, compare, stop, status, results, histograms, texts,
        sweep, paper,
    )  # fmt: skip


def _column(letter: str) -> tuple[gr.Plot, gr.Textbox]:
    with gr.Column(min_width=320):
        plot = gr.Plot(show_label=False, elem_id=f"histograms-{letter.lower()}")
        text = gr.Textbox(
            label=letter, lines=8, max_lines=8, interactive=False, buttons=["copy"],
            elem_id=f"text-{letter.lower()}",
            elem_classes=["converted"],
        )  # fmt: skip
    return plot, text


def wire_trade_offs(
    handlers: TradeOffHandlers, model: gr.State, text: gr.Dropdown, panel: TradeOffsPanel,
    told: gr.Textbox, tab: gr.Tab, fields: RunFields, mine: gr.State, another_model: Together,
) -> None:  # fmt: skip
    """What is stored in the browser is remembered in `mine`, and shown while the tab is open: told
    changes with it then."""
    fields.stored.change(readable(handlers.remember), fields.stored, mine, **QUIET)
    fields.measured.change(None, fields.measured, js=ADD, **PRIVATE)
    gr.on(
        [c.change for c in (told, panel.x, panel.y, panel.layers)],
        readable(handlers.show),
        [fields.stored, model, text, panel.x, panel.y, panel.layers],
        [
            panel.plot, panel.about, panel.table, panel.undo, panel.clear, panel.comparison,
            panel.more,
        ],
        trigger_mode="always_last",
        concurrency_limit=1,
        **QUIET,
    )  # fmt: skip
    another_model.add(handlers.another_model, [model], [panel.layer, panel.projection])
    panel.undo.click(None, js="() => mlpmoe.undo()", **PRIVATE)
    panel.clear.click(None, js="() => mlpmoe.remove('all')", **PRIVATE)
    for button, kind in ((panel.csv, "csv"), (panel.json, "json")):
        button.click(
            readable(getattr(handlers, kind)), fields.stored, [fields.file, fields.name], **QUIET
        ).success(None, [fields.file, fields.name], js=SAVE, **PRIVATE)
    panel.file.upload(readable(handlers.open_file), panel.file, fields.measured, **QUIET)
    panel.compare.click(
        readable(handlers.compare),
        [fields.stored, panel.layer, panel.projection, panel.prompt],
        [panel.status, panel.results, *panel.histograms, *panel.texts],
        trigger_mode="once",
        **IN_TURNS,
        **QUIET,
    )
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.status, **QUIET)
    tab.select(None, js=RESIZE, **PRIVATE)
    # a tab that is drawn for the first time may pass over what came just before
    tab.select(None, js="() => setTimeout(mlpmoe.show, 400)", **PRIVATE)
