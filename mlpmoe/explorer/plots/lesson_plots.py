"""Figures of the lesson, from what its steps measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import sqrt
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from ...measure.runs.sweep import Run
from .ridges import finish, ticks
from .style import CONVERTED, DAMAGE, DENSE, GREY

if TYPE_CHECKING:
    from ..tabs.lesson_steps.fade import Faded
    from ..tabs.lesson_steps.keep import Kept

HEIGHT = 460  # pixels
ENLARGED = 1.5  # for a projector
SLIDE_HEIGHT = 564  # pixels that a slide has for a figure
LARGEST_MARKER = 15  # pixels
MOST_ALPHA = 4.0  # √(B/K) at K = 1 of 16; larger factors run out of the figure
LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
PLAIN = {"showgrid": False}


def fade_ridges(found: Faded, layer: int) -> go.Figure:
    """One histogram of |w| for each branch, cut at its threshold."""
    branches = found.branches
    figure = make_subplots(len(branches), 1, shared_xaxes=True, vertical_spacing=0.06)
    edges = found.edges.tolist()
    width = edges[1] - edges[0]
    centres = [edge + width / 2 for edge in edges[:-1]]
    top = max(1, *(int(b.counts.max()) for b in branches))
    for row, branch in enumerate(branches, 1):
        counts = branch.counts.tolist()
        # the bin of the threshold is split, so that the colours meet at the dashed line
        below = [min(1.0, max(0.0, (branch.threshold - edge) / width)) for edge in edges[:-1]]
        for name, colour, shares, start in (
            ("set to zero", DAMAGE[2], below, edges[:-1]),
            ("stays", CONVERTED, [1 - b for b in below], _starts(edges, below, width)),
        ):
            figure.add_bar(
                x=[s + width * share / 2 for s, share in zip(start, shares, strict=True)],
                y=[n if share else 0 for n, share in zip(counts, shares, strict=True)],
                width=[width * share for share in shares],
                marker={"color": colour, "opacity": 0.7, "line": {"width": 0}},
                customdata=list(zip(centres, counts, strict=True)),
                hovertemplate=f"branch {branch.branch}: %{{customdata[1]:,}} weights near "
                "|w| = %{customdata[0]:.3g}<extra></extra>",
                name=name, legendgroup=name, showlegend=row == 1, row=row, col=1,
            )  # fmt: skip
        if branch.threshold:
            figure.add_scatter(
                x=[branch.threshold] * 2, y=[0, 1.05 * top], mode="lines",
                line={"color": GREY, "width": 2, "dash": "dash"}, hoverinfo="skip",
                name="threshold", legendgroup="threshold", showlegend=row == len(branches),
                row=row, col=1,
            )  # fmt: skip
        figure.add_annotation(
            text=f"branch {branch.branch}", x=1, y=top, xref="x domain", xanchor="right",
            yanchor="top", showarrow=False, row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(
            range=[0, 1.08 * top], showticklabels=False, showgrid=False, row=row, col=1
        )
    finish(figure, HEIGHT)
    figure.update_layout(
        barmode="overlay", bargap=0, legend=LEGEND, margin={"l": 12}, hovermode="closest"
    )
    figure.update_xaxes(range=[0, edges[-1]])
    figure.update_xaxes(title=f"|w| of {found.projection}, layer {layer}", row=len(branches), col=1)
    return figure


def _starts(edges: Sequence[float], below: Sequence[float], width: float) -> list[float]:
    return [edge + width * share for edge, share in zip(edges[:-1], below, strict=True)]


def keep_curves(found: Kept, keep: int, factors: bool = True) -> go.Figure:
    """Above, size and direction of what is kept; below, the factors; both against K.

    factors: whether the measured ones are shown, or only what is published.
    """
    branches = len(found.size)
    ks = list(range(1, branches + 1))
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.2)

    def curve(row: int, name: str, values: Sequence[float], colour: str, dash: str) -> None:
        figure.add_scatter(
            x=ks, y=list(values), mode="lines+markers", name=name, row=row, col=1,
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": [11 if k == keep else 1 for k in ks], "color": colour},
            hovertemplate=f"K = %{{x}}: {name} %{{y:.2f}}<extra></extra>",
            legend="legend" if row == 1 else "legend2",
        )  # fmt: skip

    curve(1, "size, measured", found.size.tolist(), CONVERTED, "solid")
    curve(1, "√(K/B)", [sqrt(k / branches) for k in ks], GREY, "dash")
    curve(1, "cosine", found.cosine.tolist(), DENSE, "dot")
    curve(2, "√(B/K)", [sqrt(branches / k) for k in ks], GREY, "dash")
    if factors:
        curve(2, "least error", found.best.tolist(), CONVERTED, "solid")
        curve(2, "restores size", found.restoring.tolist(), CONVERTED, "dot")
    finish(figure, HEIGHT)
    figure.add_vline(x=keep, line={"color": GREY, "width": 1})
    figure.update_layout(
        legend=LEGEND, legend2={**LEGEND, "y": 0.41}, margin={"l": 56}, hovermode="closest"
    )
    lowest = min(0.0, float(found.cosine.min()))
    figure.update_yaxes(
        title="of the whole", range=[lowest - 0.03, max(1.08, float(found.size.max()) + 0.08)],
        row=1, col=1,
    )  # fmt: skip
    figure.update_yaxes(title="factor α", range=[0, MOST_ALPHA + 0.2], row=2, col=1)
    ticked = sorted({1, *range(0, branches + 1, max(1, branches // 4))} - {0})
    figure.update_xaxes(range=[0.5, branches + 0.5], tickvals=ticked, showgrid=False)
    figure.update_xaxes(title="K, branches kept", row=2, col=1)
    return figure


def routed_words(words: Sequence[str], size: Tensor, chosen: Tensor) -> go.Figure:
    """A square for each word and expert: as large as what the expert says about the word, filled
    where the router runs it. size, chosen: (words, experts)."""
    shown, experts = size.shape
    share = size / size.amax(dim=1, keepdim=True).clamp(min=1e-30)
    figure = go.Figure()
    for name, which, symbol, colour in (
        ("runs", chosen, "square", CONVERTED),
        ("does not run", ~chosen, "square-open", GREY),
    ):
        rows, columns = which.nonzero(as_tuple=True)
        figure.add_scatter(
            x=columns.tolist(), y=rows.tolist(), mode="markers", name=name,
            marker={
                "symbol": symbol, "color": colour, "line": {"width": 1.5, "color": colour},
                "size": (3 + (LARGEST_MARKER - 3) * share[which]).tolist(), "opacity": 1,
            },
            customdata=(100 * share[which]).tolist(),
            hovertemplate=f"expert %{{x}} {name}: says %{{customdata:.0f}} % of what the loudest "
            "says<extra></extra>",
        )  # fmt: skip
    finish(figure, HEIGHT)
    figure.update_layout(
        legend={**LEGEND, "itemsizing": "constant"},
        xaxis={
            "title": "expert", **ticks(experts, 8), "range": [-0.6, experts - 0.4], **PLAIN,
        },
        yaxis={
            "tickvals": list(range(shown)), "ticktext": [escape(word) for word in words],
            "range": [shown - 0.4, -0.6],
        },
        margin={"l": 76},
        hovermode="closest",
    )  # fmt: skip
    return figure


def training_lines(found: Mapping[str, Mapping[int, Run]], steps: int) -> go.Figure:
    """Perplexity to dense by steps of training, a line for each thing that is trained, between the
    untrained and the dense model. found: name -> steps -> run. steps: that is marked."""
    figure = go.Figure()
    for (name, runs), dash in zip(found.items(), ("solid", "dash", "dot"), strict=False):
        figure.add_scatter(
            x=list(runs), y=[run.ratio for run in runs.values()], mode="lines+markers", name=name,
            line={"color": CONVERTED, "dash": dash, "width": 2},
            marker={
                "size": [11 if n == steps else 5 for n in runs], "color": CONVERTED, "opacity": 1,
                "line": {"width": 0},
            },
            error_y={
                "array": [run.stderr for run in runs.values()], "color": CONVERTED, "thickness": 1,
                "width": 0,
            },
            hovertemplate=f"{name}, %{{x}} steps: × %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    every = [run for runs in found.values() for run in runs.values()]
    last = max(max(runs) for runs in found.values())
    top = max(run.ratio + run.stderr for run in every)
    untrained = next(iter(found.values()))[0].ratio
    for height, colour, words in ((untrained, GREY, "not trained"), (1.0, DENSE, "dense model")):
        figure.add_scatter(
            x=[0, last], y=[height] * 2, mode="lines", name=words, hoverinfo="skip",
            line={"color": colour, "width": 1.5, "dash": "longdash"},
        )  # fmt: skip
    finish(figure, HEIGHT)
    figure.add_vline(x=steps, line={"color": GREY, "width": 1})
    room = 0.08 * (top - 1)
    figure.update_layout(
        legend={**LEGEND, "traceorder": "normal"}, margin={"l": 64}, hovermode="closest",
        xaxis={"title": "steps of training", "range": [-0.03 * last, 1.03 * last], **PLAIN},
        yaxis={"title": "perplexity, × dense", "range": [1 - room, top + room]},
    )  # fmt: skip
    return figure


def enlarged(figure: go.Figure) -> go.Figure:
    """The same figure for a slide, to be read from the back of a room; the given one is changed."""
    layout = figure.layout
    figure.update_layout(
        height=SLIDE_HEIGHT,
        font={"size": round(ENLARGED * layout.font.size)},
        margin={side: round(ENLARGED * layout.margin[side]) for side in ("l", "r", "t", "b")},
    )
    for trace in figure.data:
        if trace.type != "scatter":
            continue
        if "lines" in trace.mode:
            trace.line.width = ENLARGED * trace.line.width
        if "markers" in trace.mode:
            trace.marker.size = [ENLARGED * size for size in trace.marker.size]
    return figure
