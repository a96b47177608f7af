"""Dragging on the curve: what the page hears, by mouse and by touch, while clicks stay clicks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from plotly.offline import get_plotlyjs

from mlpmoe.explorer.plots.curve import Here, curve
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.models import assets_folder

HEARD = """
window.dragged = []; window.clicked = [];
window.mlpmoe = { drag: (share, done) => dragged.push([share, done, performance.now()]) };
"""
DRAW = """async (figure) => {
    const plot = document.getElementById('plot');
    await Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false });
    plot.on('plotly_click', event => clicked.push(event.points[0].customdata));
}"""
# where on the screen the plot shows a point
AT = """([x, y]) => {
    const plot = document.getElementById('plot'), box = plot.getBoundingClientRect();
    const { xaxis, yaxis } = plot._fullLayout;
    return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}"""


@pytest.fixture
def opened(browser) -> Iterator[Callable]:
    contexts = []

    def open_it(drag: str = "on", **options):
        context = browser.new_context(viewport={"width": 700, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_content(
            f'<body style="margin: 0; height: 3000px"><div id="curve" data-drag="{drag}" '
            'style="margin: 60px; width: 520px"><div id="plot"></div></div></body>'
        )
        page.add_style_tag(path=assets_folder() / "plots.css")
        page.add_script_tag(content=get_plotlyjs())
        page.evaluate(HEARD)
        page.add_script_tag(path=assets_folder() / "curve.js")
        draw(page)
        return page

    yield open_it
    for context in contexts:
        context.close()


def draw(page) -> None:
    records = shipped("smollm2-135m")
    queries = {record.run.spec: record.query for record in records}
    here = Here(0.8, 10.0, low=5.0, high=20.0)
    figure = curve([record.run for record in records], [], here, "compute", queries)
    page.evaluate(DRAW, json.loads(figure.to_json()))


def test_a_drag_is_heard_as_it_goes_and_once_at_its_end(opened):
    page = opened()
    (x0, y), (x1, _) = page.evaluate(AT, [80, 900]), page.evaluate(AT, [60, 900])
    page.mouse.move(x0, y)
    page.mouse.down()
    for step in range(1, 41):
        page.mouse.move(x0 + (x1 - x0) * step / 40, y)
        page.wait_for_timeout(10)
        if step == 20:
            draw(page)  # as the page does, while one drags
    page.mouse.up()
    heard = page.evaluate("dragged")
    assert [done for _, done, _ in heard] == [False] * (len(heard) - 1) + [True]
    assert heard[-1][0] == pytest.approx(0.6, abs=0.005)
    shares = [share for share, *_ in heard]
    assert shares == sorted(shares, reverse=True) and len(shares) >= 4
    times = [at for _, done, at in heard if not done]
    assert all(b - a > 90 for a, b in pairwise(times))
    assert page.evaluate("clicked") == []
    page.mouse.move(x0, y)
    page.wait_for_timeout(200)
    assert len(page.evaluate("dragged")) == len(heard)  # it has ended


def test_a_press_that_does_not_move_is_a_click_on_a_point(opened):
    page = opened()
    (run,) = (r for r in shipped("smollm2-135m") if r.run.spec.keep == 8 and r.run.ratio == max(
        o.run.ratio for o in shipped("smollm2-135m")
        if o.run.spec.keep == 8 and o.run.spec.compensation == "sqrt"
    ))  # fmt: skip
    x, y = page.evaluate(AT, [100 * run.run.mlp_macs_share, 100 * (run.run.ratio - 1)])
    page.mouse.move(x, y)
    page.wait_for_timeout(100)
    page.mouse.down()
    page.mouse.move(x + 2, y)
    page.mouse.up()
    page.wait_for_function("clicked.length > 0", polling=100)
    assert page.evaluate("clicked") == [run.query]
    assert page.evaluate("dragged") == []


def test_only_a_plot_that_asks_for_it_is_dragged_on_and_only_inside(opened):
    for drag, start in (("off", 80), ("on", -60)):
        page = opened(drag)
        x, y = page.evaluate(AT, [start, 900])
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 100, y, steps=10)
        page.mouse.up()
        assert page.evaluate("dragged") == []


def test_beyond_the_ends_it_stays_at_the_ends(opened):
    page = opened()
    x, y = page.evaluate(AT, [80, 900])
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 300, y + 500, steps=20)
    page.mouse.up()
    assert page.evaluate("dragged").pop()[:2] == [1, True]


def test_a_finger_drags_sideways_and_scrolls_up_and_down(opened):
    page = opened(has_touch=True)
    touch = page.context.new_cdp_session(page)

    def swipe(start: list[float], end: list[float]) -> None:
        kinds = ["touchStart", *["touchMove"] * 12, "touchEnd"]
        for step, kind in enumerate(kinds):
            at = [a + (b - a) * min(step, 12) / 12 for a, b in zip(start, end, strict=True)]
            points = [] if kind == "touchEnd" else [{"x": at[0], "y": at[1]}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            page.wait_for_timeout(15)

    start, end = page.evaluate(AT, [80, 900]), page.evaluate(AT, [65, 900])
    swipe(start, end)
    heard = page.evaluate("dragged")
    assert heard[-1][:2] == [pytest.approx(0.65, abs=0.005), True]
    page.evaluate("dragged.length = 0")
    swipe(start, [start[0], start[1] + 150])
    assert page.evaluate("dragged") == []
