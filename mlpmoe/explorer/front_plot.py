"""The plot of a search: perplexity against cost, what was tried and what no other beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from ..core.presets import PRESETS
from ..measure.notation import change
from ..measure.search import LEAST_SHARE, Budget, best, front
from ..measure.sweep import Run
from ..measure.words import in_words
from .expert_plots import LEAST_INCREASE, add_dense, increase_axis, shown_increase
from .plots import finish
from .style import CONVERTED, GREY

FRONT_HEIGHT = 420  # pixels
AXES = {
    "nonzero": "non-zero MLP parameters, %",
    "compute": "MLP multiply-adds, %",
}
LINE = 60  # characters of a hover text


def front_plot(
    tried: Sequence[Run], measured: Sequence[Run], budget: Budget,
    query: Callable[[Run], str | None] = lambda _: None,
) -> go.Figure:  # fmt: skip
    """tried: on the text the search goes by, pale. measured: on the evaluation text. The front of
    what is measured is joined by a line, the budget is dashed. query: of the link that a click on
    a run restores."""
    figure = go.Figure()
    presets = [run for run in measured if run.spec in PRESETS.values()]
    others = [run for run in measured if run.spec not in PRESETS.values()]
    chosen = best(measured, budget)
    line = front(measured, budget)
    _dashed(figure, budget, [*tried, *measured])
    _points(figure, tried, budget, "tried in the search", GREY, "circle-open", 7, 0.5, query)
    figure.add_scatter(
        x=[100 * budget.cost_of(run) for run in line],
        y=[shown_increase(run.ratio) for run in line],
        mode="lines", line={"color": CONVERTED, "width": 1.5, "shape": "hv"},
        name="not beaten", hoverinfo="skip", showlegend=len(line) > 1,
    )  # fmt: skip
    _points(figure, presets, budget, "presets", GREY, "square", 10, 1, query)
    _points(figure, others, budget, "measured finds", CONVERTED, "circle", 10, 1, query)
    _points(
        figure, [chosen] if chosen else [], budget, "suggested", CONVERTED, "star", 17, 1, query
    )
    add_dense(figure)
    finish(figure, FRONT_HEIGHT)
    figure.update_layout(
        xaxis={"title": AXES[budget.cost], "range": [100 * LEAST_SHARE - 5, 105]},
        yaxis=increase_axis([run.ratio for run in (*tried, *measured)]),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 76},
        hovermode="closest",
    )
    return figure


def _points(
    figure: go.Figure, runs: Sequence[Run], budget: Budget, name: str, colour: str, symbol: str,
    size: int, opacity: float, query: Callable[[Run], str | None],
) -> None:  # fmt: skip
    errors = {"array": [100 * run.stderr for run in runs], "thickness": 1, "width": 0}
    figure.add_scatter(
        x=[100 * budget.cost_of(run) for run in runs],
        y=[shown_increase(run.ratio) for run in runs],
        error_y=None if opacity < 1 else errors | {"color": colour},
        text=[_hover(run) for run in runs],
        customdata=[query(run) for run in runs],
        mode="markers",
        opacity=opacity,
        marker={"color": colour, "symbol": symbol, "size": size},
        hovertemplate="%{text}<br>%{x:.1f} %<extra></extra>",
        name=name,
        showlegend=bool(runs),
    )


def _dashed(figure: go.Figure, budget: Budget, runs: Sequence[Run]) -> None:
    """The budget as a line: upright for a cost, level for a perplexity."""
    style = {"color": GREY, "width": 1.5, "dash": "dash"}
    if budget.share is not None:
        highest = max([2.0, *(min(run.ratio, 1e6) for run in runs)])
        x, y = [100 * budget.share] * 2, [LEAST_INCREASE, shown_increase(highest)]
    else:
        x, y = [100 * LEAST_SHARE, 100], [shown_increase(budget.ratio)] * 2
    figure.add_scatter(x=x, y=y, mode="lines", line=style, name="budget", hoverinfo="skip")


def _hover(run: Run) -> str:
    """Perplexity and the whole recipe, in short lines."""
    lines, rest = [], in_words(run.spec)
    while len(rest) > LINE and " " in rest[:LINE]:
        cut = rest.rindex(" ", 0, LINE)
        lines.append(rest[:cut])
        rest = rest[cut + 1 :]
    return "<br>".join([f"perplexity {change(run.ratio, run.stderr)}", *lines, rest])
