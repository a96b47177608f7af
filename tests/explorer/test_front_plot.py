"""The plot of a search: every point where it was measured, and the front through the best."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec
from mlpmoe.explorer.plots.cost_plot import COST_TITLES, LEAST_INCREASE
from mlpmoe.explorer.plots.front_plot import front_plot
from mlpmoe.measure.notation import change
from mlpmoe.measure.runs.search import Budget, best
from mlpmoe.measure.words import in_words
from tests.explorer.searched import a_run, beaten, compute, nonzero, trace

some_specs = st.sampled_from(
    [*PRESETS.values(), *(ConversionSpec(branches=32, keep=k) for k in range(1, 32))]
)
shares = st.one_of(st.sampled_from([0.3, 0.5, 0.7]), st.floats(0.2, 1.1))
ratios = st.one_of(
    st.sampled_from([1.0, 1.1, 1.3]), st.floats(0.9, 3), st.sampled_from([1e5, 1e300])
)
some_runs = st.lists(
    st.builds(a_run, cost=shares, ratio=ratios, spec=some_specs, stderr=st.floats(0, 0.1),
              macs=shares),
    max_size=12, unique_by=lambda r: r.spec,
)  # fmt: skip
budgets = st.sampled_from(
    [Budget("nonzero", 0.5), Budget("compute", 0.7), Budget("nonzero", None, 1.2)]
)


def height(ratio: float) -> float:
    return min(max(LEAST_INCREASE, 100 * (ratio - 1)), 1e8)


@settings(max_examples=60)
@given(some_runs, some_runs, budgets)
def test_the_front_is_what_no_other_beats(tried, measured, budget):
    figure = front_plot(tried, measured, budget)
    cost = compute if budget.cost == "compute" else nonzero
    line = trace(figure, "not beaten")
    front = {(cost(r), r.ratio) for r in measured if not beaten(r, measured, cost)}
    assert list(line.x) == pytest.approx([100 * x for x, _ in sorted(front)])
    assert list(line.y) == pytest.approx([height(y) for _, y in sorted(front)])
    assert line.line.shape == "hv"  # between two points nothing was measured


@settings(max_examples=60)
@given(some_runs, some_runs, budgets)
def test_every_point_is_drawn_where_it_was_measured(tried, measured, budget):
    figure = front_plot(tried, measured, budget, lambda run: run.spec.to_query())
    cost = compute if budget.cost == "compute" else nonzero
    presets = [r for r in measured if r.spec in PRESETS.values()]
    others = [r for r in measured if r not in presets]
    drawn = {"tried in the search": tried, "presets": presets, "measured finds": others}
    for name, runs in drawn.items():
        points = trace(figure, name)
        assert list(points.x) == pytest.approx([100 * cost(r) for r in runs])
        assert list(points.y) == pytest.approx([height(r.ratio) for r in runs])
        assert list(points.customdata) == [r.spec.to_query() for r in runs]
        assert points.showlegend is bool(runs)
        for note, r in zip(points.text, runs, strict=True):
            assert in_words(r.spec) in note.replace("<br>", " ")
            assert change(r.ratio, r.stderr) in note
            assert set(re.findall(r"<[^>]*>", note)) <= {"<br>"}
            assert max(map(len, note.split("<br>"))) < 80
    star, found = trace(figure, "suggested"), best(measured, budget)
    assert list(star.customdata) == ([found.spec.to_query()] if found else [])
    assert len(trace(figure, "dense").x) == 1
    assert figure.layout.xaxis.title.text == COST_TITLES[budget.cost]
    assert figure.layout.yaxis.type == "log"
    figure.to_json()


def test_the_budget_is_dashed():
    upright = trace(front_plot([], [a_run()], Budget("nonzero", 0.6)), "budget")
    assert list(upright.x) == [60, 60]
    assert upright.y[0] < upright.y[1]
    level = trace(front_plot([], [a_run()], Budget("nonzero", None, 1.05)), "budget")
    assert list(level.y) == pytest.approx([5, 5])
    assert level.line.dash == upright.line.dash == "dash"
