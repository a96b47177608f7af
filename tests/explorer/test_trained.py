"""Arrows from conversions to the same ones trained, on both plots of runs."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import pytest

from mlpmoe import ConversionSpec
from mlpmoe.explorer.plots.curve import curve
from mlpmoe.explorer.plots.style import CONVERTED, GREY
from mlpmoe.explorer.plots.tradeoff_plot import tradeoff_plot
from mlpmoe.explorer.plots.trained import trained_pairs
from tests.explorer.made import made_record, made_run

PLAIN = ConversionSpec(keep=8)
FITTED = ConversionSpec(keep=8, order="least-squares", compensation="refit")


def trained(spec: ConversionSpec, what: str = "lora", **more) -> ConversionSpec:
    return replace(spec, recover=what, **more)


def arrows(figure: go.Figure) -> list[tuple]:
    """Where each begins and ends, and its colour."""
    return [
        ((t.x[0], t.y[0]), (t.x[1], t.y[1]), t.line.color)
        for t in figure.data
        if t.marker.symbol is not None and "arrow" in t.marker.symbol
    ]


def points(figure: go.Figure) -> dict[str, tuple]:
    """Query -> where a run is drawn, and what is said on pointing at it."""
    return {
        query: ((t.x[i], t.y[i]), t.text[i])
        for t in figure.data
        for i, query in enumerate(t.customdata if t.customdata is not None else [])
    }


@pytest.mark.parametrize("axis", ["macs", "nonzero"])
def test_a_trade_off_is_joined_to_the_same_without_training(axis):
    before = made_record(PLAIN, ratio=1.9, nonzero_share=0.6, macs_share=0.55)
    after = made_record(trained(PLAIN), ratio=1.3, nonzero_share=0.61, macs_share=0.56)
    alone = made_record(trained(ConversionSpec(keep=4)), ratio=2.3)  # its origin is not measured
    other = made_record(ConversionSpec(keep=12), ratio=1.1)
    made = {"runs": [after, alone], "sweep": [before, other]}
    figure = tradeoff_plot(made, [], axis, "perplexity")
    found = points(figure)
    assert arrows(figure) == [(found[before.query][0], found[after.query][0], CONVERTED)]
    x = {"macs": (55, 56), "nonzero": (60, 61)}[axis]
    assert arrows(figure)[0][:2] == (pytest.approx((x[0], 90)), pytest.approx((x[1], 30)))
    assert "without training: perplexity +90.0" in found[after.query][1]
    assert "LoRA (200 steps): perplexity +30.0" in found[before.query][1]
    assert all("training:" not in found[r.query][1] for r in (alone, other))
    figure.to_json()
    (grey,) = arrows(tradeoff_plot({"shipped": [before, after]}, [], axis, "perplexity"))
    assert grey[2] == GREY  # the colour of the trained point
    assert not arrows(tradeoff_plot({"runs": [before], "sweep": [alone]}, [], axis, "perplexity"))


def test_where_the_axes_show_no_difference_there_is_no_arrow():
    made = {"runs": [made_record(PLAIN, ratio=1.9), made_record(trained(PLAIN), ratio=1.3)]}
    assert len(arrows(tradeoff_plot(made, [], "nonzero", "perplexity"))) == 1
    assert not arrows(tradeoff_plot(made, [], "nonzero", "macs"))


@pytest.mark.parametrize("axis", ["compute", "nonzero"])
def test_the_curve_has_them_too(axis):
    shares = {"mlp_macs_share": 0.5, "mlp_nonzero_share": 0.55}
    before, after = (
        made_run(spec, ratio=ratio, **shares)
        for spec, ratio in ((PLAIN, 2.5), (trained(PLAIN), 1.4))
    )
    third = made_run(trained(PLAIN, "alpha", recover_steps=20), ratio=2.2, **shares)
    queries = {run.spec: name for run, name in ((before, "b"), (after, "a"), (third, "t"))}
    figure = curve([], [after, before, third], None, axis, queries)
    found, x = points(figure), 100 * shares[f"mlp_{'macs' if axis == 'compute' else axis}_share"]
    start = pytest.approx((x, 150))
    assert found["b"][0] == start
    assert [arrow[:2] for arrow in arrows(figure)] == [
        (start, found["a"][0]), (start, found["t"][0])
    ]  # fmt: skip
    assert {arrow[2] for arrow in arrows(figure)} == {CONVERTED}
    assert "LoRA (200 steps): perplexity +40.0" in found["b"][1]
    assert "α trained (20 steps): perplexity × 2.20" in found["b"][1]
    assert "without training: perplexity × 2.50" in found["t"][1]
    assert arrows(curve([before, after], [], None, axis))[0][2] == GREY
    assert not arrows(curve([], [after, third], None, axis))
    figure.to_json()


def test_pairs_are_of_the_same_spec_and_calibration_text():
    specs = [
        PLAIN, FITTED, trained(PLAIN), trained(FITTED), trained(ConversionSpec(keep=9)),
        trained(PLAIN, seed=3), replace(PLAIN, recover_steps=7),
    ]  # fmt: skip
    runs = [made_run(spec) for spec in specs]
    # what is drawn by the seed in training is nothing that the untrained one has
    assert trained_pairs(runs) == [(0, 2), (1, 3), (0, 5)]
    texts = ["a", "a", "b", "b", "b", "b", "b"]
    assert trained_pairs(runs, texts) == [(0, 2), (0, 5)]  # PLAIN looks at no text by itself
