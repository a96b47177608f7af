"""The tab that searches for the best recipe at a budget: its components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from ...measure.runs.search import Budget
from ..plots.front_plot import front_plot
from ..server.events import IN_TURNS, PRIVATE, QUIET, RESIZE, Together, readable
from ..shell.inputs import LimitedSlider

if TYPE_CHECKING:
    from .suggest import SuggestHandlers

GOALS = [
    ("a limit on non-zero MLP parameters", "nonzero"),
    ("a limit on MLP compute per token", "compute"),
    ("a limit on perplexity, with the fewest parameters", "perplexity"),
]
EMPTY = (
    "<p>Set a budget and press <strong>Suggest</strong>. The search tries recipes of the stages "
    "under “More” and keeps those that no other beats.</p>"
)
COLUMNS = ["perplexity", "non-zero", "compute", "recipe"]  # all of the MLPs but the first


@dataclass(frozen=True)
class SuggestPanel:
    goal: gr.Radio
    share: gr.Slider
    increase: gr.Slider
    calibrated: gr.Checkbox
    seconds: gr.Slider
    suggest: gr.Button
    stop: gr.Button
    status: gr.HTML
    sentence: gr.HTML
    plot: gr.Plot
    table: gr.Dataframe
    specs: gr.State  # of the rows, as links' query strings

    @property
    def settings(self) -> list:
        return [self.goal, self.share, self.increase, self.calibrated, self.seconds]


def suggest_panel() -> SuggestPanel:
    gr.Markdown(
        "#### The best recipe for a budget\n"
        "The published recipe is one point; others cost less for the same. The search goes by a "
        "calibration text, then measures its best finds on our evaluation text, beside the best "
        "presets. **Click a point or a row to take its settings.**"
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            goal = gr.Radio(GOALS, value="nonzero", label="Budget", elem_id="goal")
            share = LimitedSlider(
                20, 95, 70, step=5, label="At most, % of the dense MLPs", elem_id="budget-share",
            )  # fmt: skip
            increase = LimitedSlider(
                0.5, 50, 5, step=0.5, label="At most, % more perplexity", visible=False,
                elem_id="budget-increase",
            )  # fmt: skip
            calibrated = gr.Checkbox(
                True, label="May look at a calibration text", elem_id="budget-calibrated",
                info="a text of ours; without, recipes see nothing but the weights",
            )  # fmt: skip
            seconds = LimitedSlider(
                10, 300, 20, step=10, precision=0, label="Seconds to search", elem_id="seconds",
                info="the best finds are measured after that; the page says how long that takes",
            )  # fmt: skip
            with gr.Row():
                suggest = gr.Button("Suggest", variant="primary", min_width=120, elem_id="suggest")
                stop = gr.Button("Stop", min_width=80, elem_id="stop-suggesting")
        with gr.Column(scale=5, min_width=320):
            status = gr.HTML("", elem_id="suggest-status")
            sentence = gr.HTML(EMPTY, elem_id="suggestion")
            plot = gr.Plot(
                front_plot([], [], Budget(share=0.7)), show_label=False, elem_id="suggested-front"
            )
    table = gr.Dataframe(
        headers=COLUMNS, value=[], interactive=False, wrap=True, elem_id="front-table",
        label="Measured on our evaluation text; non-zero and compute of the MLPs",
        column_widths=["23%", "15%", "15%", "47%"], max_height=420,
    )  # fmt: skip
    specs = gr.State([])
    return SuggestPanel(
        goal, share, increase, calibrated, seconds, suggest, stop, status, sentence, plot, table,
        specs,
    )  # fmt: skip


def wire_suggest(
    handlers: SuggestHandlers, model: gr.State, panel: SuggestPanel, tab: gr.Tab,
    taken: gr.Textbox, measured: gr.Textbox, another_model: Together,
) -> None:  # fmt: skip
    """The tab that searches for a recipe: the search on its buttons, and rows that are taken.

    taken: what is to be restored. measured: new runs, for the browser to keep.
    """
    results = [panel.status, panel.sentence, panel.plot, panel.table, panel.specs]
    panel.goal.input(
        readable(handlers.choose_goal), panel.goal, [panel.share, panel.increase],
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    another_model.add(handlers.another_model, [], results)
    panel.suggest.click(
        readable(handlers.suggest),
        [model, *panel.settings],
        [*results, measured],
        trigger_mode="once",
        **IN_TURNS,
        **QUIET,
    )
    panel.stop.click(readable(handlers.jobs.press_stop), None, panel.status, **QUIET)
    panel.table.select(
        readable(handlers.take), panel.specs, taken, trigger_mode="multiple", **QUIET
    )
    tab.select(None, js=RESIZE, **PRIVATE)
