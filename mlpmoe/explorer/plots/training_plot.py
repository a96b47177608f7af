"""The curve of a training: how far the converted model is from the dense one, step by step."""

from __future__ import annotations

from math import isfinite

import plotly.graph_objects as go

from ...core.recovery.report import RecoveryReport
from .ridges import finish
from .style import CONVERTED, DENSE, GREY

HEIGHT = 260  # pixels


def training_plot(report: RecoveryReport) -> go.Figure:
    """KL divergence on held-out text by step, between the untrained model and the dense one."""
    looks = [look for look in report.looks if isfinite(look.held_out)]
    last = max(1, report.steps)
    figure = go.Figure()
    figure.add_scatter(
        x=[look.step for look in looks], y=[look.held_out for look in looks],
        mode="lines+markers", name="trained", line={"color": CONVERTED, "width": 2},
        hovertemplate="step %{x}: %{y:.4g} nats per token<extra></extra>",
    )  # fmt: skip
    for name, height, colour in (("untrained", report.before, GREY), ("dense", 0.0, DENSE)):
        figure.add_scatter(
            x=[0, last], y=[height, height], mode="lines", name=name, hoverinfo="skip",
            line={"color": colour, "width": 1.5, "dash": "dash"},
        )  # fmt: skip
    finish(figure, HEIGHT)
    figure.update_layout(
        xaxis={"title": "step", "range": [0, last]},
        yaxis={"title": "KL, nats per token", "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure
