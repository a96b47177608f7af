"""Figures of the lesson: what they draw is what was measured, and all of it fits."""

from __future__ import annotations

import pytest
import torch

from mlpmoe.explorer.plots.lesson_plots import (
    SLIDE_HEIGHT,
    enlarged,
    fade_ridges,
    keep_curves,
    routed_words,
)
from mlpmoe.explorer.tabs.lesson_steps.fade import Faded, FadedBranch
from mlpmoe.explorer.tabs.lesson_steps.keep import Kept


def faded(thresholds: tuple[float, ...]) -> Faded:
    return Faded(
        "gate",
        torch.linspace(0, 1, 5),
        tuple(
            FadedBranch(b, torch.tensor([8, 4, 2, 1]), 0.5, 0.5, threshold, 0.1)
            for b, threshold in zip((0, 8, 15), thresholds, strict=True)
        ),
    )


def bars(figure, name: str, row: int) -> list[tuple[float, float, float]]:
    """Left edge, right edge and height of the bars that are seen."""
    trace = [t for t in figure.data if t.name == name][row]
    return [
        (x - width / 2, x + width / 2, y)
        for x, y, width in zip(trace.x, trace.y, trace.width, strict=True)
        if width * y
    ]


def test_a_ridge_is_cut_at_its_threshold():
    figure = fade_ridges(faded((0.0, 0.375, 1.0)), layer=3)
    assert bars(figure, "set to zero", 0) == []
    assert bars(figure, "stays", 2) == []
    zeroed, stays = bars(figure, "set to zero", 1), bars(figure, "stays", 1)
    assert zeroed == [(0, 0.25, 8), (0.25, 0.375, 4)]
    assert stays == [(0.375, 0.5, 4), (0.5, 0.75, 2), (0.75, 1, 1)]
    dashes = [t for t in figure.data if t.name == "threshold"]
    assert [list(t.x) for t in dashes] == [[0.375] * 2, [1.0] * 2]
    assert [t.showlegend for t in dashes] == [False, True]
    assert figure.layout.xaxis3.title.text == "|w| of gate, layer 3"


def test_bars_are_binned_data_only():
    figure = fade_ridges(faded((0.0, 0.3, 0.6)), layer=0)
    assert all(len(trace.x) <= 4 for trace in figure.data)


def test_curves_mark_k_and_show_all_measured():
    size, cosine = torch.linspace(0.2, 1, 16), torch.linspace(-0.3, 1, 16)
    figure = keep_curves(Kept(size, cosine), keep=5)
    curves = {trace.name: trace for trace in figure.data}
    assert list(curves["size, measured"].y) == pytest.approx(size.tolist())
    assert list(curves["restores size"].y) == pytest.approx((1 / size).tolist())
    assert list(curves["least error"].y) == pytest.approx((cosine / size).tolist())
    assert curves["√(B/K)"].y[3] == 2
    assert curves["√(K/B)"].y[3] == 0.5
    for trace in figure.data:
        assert max(range(16), key=lambda i: trace.marker.size[i]) == 4
    low, high = figure.layout.yaxis.range
    assert low < -0.3 and high > 1


def test_measured_factors_may_be_left_out():
    found = Kept(torch.linspace(0.2, 1, 16), torch.linspace(0.2, 1, 16))
    shown = [{t.name for t in keep_curves(found, 5, some).data} for some in (False, True)]
    assert shown[1] - shown[0] == {"least error", "restores size"}
    assert keep_curves(found, 5, False).layout.height == keep_curves(found, 5).layout.height


def test_squares_are_as_large_as_what_is_said_and_filled_where_run():
    size = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    runs, idle = routed_words(["a", "<b>"], size, chosen).data
    assert list(zip(runs.y, runs.x, runs.customdata, strict=True)) == [
        (0, 0, 25), (0, 2, 100), (1, 1, 0),
    ]  # fmt: skip
    assert list(zip(idle.y, idle.x, idle.customdata, strict=True)) == [
        (0, 1, 50), (1, 0, 100), (1, 2, 0),
    ]  # fmt: skip
    assert runs.marker.symbol == "square" and idle.marker.symbol == "square-open"
    assert runs.marker.size[1] > runs.marker.size[0] > runs.marker.size[2] > 0


def test_words_are_escaped_and_in_reading_order():
    size = torch.ones(2, 3)
    figure = routed_words(["a", "<b>"], size, size > 0)
    assert list(figure.layout.yaxis.ticktext) == ["a", "&lt;b&gt;"]
    top, bottom = figure.layout.yaxis.range
    assert top > bottom  # the first word stands above


def test_silent_experts_are_drawn():
    size = torch.zeros(2, 3)
    runs, idle = routed_words(["a", "b"], size, size > 0).data
    assert len(runs.x) == 0
    assert len(idle.x) == 6
    assert min(idle.marker.size) > 0


def test_enlarged_scales_type_lines_and_markers():
    kept = Kept(torch.linspace(0.2, 1, 16), torch.linspace(0.2, 1, 16))
    small, large = keep_curves(kept, 5), enlarged(keep_curves(kept, 5))
    assert large.layout.font.size == 21
    assert large.layout.height == SLIDE_HEIGHT > small.layout.height
    assert large.data[0].line.width > small.data[0].line.width
    assert large.data[0].marker.size[4] > small.data[0].marker.size[4]
    assert enlarged(fade_ridges(faded((0.0, 0.3, 0.6)), 0)).layout.font.size == 21
