"""The plot of a search: perplexity against cost, what was tried and what no other beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from ...core.presets import PRESETS
from ...measure.notation import change
from ...measure.runs.search import LEAST_SHARE, Budget, best, front
from ...measure.runs.sweep import Run
from ...measure.words import in_words
from .cost_plot import (
    COST_TITLES,
    LEAST_INCREASE,
    LEGEND_ABOVE,
    add_dense,
    add_points,
    add_unbeaten,
    error_bars,
    increase_axis,
    shown_increase,
    wrapped,
)
from .ridges import finish
from .style import CONVERTED, GREY

FRONT_HEIGHT = 420  # pixels


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
    add_unbeaten(
        figure,
        [100 * budget.cost_of(run) for run in line],
        [shown_increase(run.ratio) for run in line],
    )
    _points(figure, presets, budget, "presets", GREY, "square", 10, 1, query)
    _points(figure, others, budget, "measured finds", CONVERTED, "circle", 10, 1, query)
    _points(
        figure, [chosen] if chosen else [], budget, "suggested", CONVERTED, "star", 17, 1, query
    )
    add_dense(figure)
    finish(figure, FRONT_HEIGHT)
    figure.update_layout(
        xaxis={"title": COST_TITLES[budget.cost], "range": [100 * LEAST_SHARE - 5, 105]},
        yaxis=increase_axis([run.ratio for run in (*tried, *measured)]),
        **LEGEND_ABOVE,
    )
    return figure


def _points(
    figure: go.Figure, runs: Sequence[Run], budget: Budget, name: str, colour: str, symbol: str,
    size: int, opacity: float, query: Callable[[Run], str | None],
) -> None:  # fmt: skip
    errors = error_bars([100 * run.stderr for run in runs], colour=colour)
    add_points(
        figure,
        [100 * budget.cost_of(run) for run in runs],
        [shown_increase(run.ratio) for run in runs],
        errors_y=None if opacity < 1 else errors,
        texts=[_hover(run, budget) for run in runs],
        queries=[query(run) for run in runs],
        opacity=opacity, name=name, colour=colour, symbol=symbol, size=size,
    )  # fmt: skip


def _dashed(figure: go.Figure, budget: Budget, runs: Sequence[Run]) -> None:
    """The budget as a line: upright for a cost, level for a perplexity."""
    style = {"color": GREY, "width": 1.5, "dash": "dash"}
    if budget.share is not None:
        highest = max([2.0, *(min(run.ratio, 1e6) for run in runs)])
        x, y = [100 * budget.share] * 2, [LEAST_INCREASE, shown_increase(highest)]
    else:
        x, y = [100 * LEAST_SHARE, 100], [shown_increase(budget.ratio)] * 2
    figure.add_scatter(x=x, y=y, mode="lines", line=style, name="budget", hoverinfo="skip")


def _hover(run: Run, budget: Budget) -> str:
    """Perplexity, the whole recipe, in short lines, and the cost."""
    return (
        f"perplexity {change(run.ratio, run.stderr)}<br>{wrapped(in_words(run.spec))}"
        f"<br>{100 * budget.cost_of(run):.1f} %"
    )
