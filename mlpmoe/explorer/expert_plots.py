"""Figures of routed experts: trade-off, load, shared share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import torch
from torch import Tensor

from ..measure.notation import change
from .cost_plot import (
    COST_TITLES,
    LEGEND_ABOVE,
    add_dense,
    add_points,
    error_bars,
    increase_axis,
    shown_increase,
)
from .plots import even_scale, finish, ticks
from .style import CONVERTED, GREY

TRADEOFF_HEIGHT = 420  # pixels
LOAD_HEIGHT = 320
SPLIT_HEIGHT = 280
MOST_COLUMNS = 64
LOAD = ["#f3ece4", "#f0c394", "#e5954a", "#d9741a", "#8a4407"]  # never chosen to always chosen


@dataclass(frozen=True)
class Point:
    """One measured conversion in the trade-off plot."""

    name: str
    kind: str  # static, routed, bound or here
    compute: float  # share of the dense MLPs' multiply-adds
    ratio: float  # perplexity to dense
    stderr: float


# kind -> legend, colour, symbol. Static is what the paper's branches are; blue stays for dense.
KINDS = {
    "static": ("static", GREY, "square"),
    "routed": ("routed", CONVERTED, "circle"),
    "bound": ("oracle, a bound", CONVERTED, "circle-open"),
    "here": ("measured here", CONVERTED, "star"),
}


def tradeoff(points: Sequence[Point]) -> go.Figure:
    """Increase of perplexity against MLP compute. Logarithmic, or the best would lie on top of each
    other; what is less than LEAST_INCREASE counts as that, dense included."""
    figure = go.Figure()
    for kind, (legend, colour, symbol) in KINDS.items():
        some = [p for p in points if p.kind == kind]
        add_points(
            figure,
            [100 * p.compute for p in some],
            [shown_increase(p.ratio) for p in some],
            errors_y=error_bars([100 * p.stderr for p in some], colour=colour),
            texts=[
                f"{p.name}<br>perplexity {change(p.ratio, p.stderr)}"
                f"<br>{100 * p.compute:.1f} % of the MLP multiply-adds"
                for p in some
            ],
            colour=colour, symbol=symbol, size=15 if kind == "here" else 9, name=legend,
            marker={"line": {"color": "#ffffff" if kind == "here" else colour, "width": 1}},
        )  # fmt: skip
    add_dense(figure)
    finish(figure, TRADEOFF_HEIGHT)
    figure.update_layout(
        xaxis={"title": COST_TITLES["compute"], "range": [15, 105]},
        yaxis=increase_axis([point.ratio for point in points]),
        **LEGEND_ABOVE,
    )
    return figure


def expert_load(loads: Sequence[Tensor], shared: Sequence[int], single_neurons: bool) -> go.Figure:
    """Heat map layer × expert: share of the tokens that run it; shared experts run for all.

    loads: per layer, of the routed experts. Single neurons are sorted by load and averaged over
    groups, as there are too many.
    """
    rows = []
    for load, always in zip(loads, shared, strict=True):
        values = torch.cat([torch.ones(always), load])
        if single_neurons:
            groups = values.sort(descending=True).values.tensor_split(MOST_COLUMNS)
            values = torch.stack([group.mean() for group in groups if len(group)])
        rows.append((100 * values).tolist())
    width = max(map(len, rows))
    what = "neurons, busiest first, in groups" if single_neurons else "expert, shared ones first"
    figure = go.Figure(
        go.Heatmap(
            z=[row + [None] * (width - len(row)) for row in rows],
            colorscale=even_scale(LOAD),
            zmin=0,
            zmax=100,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "tokens"}, "ticksuffix": " %", "thickness": 12},
            hovertemplate="layer %{y}, no. %{x}<br>runs for %{z:.1f} % of tokens<extra></extra>",
        )
    )
    finish(figure, LOAD_HEIGHT)
    figure.update_layout(
        xaxis={"title": what, **ticks(width, 8), "showgrid": False},
        margin={"l": 76},
        yaxis={"title": "layer", **ticks(len(rows), 8), "autorange": "reversed", "showgrid": False},
    )
    return figure


def shared_split(
    shared: Sequence[float], routed: Sequence[float], idle: Sequence[float]
) -> go.Figure:
    """Bars per layer: share of the neurons that always run, run by routing, or are idle."""
    layers = list(range(len(shared)))
    figure = go.Figure()
    for name, values, colour in (
        ("always", shared, LOAD[4]),
        ("by routing", routed, LOAD[2]),
        ("not at all", idle, "rgba(128,128,128,0.25)"),
    ):
        figure.add_bar(
            x=layers, y=[100 * v for v in values], name=name, marker={"color": colour},
            hovertemplate=f"layer %{{x}}: %{{y:.1f}} % run {name}<extra></extra>",
        )  # fmt: skip
    finish(figure, SPLIT_HEIGHT)
    figure.update_layout(
        barmode="stack",
        margin={"l": 76},
        bargap=0.25,
        xaxis={"title": "layer", **ticks(len(layers), 12), "showgrid": False},
        yaxis={"title": "neurons", "ticksuffix": " %", "range": [0, 100]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure


def variation_histogram(values: Tensor, tau: float) -> go.Figure:
    """ExpertWeaver: how much the neurons of the model vary over samples, and the τ above which
    they count as specialised; logarithmic, since means near 0 make values explode."""
    logs = values.clamp(min=1e-3).log10()
    counts = torch.histc(logs, bins=60, min=-2, max=3)
    edges = torch.linspace(-2, 3, 61)
    centres = (10 ** ((edges[:-1] + edges[1:]) / 2)).tolist()
    figure = go.Figure(
        go.Scatter(
            x=centres, y=counts.tolist(), mode="lines", fill="tozeroy",
            line={"color": CONVERTED, "width": 1, "shape": "hvh"}, showlegend=False,
            hovertemplate="CV near %{x:.2f}: %{y:.0f} neurons<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=[tau, tau], y=[0, float(counts.max())], mode="lines", name=f"τ = {tau:.2f}",
        line={"color": GREY, "width": 1.5, "dash": "dash"}, hoverinfo="skip",
    )  # fmt: skip
    finish(figure, SPLIT_HEIGHT)
    figure.update_layout(
        xaxis={
            "title": "coefficient of variation over samples",
            "type": "log", "tickvals": [0.01, 0.1, 1, 10, 100, 1000],
        },
        yaxis={"title": "neurons"},
        margin={"l": 76},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    return figure
