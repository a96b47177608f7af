"""The plot of trade-offs: what no other run beats, on every pair of axes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec
from mlpmoe.explorer.plots.style import CONVERTED
from mlpmoe.explorer.plots.tradeoff_plot import AXES, LAYERS, PALE, STYLES, front, tradeoff_plot
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.tabs.published import Published, published
from mlpmoe.measure.cost.speed import Ratio
from tests.explorer.made import made_record

NAMES = list(AXES)
ELSEWHERE = [
    Published("Wanda <b>", "Llama", "WikiText-2", "a paper", 5.0, 6.0, 0.5, 0.4, 0.9),
    Published("Other", "Llama", "C4", "another paper", 5.0, 9.0),
]


def drawn(figure: go.Figure, name: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.name == name]


def points_of(figure: go.Figure) -> dict[str, tuple[float, float, float, str]]:
    """Query of a run -> where it is drawn, how opaque, with which symbol."""
    found = {}
    for trace in figure.data:
        for i, query in enumerate(trace.customdata if trace.customdata is not None else []):
            assert query not in found
            found[query] = trace.x[i], trace.y[i], trace.opacity, trace.marker.symbol[i]
    return found


# the front


def beaten(mine: tuple[float, float], others, axes) -> bool:
    """Whether some other point is at least as good in both axes and better in one."""

    def at_least(a: float, b: float, axis) -> bool:
        return a >= b if axis.higher_is_better else a <= b

    return any(
        all(at_least(o, m, axis) for o, m, axis in zip(other, mine, axes, strict=True))
        and other != mine
        for other in others
    )


few = st.integers(0, 4).map(float)  # so that there are ties
coordinates = st.tuples(few | st.floats(0, 5), few | st.floats(0, 5))


@given(st.lists(coordinates, max_size=14), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_the_front_is_what_no_other_beats(points, x, y):
    axes = AXES[x], AXES[y]
    expected = {i for i, point in enumerate(points) if not beaten(point, points, axes)}
    assert front(points, *axes) == expected


def test_axes_know_what_is_better():
    assert [name for name, axis in AXES.items() if axis.higher_is_better] == ["speed"]
    points = [(50.0, 1.2), (60.0, 1.3), (60.0, 1.1)]
    assert front(points, AXES["nonzero"], AXES["speed"]) == {0, 1}
    assert front(points, AXES["nonzero"], AXES["perplexity"]) == {0, 2}


# every point where it was measured

shares = st.sampled_from([0.4, 0.6, 0.8]) | st.floats(0.2, 1.3)
speeds = st.none() | st.builds(
    lambda m, d: Ratio(m, m - d, m + d), st.floats(0.5, 3), st.floats(0, 0.4)
)


@st.composite
def layers(draw):
    found: dict[str, list[Record]] = {layer: [] for layer in STYLES}
    for keep in range(1, draw(st.integers(0, 9)) + 1):
        record = made_record(
            ConversionSpec(branches=32, keep=keep),
            ratio=draw(st.sampled_from([1.1, 1.3, inf]) | st.floats(0.9, 9)),
            stderr=draw(st.floats(0, 0.1) | st.just(inf)),
            nonzero_share=draw(shares), mlp_nonzero_share=draw(shares), macs_share=draw(shares),
            mlp_macs_share=draw(shares), speed=draw(speeds),
        )  # fmt: skip
        found[draw(st.sampled_from(sorted(STYLES)))].append(record)
    return found


def value(record: Record, axis: str) -> float | None:
    """A figure as the plot has it, written out once more."""
    if axis == "perplexity":
        return min(max(0.1, 100 * (record.run.ratio - 1)), 1e8)
    if axis == "speed":
        return None if record.speed is None else record.speed.median
    name = {"macs": "macs_share", "mlp_macs": "mlp_macs_share"}.get(axis, f"{axis}_share")
    return 100 * getattr(record.run, name)


@given(layers(), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_every_run_is_drawn_where_it_was_measured_and_pale_where_it_is_beaten(made, x, y):
    figure = tradeoff_plot(made, ELSEWHERE, x, y)
    found = points_of(figure)
    records = [r for some in made.values() for r in some]
    where = {r.query: (value(r, x), value(r, y)) for r in records}
    where = {query: point for query, point in where.items() if None not in point}
    assert set(found) == set(where)
    axes = AXES[x], AXES[y]
    for query, (at, up, opacity, _) in found.items():
        assert (at, up) == pytest.approx(where[query])
        assert opacity == (PALE if beaten(where[query], where.values(), axes) else 1)
    (line,) = drawn(figure, "not beaten")
    best = {point for point in where.values() if not beaten(point, where.values(), axes)}
    joined = list(zip(line.x, line.y, strict=True))
    assert joined == sorted(joined)
    flat = [figure for point in sorted(best) for figure in point]
    assert [figure for point in joined for figure in point] == pytest.approx(flat)
    for layer in STYLES:
        in_legend = [t for t in drawn(figure, LAYERS[layer]) if t.showlegend]
        assert len(in_legend) == any(r.query in where for r in made[layer])


@pytest.mark.parametrize(("x", "y"), list(product(NAMES, NAMES)))
def test_every_pair_of_axes_draws(x, y):
    made = {
        "runs": [made_record(speed=Ratio(1.2, 1.1, 1.3)),
                 made_record(ConversionSpec(keep=3), ratio=inf, stderr=inf)],
        "sweep": [made_record(ConversionSpec(keep=5))],
    }  # fmt: skip
    figure = tradeoff_plot(made, published(), x, y)
    figure.to_json()
    for name, layout in ((x, figure.layout.xaxis), (y, figure.layout.yaxis)):
        assert AXES[name].label in layout.title.text
        assert ("higher is better" in layout.title.text) == (name == "speed")
        assert layout.type == ("log" if name == "perplexity" else None)
        low, high = layout.range
        for query, point in points_of(figure).items():
            at = point[0] if layout is figure.layout.xaxis else point[1]
            if name == "perplexity":
                continue
            assert low < at < high, query
    empty = tradeoff_plot({}, [], x, y)
    (dense,) = drawn(empty, "dense")
    assert (dense.x[0], dense.y[0]) == (AXES[x].dense, AXES[y].dense)


def test_error_bars_are_those_that_were_measured():
    made = {"runs": [made_record(stderr=0.02, speed=Ratio(1.2, 1.05, 1.25))]}
    figure = tradeoff_plot(made, [], "speed", "perplexity")
    (trace,) = (t for t in drawn(figure, LAYERS["runs"]) if len(t.x))
    assert [*trace.error_x.arrayminus, *trace.error_x.array] == pytest.approx([0.15, 0.05])
    assert [*trace.error_y.arrayminus, *trace.error_y.array] == pytest.approx([2, 2])
    plain = tradeoff_plot(made, [], "nonzero", "macs")
    (trace,) = (t for t in drawn(plain, LAYERS["runs"]) if len(t.x))
    assert trace.error_x.array is None and trace.error_y.array is None
    unknown = {"runs": [made_record(stderr=inf), made_record(ConversionSpec(keep=3), ratio=1.1)]}
    figure = tradeoff_plot(unknown, [], "nonzero", "perplexity")
    bars = [b for t in drawn(figure, LAYERS["runs"]) if len(t.x) for b in t.error_y.array or [0]]
    assert sorted(bars) == pytest.approx([0, 1])


def test_presets_are_squares():
    name = "Keep 12 of 16 (paper)"
    specs = PRESETS[name], ConversionSpec(keep=3)
    made = {
        layer: [made_record(spec, model=f"owner/{layer}") for spec in specs] for layer in STYLES
    }
    found = points_of(tradeoff_plot(made, [], "nonzero", "perplexity"))
    for layer, (_, symbol, _) in STYLES.items():
        preset, other = made[layer]
        assert found[preset.query][3] == "square"
        assert found[other.query][3] == symbol != "square"


def test_what_others_published_stands_apart():
    """It beats nothing, is beaten by nothing, and no click restores it."""
    mine = {"runs": [made_record(ratio=1.5, nonzero_share=0.9)]}
    better = [Published("m", "l", "t", "s", 5.0, 5.05, 0.1, 0.1, 0.1)]
    alone, beside = (tradeoff_plot(mine, some, "nonzero", "perplexity") for some in ([], better))
    assert points_of(alone) == points_of(beside)
    assert points_of(beside)[mine["runs"][0].query][2] == 1
    (line,) = drawn(beside, "not beaten")
    assert len(line.x) == 1
    (layer,) = drawn(beside, LAYERS["published"])
    assert (layer.x[0], layer.y[0]) == pytest.approx((10, 1))
    assert layer.customdata is None
    assert layer.marker.color != CONVERTED
    assert "Not to be ranked" in layer.text[0].replace("<br>", " ")
    low, high = beside.layout.xaxis.range
    assert low < 10 < high
    (layer,) = drawn(tradeoff_plot(mine, better, "speed", "perplexity"), LAYERS["published"])
    assert not len(layer.x)  # nobody has published that


def test_published_figures_say_where_they_are_from():
    for entry in published():
        assert entry.ratio == pytest.approx(entry.perplexity / entry.dense)
        assert 0.9 < entry.ratio
        assert entry.source and entry.model and entry.text
        shares = (entry.nonzero_share, entry.mlp_nonzero_share, entry.mlp_macs_share)
        assert any(share is not None for share in shares)
        assert all(share is None or 0 < share <= 1 for share in shares)
        assert entry.method in entry.about


def test_notes_hold_no_html_but_line_breaks():
    record = made_record(PRESETS["Keep 12 of 16 (paper)"])
    figure = tradeoff_plot({"runs": [replace(record)]}, [], "nonzero", "perplexity")
    (trace,) = (t for t in drawn(figure, LAYERS["runs"]) if len(t.x))
    (note,) = trace.text
    assert "<" not in note.replace("<br>", "")
    assert max(map(len, note.split("<br>"))) < 80
    assert "Keep 12 of 16" in note.replace("<br>", " ")
