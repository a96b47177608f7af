"""The curve of the first screen: runs where they were measured, names that can be read, and the
present setting."""

from __future__ import annotations

from itertools import combinations
from math import inf, log10

import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmoe import ConversionSpec
from mlpmoe.explorer.launch import launch_kwargs
from mlpmoe.explorer.plots.cost_plot import LEAST_INCREASE, increase_axis, shown_increase
from mlpmoe.explorer.plots.curve import LINES, Here, curve
from mlpmoe.explorer.plots.labels import Box, along_line, around, beside, columns
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.measure.runs.families import along, cost_of, lines
from mlpmoe.measure.runs.sweep import Run
from mlpmoe.models import assets_folder
from tests.explorer.made import made_run

RECORDS = {key: shipped(key) for key in ("smollm2-135m", "demo")}
RUNS = {key: [record.run for record in records] for key, records in RECORDS.items()}
AXES = ("compute", "nonzero")


def points_of(figure: go.Figure) -> dict[str, list[tuple[float, float]]]:
    """Query -> where it is drawn."""
    found: dict[str, list[tuple[float, float]]] = {}
    for trace in figure.data:
        queries = trace.customdata or [None] * len(trace.x)
        for x, y, query in zip(trace.x, trace.y, queries, strict=True):
            if query is not None:
                found.setdefault(query, []).append((x, y))
    return found


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = figure.select_traces({"name": name})
    return found


@pytest.mark.parametrize("model", RUNS)
@pytest.mark.parametrize("axis", AXES)
def test_every_run_that_saves_something_is_drawn_once_and_restores_itself(model, axis):
    queries = {run.spec: f"q{i}" for i, run in enumerate(RUNS[model])}
    half = len(RUNS[model]) // 2
    figure = curve(RUNS[model][:half], RUNS[model][half:], None, axis, queries)
    found = points_of(figure)
    for run in RUNS[model]:
        share = run.mlp_macs_share if axis == "compute" else run.mlp_nonzero_share
        if share < 0.99:
            (at,) = found.pop(queries[run.spec])
            assert at == pytest.approx((100 * share, max(0.1, 100 * (run.ratio - 1))))
    assert not found
    figure.to_json()


