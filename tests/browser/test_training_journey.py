"""A little training: begun by the button, seen as it goes, told once it is done."""

from __future__ import annotations

import pytest

from tests.browser.on_the_page import (
    choose,
    figure,
    open_accordion,
    open_tab,
    stored_runs,
    wait_for_new_figure,
    wait_for_other_text,
    wait_for_rows,
    wait_for_stored_runs,
    wait_for_text,
    wait_for_value,
)

pytestmark = pytest.mark.browser

# How many looks at the held-out text the curve of the training shows; 0 while there is none.
LOOKS = """() => {
    const plot = document.querySelector('#training-curve .js-plotly-plot');
    return plot?.data?.find(trace => trace.name === 'held out')?.x.length ?? 0;
}"""
# Some frames go by: an accordion in one that was just opened is not drawn to its end before.
FRAMES = """async () => {
    for (let n = 0; n < 4; n++) await new Promise(requestAnimationFrame);
}"""
# What the plot with this id draws as an arrow: x and y of both ends.
ARROWS = """id => document.querySelector(`#${id} .js-plotly-plot`).data
    .filter(trace => Array.isArray(trace.marker?.symbol) && trace.marker.symbol.includes('arrow'))
    .map(({x, y}) => [[x[0], y[0]], [x[1], y[1]]])"""

# Whether the link names the result of the training.
LINKED = """() => /&result=[0-9a-f]{12}$/.test(
    document.querySelector('#link textarea')?.value)"""


def test_a_student_trains_what_is_left(open_page, take_picture):
    """Half of the branches are dropped, and a few steps of training win something back: the curve
    grows while it is trained, sentence and cards follow, and an arrow shows what was won. Stopped
    and begun again, it goes on."""
    page = open_page("?model=demo&keep=8&text=stories")
    wait_for_stored_runs(page, 1)
    before = figure(page, "perplexity")
    open_accordion(page, "more")
    page.wait_for_selector("#training > button")
    page.evaluate(FRAMES)
    open_accordion(page, "training")
    page.fill("#recover-steps input[type=number]", "24")
    page.press("#recover-steps input[type=number]", "Tab")
    choose(page, "recover", "down *")
    wait_for_text(page, "#training-note", "24 steps take about")
    wait_for_text(page, "#sentence", "then trained for 24 steps: not measured yet")
    assert page.evaluate(LOOKS) == 0

    page.click("#measure")
    page.wait_for_function(f"({LOOKS})() >= 2")
    assert page.evaluate(LOOKS) < 9  # under way
    wait_for_text(page, "#training-says", "Training, last looked at after step")
    wait_for_text(page, "#card-perplexity", "training down, step")
    take_picture(page, "under-way", full_page=False)
    page.click("#stop-measuring")
    wait_for_text(page, "#training-says", "Measure goes on there")
    looked = page.evaluate(LOOKS)
    assert len(stored_runs(page)) == 1

    page.click("#measure")
    after = wait_for_new_figure(page, "perplexity", before)
    assert float(after) < float(before)
    page.wait_for_function(f"({LOOKS})() === 9")
    assert looked <= 9
    wait_for_text(page, "#training-says", " after 24 steps of 786,432 parameters")
    wait_for_text(page, "#sentence", "then trained for 24 steps on calibration stories: perplexity")
    assert "not measured" not in page.inner_text("#sentence")
    wait_for_stored_runs(page, 2)
    page.wait_for_function(f"({ARROWS})('curve').length === 1")
    ((start, end),) = page.evaluate(ARROWS, "curve")
    assert start[0] == pytest.approx(end[0], abs=0.1) and start[1] > end[1]
    open_accordion(page, "share")
    page.wait_for_function(LINKED)
    assert page.locator("#training-curve .scatterlayer .trace").count() >= 4
    take_picture(page, "trained", full_page=False)

    open_tab(page, "Runs")
    wait_for_rows(page, 2)
    page.wait_for_function("document.querySelectorAll('#trade-offs .points path').length > 2")
    assert len(page.evaluate(ARROWS, "trade-offs")) == 1
    take_picture(page, "runs")

    # without training it is what it was, at once
    choose(page, "recover", "nothing")
    wait_for_other_text(page, "#card-perplexity .converted", after)
    assert wait_for_new_figure(page, "perplexity", after) == before
    wait_for_value(page, "keep", 8)
    assert "trained" not in page.inner_text("#sentence").split("Best")[0]
