"""What every plot of cost against quality has in common: the axis of perplexity, the dense model in
its corner, points with error bars that a click restores, and the line of what is not beaten."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log10
from typing import Any

import plotly.graph_objects as go

from .style import CONVERTED, DENSE

LEAST_INCREASE = 0.1  # per cent; less cannot be told from nothing on texts of this size
MOST_INCREASE = 1e8  # more is broken all the same
TICKS = (1.001, 1.01, 1.1, 2.0, *(10.0**power for power in range(1, 7)))  # ratios to dense
MORE_TICKS = (1.003, 1.03, 1.3, 4.0)  # between those, where there is room
COST_TITLES = {
    "nonzero": "non-zero MLP parameters, % of dense",
    "compute": "MLP multiply-adds, % of dense",
}
LINE = 60  # characters of a hover text


def shown_increase(ratio: float) -> float:
    """Of perplexity, in per cent, as the axis shows it."""
    return min(max(LEAST_INCREASE, 100 * (ratio - 1)), MOST_INCREASE)


def increase_axis(ratios: Sequence[float]) -> dict[str, Any]:
    """The axis of perplexity, from the least increase up to beyond the largest: logarithmic in the
    increase, or the best recipes would lie on top of each other, but labelled as ratios to dense,
    which say what they mean from 1.01 to 10,000."""
    top = max([10.0, *map(shown_increase, ratios)])
    ticks = TICKS if top >= 1000 else sorted((*TICKS, *MORE_TICKS))
    ticks = [ratio for ratio in ticks if 100 * (ratio - 1) < 1.6 * top]
    return {
        "title": "perplexity, × dense",
        "type": "log",
        "tickvals": [100 * (ratio - 1) for ratio in ticks],
        "ticktext": [_tick(ratio) for ratio in ticks],
        "range": [log10(LEAST_INCREASE) - 0.15, log10(top) + 0.2],
    }


def _tick(ratio: float) -> str:
    """In the width of a margin: from 100,000 on as a power of ten."""
    if ratio == TICKS[0]:
        return f"≤ {ratio:g}"
    return f"{ratio:,g}" if ratio < 1e5 else f"10<sup>{log10(ratio):.0f}</sup>"


def add_points(
    figure: go.Figure, xs: Sequence[float], ys: Sequence[float], *, name: str, colour: str,
    symbol: str | list[str], size: float, texts: Sequence[str],
    queries: Sequence[str | None] | None = None, errors_x: dict | None = None,
    errors_y: dict | None = None, opacity: float = 1.0, **trace: Any,
) -> None:  # fmt: skip
    """One trace of points. texts: what is shown of a point on pointing at it. queries: of the links
    that a click on a point restores; see page.js."""
    marker = {"color": colour, "symbol": symbol, "size": size} | trace.pop("marker", {})
    figure.add_scatter(
        x=xs, y=ys, error_x=errors_x, error_y=errors_y, text=texts, customdata=queries,
        mode="markers", opacity=opacity, marker=marker, name=name,
        hovertemplate="%{text}<extra></extra>", **{"showlegend": bool(len(xs))} | trace,
    )  # fmt: skip


def error_bars(
    below: Sequence[float], above: Sequence[float] | None = None, colour: str = CONVERTED
) -> dict[str, Any]:
    """Error bars that reach so far; what is not finite has none."""
    reach = {
        name: [value if isfinite(value) else 0.0 for value in values]
        for name, values in (("array", below if above is None else above), ("arrayminus", below))
    }
    return {"symmetric": False, "thickness": 1, "width": 0, "color": colour, **reach}


def add_unbeaten(figure: go.Figure, xs: Sequence[float], ys: Sequence[float]) -> None:
    """A line through what is not beaten; level between two points, where nothing was measured."""
    figure.add_scatter(
        x=xs, y=ys, mode="lines", line={"color": CONVERTED, "width": 1.5, "shape": "hv"},
        name="not beaten", hoverinfo="skip", showlegend=len(xs) > 1,
    )  # fmt: skip


def add_dense(figure: go.Figure, x: float = 100, y: float = LEAST_INCREASE, **trace: Any) -> None:
    """The dense model as a point: usually all of the cost, and no increase."""
    figure.add_scatter(
        x=[x], y=[y], mode="markers", name="dense",
        marker={"color": DENSE, "size": 12, "symbol": "diamond"},
        hovertemplate="dense<extra></extra>", **trace,
    )  # fmt: skip


# of a plot that stands by itself
LEGEND_ABOVE = {
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    "margin": {"l": 84},
    "hovermode": "closest",
}


def wrapped(text: str) -> str:
    """A text in short lines, for a point."""
    lines = []
    while len(text) > LINE and " " in text[:LINE]:
        cut = text.rindex(" ", 0, LINE)
        lines.append(text[:cut])
        text = text[cut + 1 :]
    return "<br>".join([*lines, text])