@pytest.mark.parametrize("axis", AXES)
def test_lines_pass_through_their_runs_and_end_at_dense(axis):
    figure = curve(RUNS["smollm2-135m"], [], None, axis)
    for name, runs in lines(RUNS["smollm2-135m"], axis).items():
        drawn = trace(figure, name)
        where = dict(zip(drawn.x, drawn.y, strict=True))
        assert list(drawn.x) == sorted(drawn.x)
        for run in runs:
            assert where[100 * cost_of(run, axis)] == pytest.approx(shown_increase(run.ratio))
        assert where[100.0] == LEAST_INCREASE
        middle = drawn.x[len(drawn.x) // 2]
        assert where[middle] == pytest.approx(shown_increase(*along(runs, axis, [middle / 100])))


def test_here_is_hollow_while_estimated_and_solid_once_measured():
    def here(**told) -> go.Scatter:
        return trace(curve(RUNS["demo"], [], Here(0.8, **told), "compute"), "here")

    guess = here(ratio=1.5, low=1.2, high=3.0)
    assert "open" in guess.marker.symbol
    assert [guess.error_y.arrayminus[0], guess.error_y.array[0]] == pytest.approx([30, 150])
    known = here(ratio=1.5, stderr=0.02, measured=True)
    assert "open" not in known.marker.symbol
    assert [known.error_y.arrayminus[0], known.error_y.array[0]] == pytest.approx([2, 2])
    assert (known.x[0], known.y[0]) == pytest.approx((80, 50))
    unknown = here(ratio=None)
    assert unknown.mode == "lines" and list(unknown.x) == [80, 80]
    for broken in (here(ratio=inf, stderr=inf, measured=True), here(ratio=inf, low=9, high=inf)):
        assert broken.y[0] < inf and broken.error_y.array[0] < inf


def test_an_unknown_model_shows_what_to_expect_and_nothing_to_click():
    figure = curve([], [], Here(0.8, None), "compute", {ConversionSpec(): "q"})
    assert not points_of(figure)
    drawn = [t for t in figure.data if t.name in LINES]
    assert drawn and all(t.opacity < 1 for t in drawn)
    notes = " ".join(note.text for note in figure.layout.annotations)
    assert "SmolLM2-135M" in notes
    own = curve([], [made_run()], None, "compute")
    assert "SmolLM2" not in " ".join(note.text or "" for note in own.layout.annotations)


# the axis


@given(st.lists(st.floats(0.5, 1e7) | st.just(inf), max_size=6))
def test_ticks_are_ratios_where_they_belong(ratios):
    axis = increase_axis(ratios)
    low, high = axis["range"]
    assert len(axis["tickvals"]) == len(axis["ticktext"]) >= 4
    for value, text in zip(axis["tickvals"], axis["ticktext"], strict=True):
        stated = float(text.removeprefix("≤ ").replace(",", "").replace("10<sup>", "1e")
                       .removesuffix("</sup>"))  # fmt: skip
        assert value == pytest.approx(100 * (stated - 1))
        assert low < log10(value) < high
    assert all(low < log10(shown_increase(ratio)) < high for ratio in ratios)


# names

places = st.tuples(st.floats(110, 280), st.floats(0, 240))
names = st.lists(
    st.tuples(st.sampled_from([style.label for style in LINES.values()]), places),
    max_size=5, unique_by=lambda name: name[0],
)  # fmt: skip


@settings(max_examples=150)
@given(names)
def test_names_in_a_column_do_not_lie_on_each_other_or_outside(wanted):
    found = columns(wanted, 240)
    for (text, point), spot in zip(wanted, found, strict=True):
        assert spot.point == point
        assert spot.box.right < point[0]
        assert spot.box.left > -10
        assert -0.01 <= spot.box.top and spot.box.bottom <= 240.01, text
        if spot.leader is None:  # right beside its point
            assert (spot.box.top + spot.box.bottom) / 2 == pytest.approx(point[1], abs=1.1)
    for a, b in combinations(found, 2):
        assert a.box.overlap(b.box) < 0.05 * min(a.box.area, b.box.area)
    assert found == columns(wanted, 240)


def test_one_more_name_avoids_what_is_there():
    frame, point = Box(0, 300, 0, 240), (150.0, 120.0)
    free = beside("here", point, [], frame)
    covered = beside("here", point, [free.box], frame)
    assert covered.box.overlap(free.box) == 0
    corner = beside("here", (295.0, 5.0), [around((295, 5), 9)], frame)
    assert corner.box.overlap(frame) == pytest.approx(corner.box.area)
    line = along_line([(100, 120), (149, 120)])
    assert sum(beside("here", point, line, frame).box.overlap(box) for box in line) == 0


@pytest.mark.parametrize("model", RUNS)
@pytest.mark.parametrize("axis", AXES)
def test_every_line_has_its_name_once(model, axis):
    figure = curve(RUNS[model], [], Here(0.8, 1.2, 0.01, measured=True), axis)
    texts = [note.text for note in figure.layout.annotations]
    assert sorted(texts[:-1]) == sorted(LINES[name].label for name in lines(RUNS[model], axis))


def test_runs_of_a_visitor_far_to_the_left_make_room():
    few: list[Run] = [
        made_run(ConversionSpec(keep=1), ratio=900.0, mlp_macs_share=0.06),
        made_run(ConversionSpec(keep=9), ratio=9.0, mlp_macs_share=0.56),
    ]
    figure = curve(RUNS["smollm2-135m"], few, None, "compute")
    low, _ = figure.layout.xaxis.range
    assert low < 6
    assert min(figure.layout.xaxis.tickvals) >= 0


def test_every_script_of_the_assets_is_in_the_page():
    """But for those that a component runs itself; page.js first, whose functions others use."""
    scripts = {file.stem: file.read_text(encoding="utf-8") for file in assets_folder().glob("*.js")}
    assert {"curve", "page", "network"} <= scripts.keys()
    head = launch_kwargs()["head"]
    found = {name: head.find(script) for name, script in scripts.items()}
    assert [name for name, at in found.items() if at < 0] == ["network"]
    assert min(at for at in found.values() if at >= 0) == found["page"]
    assert head.count("</script>") == len(scripts) - 1  # none ends before its time
