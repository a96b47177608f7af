"""The figures: what is drawn is what was measured, whole and at its place."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmoe import ConversionSpec
from mlpmoe.explorer.plots import style
from mlpmoe.explorer.plots.ridges import RIDGES_HEIGHT, branch_histograms
from mlpmoe.explorer.tabs.weights import histograms
from mlpmoe.measure.cost.magnitudes import Magnitudes, magnitudes

BINS = 10
UPPER = 2.0
CENTRES = [(i + 0.5) * UPPER / BINS for i in range(BINS)]

Polygon = list[tuple[float, float]]


def histogram(counts: list[list[int]], thresholds: list[float]) -> Magnitudes:
    return Magnitudes(
        edges=torch.linspace(0, UPPER, BINS + 1),
        counts=torch.tensor(counts),
        zeros=torch.zeros(len(counts), dtype=torch.int64),
        thresholds=tuple(thresholds),
    )


@st.composite
def ridges(draw):
    """Dense and converted histograms: B from 1 to 64, K up to B, some of the kept faded."""
    branches = draw(st.integers(1, 64))
    keep = draw(st.integers(1, branches))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (branches, BINS)
    counts = torch.randint(draw(st.sampled_from([1, 2, 10_000])), shape, generator=random)
    highest = draw(st.sampled_from([0.3, 1.0, 1.2])) * UPPER
    thresholds = CENTRES[0] + (highest - CENTRES[0]) * torch.rand(keep, generator=random)
    faded = torch.rand(keep, generator=random) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    dense = histogram(counts.tolist(), [0.0] * branches)
    return dense, histogram(counts[:keep].tolist(), (thresholds * faded).tolist())


few = settings(max_examples=25)


def polygons(figure: go.Figure, name: str) -> list[Polygon]:
    """The pieces of a trace between its gaps."""
    (trace,) = figure.select_traces({"name": name})
    pieces: list[Polygon] = [[]]
    for x, y in zip(trace.x, trace.y, strict=True):
        if x is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def row(polygon: Polygon) -> float:
    return polygon[0][1]


def area(polygon: Polygon) -> float:
    """Shoelace formula."""
    ring = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in ring)) / 2


@few
@given(ridges())
def test_one_ridge_per_branch_each_in_its_row(pair):
    dense, converted = pair
    figure = branch_histograms(dense, converted, 0, "gate")
    branches, keep = len(dense.counts), len(converted.counts)
    assert [row(p) for p in polygons(figure, "stays")] == list(range(keep))
    assert [row(p) for p in polygons(figure, "dropped by K")] == list(range(keep, branches))
    faded = [b for b in range(keep) if converted.thresholds[b]]
    assert [row(p) for p in polygons(figure, "removed by fade")] == faded


@few
@given(ridges())
def test_what_stays_and_what_is_removed_make_up_the_whole_ridge(pair):
    dense, converted = pair
    figure = branch_histograms(dense, converted, 0, "gate")
    whole = branch_histograms(dense, dense, 0, "gate")
    full = {row(p): area(p) for p in polygons(whole, "stays")}
    for b, threshold in enumerate(converted.thresholds):
        if threshold <= CENTRES[-1]:
            pieces = polygons(figure, "stays") + polygons(figure, "removed by fade")
            drawn = sum(area(p) for p in pieces if row(p) == b)
            assert drawn == pytest.approx(full[b], abs=1e-9)
    for polygon in polygons(figure, "dropped by K"):
        assert area(polygon) == pytest.approx(full[row(polygon)], abs=1e-9)


@few
@given(ridges())
def test_thresholds_part_what_stays_from_what_is_zeroed(pair):
    dense, converted = pair
    figure = branch_histograms(dense, converted, 0, "gate")
    for polygon in polygons(figure, "removed by fade"):
        threshold = converted.thresholds[int(row(polygon))]
        assert max(x for x, _ in polygon) == threshold
    for polygon in polygons(figure, "stays"):
        threshold = converted.thresholds[int(row(polygon))]
        assert min(x for x, _ in polygon) >= threshold


@few
@given(ridges())
def test_a_dashed_line_at_every_threshold(pair):
    dense, converted = pair
    figure = branch_histograms(dense, converted, 0, "gate")
    drawn = {int(row(line)): {x for x, _ in line} for line in polygons(figure, "fade threshold")}
    assert drawn == {b: {t} for b, t in enumerate(converted.thresholds) if t}


def test_a_threshold_below_the_first_bin_centre_is_drawn_too():
    dense = histogram([[100] * BINS] * 2, [0.0, 0.0])
    converted = histogram([[100] * BINS] * 2, [0.0, CENTRES[0] / 2])
    figure = branch_histograms(dense, converted, 0, "gate")
    lines = polygons(figure, "fade threshold")
    assert [(row(line), line[0][0]) for line in lines] == [(1, CENTRES[0] / 2)]


@few
@given(ridges())
def test_ridges_stay_in_the_picture(pair):
    dense, converted = pair
    figure = branch_histograms(dense, converted, 0, "gate")
    low, high = figure.layout.yaxis.range  # branch 0 on top
    for name in ("stays", "removed by fade", "dropped by K", "fade threshold"):
        for polygon in polygons(figure, name):
            assert all(high <= y <= low for _, y in polygon)
    assert list(figure.layout.xaxis.range) == [0, UPPER]


@few
@given(ridges())
def test_ridges_are_plain_numbers_of_a_fixed_height(pair):
    figure = branch_histograms(*pair, 3, "up")
    assert figure.layout.height == RIDGES_HEIGHT
    assert "up, layer 3" in figure.layout.xaxis.title.text
    text = figure.to_json()
    assert len(json.loads(text)["data"]) == 4
    assert len(text) < 64 * BINS * 200


@few
@given(ridges(), st.floats(0, 1))
def test_without_a_threshold_what_stays_lies_in_front_of_what_was(pair, left):
    """Other scores, and whole neurons: no one magnitude parts the two."""
    dense, converted = pair
    keep = len(converted.counts)
    after = (left * dense.counts[:keep]).long()
    figure = branch_histograms(dense, histogram(after.tolist(), [0.0] * keep), 0, "up")
    names = [trace.name for trace in figure.data]
    assert names.index("removed by fade") < names.index("stays")  # drawn later, so in front
    whole = branch_histograms(dense, dense, 0, "up")
    full = {row(p): area(p) for p in polygons(whole, "stays")}
    behind = {row(p): area(p) for p in polygons(figure, "removed by fade")}
    changed = [b for b in range(keep) if not torch.equal(after[b], dense.counts[b])]
    assert list(behind) == changed
    assert all(behind[b] == pytest.approx(full[b], abs=1e-9) for b in changed)
    front = {row(p): area(p) for p in polygons(figure, "stays")}
    assert list(front) == list(range(keep))
    scale = 0.95 / max(1, int(dense.counts.max()))
    for b in range(keep):
        counts = after[b].double()
        width = CENTRES[1] - CENTRES[0]
        expected = scale * width * float((counts[1:] + counts[:-1]).sum()) / 2
        assert front[b] == pytest.approx(expected, abs=1e-6)
    assert polygons(figure, "fade threshold") == []


def test_hover_texts_tell_what_was_and_what_stays():
    dense, after = [[1234] * BINS], [[1000] * BINS]
    figure = branch_histograms(histogram(dense, [0.0]), histogram(after, [0.0]), 0, "up")
    assert "branch 0<br>1,234 weights" in figure.data[1].text
    assert "branch 0<br>1,000 weights stay" in figure.data[2].text


def test_an_emptied_branch_keeps_its_row():
    dense, after = [[5] * BINS] * 2, [[5] * BINS, [0] * BINS]
    figure = branch_histograms(histogram(dense, [0.0] * 2), histogram(after, [0.0] * 2), 0, "up")
    assert [row(p) for p in polygons(figure, "removed by fade")] == [1]
    assert area(polygons(figure, "stays")[1]) == 0


def test_the_legend_names_only_what_is_there():
    counts = [[5] * BINS] * 4
    whole = branch_histograms(histogram(counts, [0.0] * 4), histogram(counts, [0.0] * 4), 0, "up")
    assert [trace.name for trace in whole.data if trace.showlegend] == ["stays"]
    some = branch_histograms(
        histogram(counts, [0.0] * 4), histogram(counts[:2], [0.0, 1.0]), 0, "up"
    )
    assert all(trace.showlegend for trace in some.data)


def test_hover_texts_give_the_counts():
    counts = [[1234, *[0] * (BINS - 1)], [0] * BINS]
    figure = branch_histograms(
        histogram(counts, [0.0] * 2), histogram(counts, [0.0] * 2), 0, "gate"
    )
    assert "branch 0<br>1,234 weights" in figure.data[2].text


@pytest.mark.parametrize("spec", [ConversionSpec(), ConversionSpec(fade=0.9, keep=10)])
def test_ridges_of_a_real_model(tiny, spec):
    whole = tiny.converted(ConversionSpec(branches=spec.branches))
    dense = magnitudes(whole, 1, "up", 60, 0.8)
    converted = magnitudes(tiny.converted(spec), 1, "up", 60, 0.8)
    figure = branch_histograms(dense, converted, 1, "up")
    assert len(polygons(figure, "stays")) == spec.kept
    assert len(polygons(figure, "dropped by K")) == spec.branches - spec.kept
    assert len(polygons(figure, "removed by fade")) == (spec.kept - 1 if spec.fade else 0)


@pytest.mark.parametrize("branches", [1, 2, 15, 16, 17, 63, 64])
def test_ticks_are_whole_branches_and_few(branches):
    counts = [[1] * BINS] * branches
    histograms = histogram(counts, [0.0] * branches)
    ticks = branch_histograms(histograms, histograms, 0, "gate").layout.yaxis.tickvals
    assert ticks[0] == 0
    assert 1 <= len(ticks) <= 16
    assert max(ticks) < branches


def test_only_colours_of_the_page():
    counts = [[3] * BINS] * 3
    figure = branch_histograms(
        histogram(counts, [0.0] * 3), histogram(counts[:2], [0, 1.0]), 0, "up"
    )
    named = [style.DENSE, style.CONVERTED, style.GREY, *style.DAMAGE]
    allowed = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in named}
    transparent = (0, 0, 0, 0)
    text = json.dumps(figure.to_plotly_json()["layout"]) + json.dumps(
        [trace.to_plotly_json() for trace in figure.data]
    )
    hexes = re.findall(r"#[0-9a-fA-F]{6}\b", text)
    assert hexes
    assert {tuple(int(h[i : i + 2], 16) for i in (1, 3, 5)) for h in hexes} <= allowed
    for numbers in re.findall(r"rgba?\(([^)]*)\)", text):
        parts = tuple(float(part) for part in numbers.split(","))
        assert parts[:3] in allowed or parts == transparent or f"rgba({numbers})" == style.GRID
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_nothing_is_shown_as_faded_where_nothing_fades(tiny):
    """down is fitted anew, so its weights change; none is removed by fade."""
    spec = ConversionSpec(branches=16, keep=8, order="activation", compensation="refit")
    figure = histograms(tiny, tiny.asked(spec), 0, "down")
    assert polygons(figure, "removed by fade") == []
    assert len(polygons(figure, "stays")) == 8
