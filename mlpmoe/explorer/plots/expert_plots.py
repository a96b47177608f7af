"""Figures of routed experts: shared share, and how much neurons vary."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from .ridges import finish, ticks
from .style import CONVERTED, GREY

SPLIT_HEIGHT = 280  # pixels
ROUTED = "#f0c394"  # what runs for some tokens; what always runs has the full colour


def shared_split(
    shared: Sequence[float], routed: Sequence[float], idle: Sequence[float], of: str = "neurons"
) -> go.Figure:
    """Bars per layer: share of the neurons (or of what else) that always run, run by routing, or
    are idle."""
    layers = list(range(len(shared)))
    figure = go.Figure()
    for name, values, colour in (
        ("always", shared, CONVERTED),
        ("by routing", routed, ROUTED),
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
        yaxis={"title": of, "ticksuffix": " %", "range": [0, 100]},
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
