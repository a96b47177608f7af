"""The plot of trade-offs: any two measured axes, and a line through what no other run beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import plotly.graph_objects as go

from ...measure.notation import change
from ...models import default_calibration
from ..shell.preview import preset_name
from ..shell.records import Record
from ..shell.run_words import recipe_of
from ..tabs.published import Published
from .cost_plot import (
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
from .trained import add_arrows, said_at_both, trained_pairs

HEIGHT = 460  # pixels
PALE = 0.35  # opacity of what another run beats
Error = tuple[float, float] | None  # how far it reaches below and above


@dataclass(frozen=True)
class Axis:
    """Something measured, with what is better."""

    label: str
    value: Callable[[Record], float | None]
    error: Callable[[Record], Error]
    dense: float
    unit: str = "% of dense"
    higher_is_better: bool = False
    published: Callable[[Published], float | None] = lambda _: None


def _none(_: Record) -> Error:
    return None


def _increase_error(record: Record) -> Error:
    error = 100 * record.run.stderr
    return (error, error) if isfinite(error) else None


def _speed_error(record: Record) -> Error:
    speed = record.speed
    return None if speed is None else (speed.median - speed.low, speed.high - speed.median)


AXES = {
    "perplexity": Axis(
        "perplexity", lambda r: shown_increase(r.run.ratio), _increase_error,
        LEAST_INCREASE, unit="× dense", published=lambda p: shown_increase(p.ratio),
    ),
    "nonzero": Axis(
        "non-zero parameters", lambda r: 100 * r.run.nonzero_share, _none, 100,
        published=lambda p: _percent(p.nonzero_share),
    ),
    "mlp_nonzero": Axis(
        "non-zero MLP parameters", lambda r: 100 * r.run.mlp_nonzero_share, _none, 100,
        published=lambda p: _percent(p.mlp_nonzero_share),
    ),
    "macs": Axis(
        "multiply-adds per token", lambda r: 100 * r.run.macs_share, _none, 100
    ),
    "mlp_macs": Axis(
        "MLP multiply-adds per token", lambda r: 100 * r.run.mlp_macs_share, _none, 100,
        published=lambda p: _percent(p.mlp_macs_share),
    ),
    "speed": Axis(
        "writing speed", lambda r: r.speed and r.speed.median, _speed_error, 1,
        unit="× dense", higher_is_better=True,
    ),
}  # fmt: skip
LAYERS = {
    "runs": "my runs",
    "sweep": "sweeps",
    "shipped": "shipped comparison",
    "published": "published elsewhere",
}
# layer -> colour, symbol
STYLES = {
    "runs": (CONVERTED, "circle", 11),
    "sweep": (CONVERTED, "circle-open", 9),
    "shipped": (GREY, "diamond", 8),
}


def tradeoff_plot(
    layers: dict[str, Sequence[Record]], published: Sequence[Published], x: str, y: str
) -> go.Figure:
    """layers: key of STYLES -> runs, all of one model on one text. Presets are squares; runs that
    another one beats in both axes are pale. A conversion that was trained is joined to the same one
    without training. published: figures of others, which beat nothing."""
    across, up = AXES[x], AXES[y]
    figure = go.Figure()
    points = [
        (layer, record, across.value(record), up.value(record))
        for layer, records in layers.items()
        for record in records
    ]
    points = [p for p in points if None not in p[2:] and all(map(isfinite, p[2:]))]
    best = front([p[2:] for p in points], across, up)
    joined = sorted({points[i][2:] for i in best})
    add_unbeaten(figure, [p[0] for p in joined], [p[1] for p in joined])
    runs = [point[1].run for point in points]
    pairs = trained_pairs(runs, [_calibrated_on(point[1]) for point in points])
    said = said_at_both(runs, pairs)
    for layer, (colour, symbol, size) in STYLES.items():
        of_layer = [i for i, point in enumerate(points) if point[0] == layer]
        for pale in (True, False):
            some = [i for i in of_layer if (i not in best) == pale]
            # presets last: the legend shows the symbol of the first point
            some.sort(key=lambda i: bool(preset_name(points[i][1].run.spec)))
            records = [points[i][1] for i in some]
            presets = [bool(preset_name(record.run.spec)) for record in records]
            add_points(
                figure,
                [points[i][2] for i in some],
                [points[i][3] for i in some],
                errors_x=_errors([across.error(record) for record in records], colour),
                errors_y=_errors([up.error(record) for record in records], colour),
                queries=[record.query for record in records],
                texts=[_hover(points[i][1]) + said.get(i, "") for i in some],
                opacity=PALE if pale else 1,
                colour=colour,
                size=size,
                symbol=["square" if preset else symbol for preset in presets],
                name=LAYERS[layer],
                legendgroup=layer,
                showlegend=bool(some) and (not pale or len(some) == len(of_layer)),
            )
    add_arrows(
        figure,
        [(points[before][2:], points[after][2:]) for before, after in pairs],
        [STYLES[points[after][0]][0] for _, after in pairs],
    )
    _published(figure, published, across, up)
    add_dense(figure, across.dense, up.dense)
    finish(figure, HEIGHT)
    figure.update_layout(
        xaxis=_axis(x, layers, published),
        yaxis=_axis(y, layers, published),
        **LEGEND_ABOVE,
    )
    return figure


def front(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> set[int]:
    """The numbers of the points that no other point beats: none is at least as good in both axes
    and better in one."""
    signs = [-1 if axis.higher_is_better else 1 for axis in (across, up)]
    costs = [(signs[0] * x, signs[1] * y) for x, y in points]
    found, least = set(), float("inf")
    previous = None
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        if costs[index][1] < least or costs[index] == previous:
            found.add(index)
            least, previous = costs[index][1], costs[index]
    return found


def _published(
    figure: go.Figure, published: Sequence[Published], across: Axis, up: Axis
) -> None:  # fmt: skip
    some = [(p, across.published(p), up.published(p)) for p in published]
    some = [point for point in some if None not in point[1:]]
    add_points(
        figure, [p[1] for p in some], [p[2] for p in some], name=LAYERS["published"],
        texts=[wrapped(p[0].about) for p in some], colour=GREY, symbol="x-thin", size=9,
        marker={"line": {"width": 2, "color": GREY}},
    )  # fmt: skip


def _axis(name: str, layers: dict[str, Sequence[Record]], published: Sequence[Published]) -> dict:
    axis = AXES[name]
    if name == "perplexity":
        ratios = [record.run.ratio for records in layers.values() for record in records]
        return increase_axis([*ratios, *(p.ratio for p in published)])
    better = "; higher is better" if axis.higher_is_better else ""
    values = [axis.value(record) for records in layers.values() for record in records]
    values += [axis.published(p) for p in published]
    known = [axis.dense, *(v for v in values if v is not None and isfinite(v))]
    low, high = min([0.9 * axis.dense, *known]), max([1.02 * axis.dense, *known])
    room = 0.05 * (high - low)
    return {"title": f"{axis.label}, {axis.unit}{better}", "range": [low - room, high + room]}


def _errors(errors: Sequence[Error], colour: str) -> dict | None:
    if not any(errors):
        return None
    below, above = zip(*(error or (0.0, 0.0) for error in errors), strict=True)
    return error_bars(below, above, colour)


def _hover(record: Record) -> str:
    run = record.run
    figures = (
        f"perplexity {change(run.ratio, run.stderr)}<br>"
        f"non-zero {100 * run.nonzero_share:.1f} % ({100 * run.mlp_nonzero_share:.1f} % of MLPs)"
        f"<br>compute {100 * run.macs_share:.1f} % ({100 * run.mlp_macs_share:.1f} % of MLPs)"
    )
    return f"{wrapped(recipe_of(run.spec))}<br>{figures}"


def _calibrated_on(record: Record) -> str:
    return record.calibration or default_calibration(record.model)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
