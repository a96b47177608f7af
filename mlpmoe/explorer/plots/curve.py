"""The curve of the first screen: what each way of removing parts of the MLPs costs in perplexity,
with the conversion at hand among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10

import plotly.graph_objects as go

from ...core.spec import ConversionSpec
from ...measure.notation import change, number
from ...measure.runs.families import along, cost_of, lines, saving
from ...measure.runs.sweep import Run
from ...models.catalogue import REAL_KEY
from ..shell.run_words import recipe_of
from ..shell.shipped import shipped
from .cost_plot import (
    COST_TITLES,
    LEAST_INCREASE,
    add_dense,
    add_points,
    error_bars,
    increase_axis,
    shown_increase,
    wrapped,
)
from .labels import ROW, SIZE, Box, Pixels, along_line, around, beside, columns
from .ridges import finish
from .style import CONVERTED, GREY
from .trained import add_arrows, said_at_both, trained_pairs

HEIGHT = 330  # pixels
NARROWEST, SHORTEST = 360, 300  # pixels that the names of the lines find room in
MARGIN = {"l": 58, "r": 14, "t": 12, "b": 48}  # pixels
ROOM = 35  # of the dense cost: to the left of the cheapest point, for labels
STEPS = 60  # that a line is drawn in


@dataclass(frozen=True)
class Here:
    """The present setting."""

    cost_share: float  # of the dense MLPs' cost on this axis
    ratio: float | None  # of perplexity to dense; None: neither measured nor estimated
    stderr: float | None = None  # of a measured ratio
    low: float | None = None  # the range of an estimated one
    high: float | None = None
    measured: bool = False


@dataclass(frozen=True)
class _Line:
    label: str  # with line breaks
    colour: str
    dash: str
    symbol: str
    width: float = 2.0


_PUBLISHED = {"colour": CONVERTED, "symbol": "circle", "width": 2.5}
LINES = {
    "MLPMoE as published": _Line("MLPMoE<br>as published", dash="solid", **_PUBLISHED),
    "MLPMoE, K": _Line("MLPMoE, K", dash="solid", **_PUBLISHED),
    "MLPMoE, fade": _Line("MLPMoE, fade", dash="dash", **_PUBLISHED),
    "best static": _Line("best static", GREY, "solid", "square"),
    "best routed": _Line("best routed", GREY, "dash", "diamond"),
    "single neurons": _Line("single neurons", GREY, "dashdot", "triangle-up"),
    "input sparsity": _Line("input sparsity", GREY, "longdash", "triangle-down"),
    "low rank": _Line("low rank", GREY, "longdashdot", "cross"),
    "oracle": _Line("oracle (bound)", GREY, "dot", "circle-open", 1.0),
}


def curve(
    runs_shipped: Sequence[Run],
    runs_mine: Sequence[Run],
    here: Here | None,
    axis: str,
    queries: Mapping[ConversionSpec, str] | None = None,
) -> go.Figure:
    """Perplexity over the cost of the MLPs, all runs of one model on one text.

    axis: "compute" or "nonzero". queries: of the links that restore a run, by its spec. Without any
    runs, the shape that SmolLM2-135M's runs have is drawn palely, and the plot says so.
    """
    queries = queries or {}
    placed, mine = saving(runs_shipped, axis), saving(runs_mine, axis)
    expected = not placed and not mine
    found = lines([r.run for r in shipped(REAL_KEY)] if expected else [*placed, *mine], axis)
    figure = go.Figure()
    runs = [*placed, *mine]
    pairs = trained_pairs(runs)
    said = {id(runs[number]): words for number, words in said_at_both(runs, pairs).items()}
    on_lines = {id(run) for some in found.values() for run in some}
    if not expected:
        for some, colour, symbol, size, opacity in (
            (placed, GREY, "circle", 4, 0.5),
            (mine, CONVERTED, "circle-open", 7, 0.9),
        ):
            others = [run for run in some if id(run) not in on_lines]
            _add_runs(figure, others, axis, queries, said, colour, symbol, size, opacity)
    for name, some in found.items():
        _add_line(figure, name, some, axis, queries, said, pale=expected)
    add_arrows(
        figure,
        [tuple(_at(runs[number], axis) for number in pair) for pair in pairs],
        [GREY if after < len(placed) else CONVERTED for _, after in pairs],
    )
    add_dense(figure, showlegend=False)
    if here is not None:
        _add_here(figure, here)
    seen = [*(run for some in found.values() for run in some), *mine]
    heights = [run.ratio for run in seen]
    if here is not None and here.ratio is not None:
        heights.append(here.ratio)
    cheapest = [cost_of(run, axis) for run in seen]
    left = 100 * min([0.6, *cheapest, *([here.cost_share] if here else [])])
    ticks = range(0, 100, 10 if left > 45 else 20)
    xaxis = {
        "title": COST_TITLES[axis],
        "range": [left - ROOM, 103],
        "tickvals": [*ticks, 100],
        # on a phone 90 would touch the word at 100
        "ticktext": [*(str(tick) if tick < 90 else "" for tick in ticks), "<b>dense</b>"],
        "tickangle": 0,
    }
    finish(figure, HEIGHT)
    figure.update_layout(
        xaxis=xaxis, yaxis=increase_axis(heights), margin=MARGIN, showlegend=False,
        hovermode="closest", dragmode=False,
    )  # fmt: skip
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"size": SIZE}, title={"font": {"size": SIZE + 1}, "standoff": 8})
    _label(figure, found, axis, here, expected)
    return figure


def _add_runs(
    figure: go.Figure, runs: Sequence[Run], axis: str, queries: Mapping[ConversionSpec, str],
    said: Mapping[int, str], colour: str, symbol: str, size: float, opacity: float = 1.0,
    errors: bool = False,
) -> None:  # fmt: skip
    """said: more on a run, by its id."""
    add_points(
        figure,
        [_at(run, axis)[0] for run in runs],
        [_at(run, axis)[1] for run in runs],
        name="runs", colour=colour, symbol=symbol, size=size, opacity=opacity,
        texts=[
            f"perplexity {change(run.ratio, run.stderr)}<br>{wrapped(recipe_of(run.spec))}"
            f"{said.get(id(run), '')}"
            for run in runs
        ],
        queries=[queries.get(run.spec) for run in runs],
        errors_y=error_bars([100 * run.stderr for run in runs], colour=colour) if errors else None,
    )  # fmt: skip


def _add_line(
    figure: go.Figure, name: str, runs: Sequence[Run], axis: str,
    queries: Mapping[ConversionSpec, str], said: Mapping[int, str], pale: bool,
) -> None:  # fmt: skip
    style, cheapest = LINES[name], cost_of(runs[0], axis)
    # closer together towards dense, where lines are steep
    shares = [1 - (1 - cheapest) * (step / STEPS) ** 2 for step in range(STEPS + 1)]
    shares = sorted({*shares, *(cost_of(run, axis) for run in runs)})
    figure.add_scatter(
        x=[100 * share for share in shares],
        y=[shown_increase(ratio) for ratio in along(runs, axis, shares)],
        mode="lines", opacity=0.5 if pale else 1, name=name, hoverinfo="skip",
        line={"color": style.colour, "width": style.width, "dash": style.dash},
    )  # fmt: skip
    if not pale:
        _add_runs(figure, runs, axis, queries, said, style.colour, style.symbol, 8, errors=True)


def _at(run: Run, axis: str) -> tuple[float, float]:
    return 100 * cost_of(run, axis), shown_increase(run.ratio)


def _add_here(figure: go.Figure, here: Here) -> None:
    """Where we are: hollow with its range while it is estimated, solid with its error once it is
    measured, an upright line while nothing is known but the cost."""
    x = 100 * here.cost_share
    if here.ratio is None:
        figure.add_scatter(
            x=[x, x], y=[LEAST_INCREASE, 1e9], mode="lines", name="here", hoverinfo="skip",
            line={"color": CONVERTED, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        return
    y = shown_increase(here.ratio)
    if here.measured:
        errors = [100 * here.stderr] if here.stderr is not None else [0.0]
        bars, what = error_bars(errors), change(here.ratio, here.stderr or 0.0)
    else:
        low, high = here.low or here.ratio, here.high or here.ratio
        bars = error_bars([y - shown_increase(low)], [shown_increase(high) - y])
        what = f"about × {number(here.ratio)}, from neighbouring runs"
    add_points(
        figure, [x], [y], name="here", colour=CONVERTED,
        symbol="circle" if here.measured else "circle-open", size=15,
        texts=[f"here: perplexity {what}"], errors_y=bars | {"thickness": 2, "width": 4},
        marker={"line": {"width": 3 if not here.measured else 0, "color": CONVERTED}},
    )  # fmt: skip


def _label(
    figure: go.Figure, found: Mapping[str, Sequence[Run]], axis: str, here: Here | None,
    expected: bool,
) -> None:  # fmt: skip
    """A name at each line and at the present setting, placed for the narrowest plot."""
    width = NARROWEST - MARGIN["l"] - MARGIN["r"]
    height = SHORTEST - MARGIN["t"] - MARGIN["b"]
    (x0, x1), (y0, y1) = figure.layout.xaxis.range, figure.layout.yaxis.range

    def pixels(x: float, y: float) -> Pixels:
        return (x - x0) / (x1 - x0) * width, (y1 - log10(y)) / (y1 - y0) * height

    names = [
        (LINES[name].label, pixels(100 * cost_of(runs[0], axis), shown_increase(runs[0].ratio)))
        for name, runs in found.items()
    ]
    spots = columns(names, height)
    if here is not None:
        x = 100 * here.cost_share
        at = (pixels(x, 1)[0], ROW) if here.ratio is None else pixels(x, shown_increase(here.ratio))
        taken = [spot.box for spot in spots]
        for trace in figure.data:
            places = list(map(pixels, trace.x, trace.y))
            taken += along_line(places) if "lines" in trace.mode else [around(p, 4) for p in places]
        words = "here" if here.measured or here.ratio is None else "here,<br>estimated"
        names.append((f"<b>{words}</b>", at))
        spots.append(beside(names[-1][0], at, taken, Box(0, width, 0, height)))
    colours = [*(LINES[name].colour for name in found), CONVERTED]
    for (text, _), colour, spot in zip(names, colours, spots, strict=False):
        x, y = spot.point
        figure.add_annotation(
            x=x0 + x / width * (x1 - x0), y=y1 - y / height * (y1 - y0), text=text,
            font={"size": SIZE, "color": colour}, arrowcolor=colour, **spot.annotation(),
        )  # fmt: skip
    if expected:
        figure.add_annotation(
            x=0, y=0, xref="paper", yref="paper", xanchor="left", yanchor="bottom", align="left",
            showarrow=False, font={"size": SIZE}, borderpad=4,
            text="Expected shape, from<br>SmolLM2-135M. Measure for<br>this model's own points.",
        )  # fmt: skip
