"""Curves as an SVG picture, which needs no package and reads in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 120, 16, 52  # margins; the curves' names stand at the right
TICKS = 6  # about so many on an axis
NAMES_APART = 16  # lines of writing
# Okabe and Ito's colours, which the colour blind tell apart; dashes do without any
LINES = (("#0072B2", "none"), ("#D55E00", "8 4"), ("#009E73", "2 3"), ("#CC79A7", "9 3 2 3"))
STYLE = """
  .page { fill: #fff; }
  .grid { stroke: #ddd; }
  .curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
  text { fill: #222; font: 13px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16181d; }
    .grid { stroke: #3a3d44; }
    text { fill: #e6e6e6; }
  }
"""

Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Which columns of a table are drawn, and what is written beside them."""

    curve: str  # column: to which curve a row belongs
    x: str
    y: str
    x_label: str
    y_label: str


def svg(rows: Sequence[Mapping[str, Any]], axes: Axes) -> str:
    """A line for each value of the column `axes.curve`, in the order they come in; `axes.x` and
    `axes.y` are columns of numbers."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(str(row[axes.curve]), []).append((row[axes.x], row[axes.y]))
    points = [point for curve in curves.values() for point in curve]
    x_ticks, y_ticks = (ticks([point[i] for point in points]) for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    title = escape(f"{axes.y_label} over {axes.x_label}: {', '.join(curves)}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            *_frame(x_ticks, y_ticks, place, axes),
            *_curves(curves, place),
            "</svg>\n",
        ]
    )


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from at most the least value to at least the largest, about TICKS of them."""
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1) / TICKS
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = floor(low / step), ceil(high / step)
    return [step * n for n in range(first, max(last, first + 1) + 1)]


def _frame(
    x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place, axes: Axes
) -> Iterator[str]:
    left, bottom = place(x_ticks[0], y_ticks[0])
    right, top = place(x_ticks[-1], y_ticks[-1])
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        yield _text(x, bottom + 18, f"{tick:,.10g}", "middle")
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        yield f'<path class="grid" d="M{left} {y}H{right}"/>'
        yield _text(left - 8, y + 4, f"{tick:,.10g}", "end")
    yield _text((left + right) / 2, bottom + 40, axes.x_label, "middle")
    middle = (top + bottom) / 2
    turned = f' transform="rotate(-90 16 {middle})"'
    yield _text(16, middle, axes.y_label, "middle", turned)


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]], place: Place) -> Iterator[str]:
    """Each line, and its name beside its end, or above that where names would overlap."""
    ends = {name: place(*points[-1]) for name, points in curves.items()}
    free = float("inf")  # above this height nothing is written yet
    heights = {}
    for name in sorted(ends, key=lambda name: ends[name][1], reverse=True):
        free = heights[name] = min(ends[name][1] + 4, free - NAMES_APART)
    for number, (name, points) in enumerate(curves.items()):
        colour, dashes = LINES[number % len(LINES)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        yield (
            f'<polyline class="curve" stroke="{colour}" stroke-dasharray="{dashes}" '
            f'points="{path}"/>'
        )
        yield _text(ends[name][0] + 8, heights[name], name, "start")


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
