"""Pictures of curves: valid XML, a line for each, every point where its numbers say."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.studies.curves import HEIGHT, WIDTH, Axes, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"
AXES = Axes("who", "tokens", "loss", "tokens & more", "loss <nats>")
ROWS = [
    {"who": who, "tokens": tokens, "loss": loss}
    for who, losses in (("dense", (5, 4, 3)), ("a<b", (7, 5, 3.1)), ("third", (6, 5, 3.2)))
    for tokens, loss in zip((0, 500, 1000), losses, strict=True)
]


def drawn(rows=ROWS):
    """The points of each line, and the texts as (words, x, y)."""
    root = ElementTree.fromstring(svg(rows, AXES))
    lines = [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    texts = [(t.text, float(t.get("x")), float(t.get("y"))) for t in root.iter(f"{SVG}text")]
    return lines, texts


def test_three_curves_with_their_names():
    lines, texts = drawn()
    assert [len(line) for line in lines] == [3, 3, 3]
    words = [text for text, _, _ in texts]
    assert {"dense", "a<b", "third", "tokens & more", "loss <nats>"} <= set(words)
    heights = sorted(y for text, _, y in texts if text in ("dense", "a<b", "third"))
    assert all(high - low >= 15 for low, high in pairwise(heights))


def test_points_lie_between_the_numbers_of_the_axes():
    lines, texts = drawn()
    left = {float(t.replace(",", "")): x for t, x, y in texts if t[0].isdigit() and y > 350}
    height = {float(t): y - 4 for t, x, y in texts if t[0].isdigit() and x < 60 and y < 350}
    for who, line in zip(("dense", "a<b", "third"), lines, strict=True):
        given = [(row["tokens"], row["loss"]) for row in ROWS if row["who"] == who]
        for (tokens, loss), (x, y) in zip(given, line, strict=True):
            (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in (left, height))
            across = (tokens - x0) / (x1 - x0)
            up = (loss - y0) / (y1 - y0)
            assert x == pytest.approx(left[x0] + across * (left[x1] - left[x0]), abs=0.2)
            assert y == pytest.approx(height[y0] + up * (height[y1] - height[y0]), abs=0.2)
            assert 0 < x < WIDTH and 0 < y < HEIGHT


@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 6)), min_size=1, max_size=5))
def test_ticks_are_few_and_hold_all_values(values):
    found = ticks(values)
    assert found == sorted(set(found)) and 2 <= len(found) <= 9
    slack = 1e-9 * max(1, *map(abs, values))
    assert found[0] - slack <= min(values) and max(values) <= found[-1] + slack
