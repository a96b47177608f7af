"""The curve of a training: how far the converted model is from the dense one, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

import plotly.graph_objects as go

from ...core.recovery.report import Look, RecoveryReport
from .ridges import finish
from .style import CONVERTED, DENSE, GREY

HEIGHT = 224  # pixels
SIZE = 13  # of the letters
BELOW = 0.12  # of the axis, for the name of the lowest line
HIGHEST = 1.25  # times what it was before training: so that the axis stays as it is


def training_plot(report: RecoveryReport) -> go.Figure:
    """KL divergence on held-out text by step, between the untrained model and the dense one, with
    the best step marked; under way as well, on axes that stay as they are. Thinner, the mean over
    the steps between two looks on the text that is trained on."""
    looks = [look for look in report.looks if isfinite(look.held_out)]
    last, untrained = max(1, report.planned), looks[0].held_out if looks else 1.0
    figure = go.Figure()
    for name, height, colour, words in (
        ("untrained", untrained, GREY, "before training"),
        ("dense", 0.0, DENSE, "0: as the dense model"),
    ):
        figure.add_scatter(
            x=[0, last], y=[height, height], mode="lines", name=name, hoverinfo="skip",
            line={"color": colour, "width": 1.5, "dash": "dash"}, showlegend=False,
        )  # fmt: skip
        figure.add_annotation(
            x=last, y=height, text=words, showarrow=False, font={"size": SIZE, "color": GREY},
            xanchor="right", yanchor="bottom" if height else "top", borderpad=1,
        )  # fmt: skip
    middles, means = _between(report.looks)
    figure.add_scatter(
        x=middles, y=means, mode="lines", name="trained on", opacity=0.7,
        line={"color": GREY, "width": 1.5, "dash": "dot"},
        hovertemplate="about step %{x:.0f}, on text it trains on: %{y:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[look.step for look in looks], y=[look.held_out for look in looks],
        mode="lines+markers", name="held out", line={"color": CONVERTED, "width": 2},
        marker={"size": 5},
        hovertemplate="step %{x}, on text it never trains on: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    best = [look for look in looks if look.step == report.best]
    figure.add_scatter(
        x=[look.step for look in best], y=[look.held_out for look in best], mode="markers",
        name="best", marker={"color": CONVERTED, "size": 12, "symbol": "diamond"},
        hovertemplate="best, step %{x}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    finish(figure, HEIGHT)
    top = max([HIGHEST * untrained, *(1.05 * look.held_out for look in looks), *means])
    figure.update_layout(
        xaxis={"title": {"text": "step", "standoff": 4}, "range": [0, 1.03 * last]},
        yaxis={"title": "KL, nats per token", "range": [-BELOW * top, top]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": SIZE}},
        margin={"l": 52, "r": 8, "t": 30, "b": 44}, hovermode="closest",
    )  # fmt: skip
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"size": SIZE}, title={"font": {"size": SIZE}})
    return figure


def _between(looks: Sequence[Look]) -> tuple[list[float], list[float]]:
    """The training loss between each two looks, and the steps in their middle."""
    found = [
        ((before.step + after.step) / 2, after.train)
        for before, after in pairwise(looks)
        if after.train is not None and isfinite(after.train)
    ]
    return [step for step, _ in found], [mean for _, mean in found]
