"""Plotly figures from plain numbers. Binned data only; transparent, so they suit light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import plotly.graph_objects as go
import torch

from ...measure.cost.magnitudes import Magnitudes
from .style import CONVERTED, DAMAGE, GREY, GRID

RIDGES_HEIGHT = 520  # pixels; fixed, so the page does not jump
SIZE = 14  # pixels, of the letters; titles of axes are not larger than their numbers
TITLE = {"title": {"font": {"size": SIZE}}}
PLAIN = go.layout.Template(layout={"xaxis": TITLE, "yaxis": TITLE})
RIDGE_REACH = 0.95  # how far the tallest ridge rises, in rows
Point = tuple[float | None, float | None, str]


def branch_histograms(
    dense: Magnitudes, converted: Magnitudes, layer: int, projection: str, fades: bool = True
) -> go.Figure:
    """One ridge per branch over |w|: what stays, what fade removes, what K drops.

    dense: histograms of all B branches before conversion, in the same order of the neurons;
    converted: of those kept. Both on the same edges. Where one magnitude decides, the ridge is cut
    there; else what stays is drawn in front of what was, if it fades. (Without fade, down may be
    fitted anew, and layers that follow may sort otherwise.)
    """
    branches, kept = len(dense.counts), len(converted.counts)
    centres = ((dense.edges[:-1] + dense.edges[1:]) / 2).tolist()
    scale = RIDGE_REACH / max(1, int(dense.counts.max()))
    stays: list[Point] = []
    zeroed: list[Point] = []
    dropped: list[Point] = []
    dashes: list[Point] = []
    for b in range(branches):
        heights = (dense.counts[b] * scale).tolist()
        notes = [f"branch {b}<br>{n:,} weights" for n in dense.counts[b].tolist()]
        points = list(zip(centres, heights, notes, strict=True))
        threshold = converted.thresholds[b] if b < kept else 0.0
        if b >= kept:
            dropped += _area(points, b)
            continue
        if not _cut_at(threshold, dense, converted, b):
            if fades:
                zeroed += _area(points, b)
            after = (converted.counts[b] * scale).tolist()
            notes = [f"branch {b}<br>{n:,} weights stay" for n in converted.counts[b].tolist()]
            stays += _area(zip(centres, after, notes, strict=True), b)
            continue
        below = [p for p in points if p[0] <= threshold]
        above = [p for p in points if p[0] > threshold]
        if threshold > 0:
            edge = (threshold, _height_at(points, threshold), (below or points)[-1][2])
            above = [edge, *above]
            dashes += [(threshold, b, ""), (threshold, b - RIDGE_REACH, ""), (None, None, "")]
            if below:
                zeroed += _area([*below, edge], b)
        if above:
            stays += _area(above, b)
    width = 1 if branches <= 32 else 0.5  # many outlines would hide their fillings
    figure = go.Figure(
        [
            _filled(dropped, "dropped by K", GREY, 0.15, width),
            _filled(zeroed, "removed by fade", DAMAGE[2], 0.55, width),
            _filled(stays, "stays", CONVERTED, 0.55, width),
            go.Scatter(
                x=[p[0] for p in dashes],
                y=[p[1] for p in dashes],
                mode="lines",
                line={"color": DAMAGE[3], "width": 1.5, "dash": "dash"},
                name="fade threshold",
                hoverinfo="skip",
                showlegend=bool(dashes),
            ),
        ]
    )
    finish(figure, RIDGES_HEIGHT)
    figure.update_layout(
        xaxis={
            "title": f"|w| of {projection}, layer {layer}",
            "range": [0, float(dense.edges[-1])],
        },
        yaxis={"title": "branch", "range": [branches - 0.5, -1], **ticks(branches, 16)},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
    return figure


def _cut_at(threshold: float, dense: Magnitudes, converted: Magnitudes, branch: int) -> bool:
    """Whether what stays of a branch is what was there above the threshold."""
    above = dense.edges[:-1] > threshold if threshold else torch.ones_like(dense.edges[:-1]).bool()
    return torch.equal(dense.counts[branch][above], converted.counts[branch][above])


def _area(points: Iterable[Point], row: int) -> list[Point]:
    """A polygon standing on `row`, ended by a gap, so that one trace can hold many."""
    points = list(points)
    top = [(x, row - height, note) for x, height, note in points]
    start, end = points[0][0], points[-1][0]
    return [(start, row, ""), *top, (end, row, ""), (start, row, ""), (None, None, "")]


def _height_at(points: Sequence[Point], x: float) -> float:
    """Height of the outline at x, between the bin centres around it."""
    for (x0, y0, _), (x1, y1, _) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0 if x < points[0][0] else -1][1]


def _filled(
    points: list[Point], name: str, colour: str, opacity: float, width: float
) -> go.Scatter:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[p[0] for p in points],
        y=[p[1] for p in points],
        text=[p[2] for p in points],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{opacity})",
        line={"color": colour, "width": width},
        hoveron="points",
        hovertemplate="%{text} near |w| = %{x:.3g}<extra></extra>",
        name=name,
        showlegend=bool(points),
    )


def ticks(count: int, most: int) -> dict:
    """Whole-number ticks from 0, at most about `most`."""
    return {"tickvals": list(range(0, count, -(-count // most)))}


def even_scale(colours: Sequence[str]) -> list[list]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def finish(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        template=PLAIN,
        height=height,
        margin={"l": 56, "r": 12, "t": 36, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": SIZE},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, fixedrange=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, fixedrange=True)
