"""Figures of the tab Tokens: drift through the layers, branch outputs and their correlations."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import plotly.graph_objects as go

from ...measure.quality.correlations import BranchStatistics
from ...measure.quality.drift import LayerDrift
from .ridges import even_scale, finish, ticks
from .style import CONVERTED, DAMAGE, GREY

DRIFT_HEIGHT = 320  # pixels
BRANCHES_HEIGHT = 360
# correlation −1 to 1; neither dense nor converted nor damage
SIGNED = ["#1f5f5b", "#7fb3ad", "rgba(136,136,136,0.12)", "#b9b06a", "#6e6414"]


def drift_plot(drift: Sequence[LayerDrift]) -> go.Figure:
    """Cosine on the left axis, relative error on the right one, layer by layer."""
    layers = [one.layer for one in drift]
    figure = go.Figure()
    figure.add_scatter(
        x=layers, y=[one.cosine for one in drift], mode="lines+markers", name="cosine",
        line={"color": CONVERTED, "width": 2}, marker={"size": 7},
        hovertemplate="layer %{x}: cosine %{y:.4f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=layers, y=[one.norm for one in drift], mode="lines+markers",
        name="size, converted / dense",
        line={"color": GREY, "width": 1.5, "dash": "dot"}, marker={"size": 6, "symbol": "square"},
        hovertemplate="layer %{x}: size × %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=layers, y=[100 * one.error for one in drift], mode="lines+markers", yaxis="y2",
        name="error (right)", line={"color": DAMAGE[3], "width": 2},
        marker={"size": 7, "symbol": "diamond"},
        hovertemplate="layer %{x}: error %{y:.1f} % of the state<extra></extra>",
    )  # fmt: skip
    finish(figure, DRIFT_HEIGHT)
    low = min([0.9, *(one.cosine for one in drift), *(one.norm for one in drift)])
    high = max([1.02, *(one.norm for one in drift)])
    figure.update_layout(
        xaxis={"title": "after layer", **ticks(len(layers), 12)},
        yaxis={"title": "cosine, size", "range": [low - 0.03, high + 0.02]},
        yaxis2={
            "title": "error", "overlaying": "y", "side": "right", "ticksuffix": " %",
            "range": [0, 1.1 * max([1.0, *(100 * one.error for one in drift)])],
            "showgrid": False, "fixedrange": True, "zeroline": False,
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 76, "r": 70},
        hovermode="closest",
    )  # fmt: skip
    return figure


def norms_plot(found: BranchStatistics) -> go.Figure:
    """Size of each branch's output; the dashed line is where all would be, if they were alike and
    uncorrelated."""
    branches = len(found.norms)
    expected = 100 / sqrt(branches)
    kept = [b < found.kept for b in range(branches)]
    figure = go.Figure()
    for name, colour, wanted in (("kept", CONVERTED, True), ("dropped", GREY, False)):
        some = [b for b in range(branches) if kept[b] == wanted]
        figure.add_bar(
            x=some, y=[100 * float(found.norms[b]) for b in some], name=name,
            marker={"color": colour, "opacity": 0.75},
            customdata=[100 * float(found.mean_share[b]) for b in some],
            hovertemplate="branch %{x}: %{y:.1f} % of the whole’s size; %{customdata:.1f} % of its "
            "square is its mean<extra></extra>",
            showlegend=bool(some),
        )  # fmt: skip
    figure.add_scatter(
        x=[-0.5, branches - 0.5], y=[expected, expected], mode="lines", name="1/√B",
        line={"color": GREY, "width": 1.5, "dash": "dash"}, hoverinfo="skip",
    )  # fmt: skip
    finish(figure, BRANCHES_HEIGHT)
    figure.update_layout(
        xaxis={"title": "branch", **ticks(branches, 8), "showgrid": False},
        yaxis={"title": "size of the output", "ticksuffix": " %", "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.2,
        margin={"l": 76},
    )
    return figure


def correlations_plot(found: BranchStatistics) -> go.Figure:
    """Heat map branch × branch; what is compared with itself is left blank."""
    values = found.correlation.clone()
    values.fill_diagonal_(float("nan"))
    rows = [[None if v != v else round(v, 4) for v in row] for row in values.tolist()]
    branches = len(rows)
    reach = max([0.1, *(abs(v) for row in rows for v in row if v is not None)])
    figure = go.Figure(
        go.Heatmap(
            z=rows, colorscale=even_scale(SIGNED), zmin=-reach, zmax=reach, xgap=1, ygap=1,
            colorbar={"title": {"text": "corr."}, "thickness": 12},
            hovertemplate="branches %{y} and %{x}<br>correlation %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    finish(figure, BRANCHES_HEIGHT)
    figure.update_layout(
        xaxis={"title": "branch", **ticks(branches, 8), "showgrid": False},
        yaxis={
            "title": "branch", **ticks(branches, 8), "autorange": "reversed", "showgrid": False
        },
    )  # fmt: skip
    return figure
