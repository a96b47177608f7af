"""One MLP as a drawing, whole or cut into branches: SVG as a string, from its own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

WIDTH, HEIGHT = 620, 430  # of the viewBox; type in it is 18 units high
TOP, LENGTH = 58, 300  # where the blocks begin, and how long all neurons are together
NARROWEST, WIDEST = 34, 118  # of a block
ALL_GAPS, LARGEST_GAP = 60, 16  # between branches
LINES = 64  # drawn of all neurons, in all
LINK = 56  # between up and down, where the neurons' values pass
FAINTEST = 0.18  # opacity
SUM = 17  # radius


def mlp_drawing(
    blocks: Mapping[str, Tensor], d_model: int, activity: Tensor, sizes: Sequence[int],
    said: Sequence[float],
) -> str:  # fmt: skip
    """An MLP with its neurons as lines from the input over gate and up to the output.

    blocks: (d_ff,) per matrix, how large the weights of each neuron are; the last is down. All
    blocks have their true proportion, down turned so that a neuron is one line through all.
    activity: (d_ff,), how strongly each neuron fires. sizes: neurons of each branch. said: how
    large the output of each branch is.
    """
    d_ff, cut = sum(sizes), len(sizes) > 1
    wide = min(WIDEST, max(NARROWEST, LENGTH * d_model / d_ff))
    *inner, down = _columns(len(blocks), wide)
    gap = min(LARGEST_GAP, ALL_GAPS / max(1, len(sizes) - 1)) if cut else 0.0
    top = TOP + (ALL_GAPS - gap * (len(sizes) - 1)) / 2
    middle, right = TOP + (LENGTH + ALL_GAPS) / 2, down + wide
    end = right + 84  # where Σ stands
    parts, first, y = [], 0, top
    for number, (size, loud) in enumerate(zip(sizes, said, strict=True)):
        tall = LENGTH * size / d_ff
        lines = _lines(size, len(sizes))
        drawn = []
        for at, neurons in _split(first, size, lines):
            line_y, thick = y + tall * at / lines, tall / lines
            for x, values in zip((*inner, down), blocks.values(), strict=True):
                drawn.append(_line(x, line_y, wide, thick, _strength(values, neurons)))
            centre, fires = line_y + thick / 2, _strength(activity, neurons)
            drawn.append(f'<path d="M26 {centre:.1f}H{inner[0] - 4:.0f}" opacity="0.3"/>')
            drawn.append(
                f'<path d="M{inner[-1] + wide + 4:.0f} {centre:.1f}H{down - 4:.0f}" '
                f'opacity="{fires:.2f}"/>'
            )
        bent, begin = (right + end) / 2, y + tall / 2
        to_sum = (
            f'<path class="out" d="M{right + 3:.0f} {begin:.1f}C{bent:.0f} {begin:.1f} {bent:.0f} '
            f'{middle:.0f} {end - SUM if cut else end + 40:.0f} {middle:.0f}" '
            f'stroke-width="{1.5 + 7 * loud / max(*said, 1e-30):.1f}"/>'
        )
        kind = ("even", "odd")[number % 2] if cut else "whole"
        parts.append(f'<g class="branch {kind}">{"".join(drawn)}{to_sum}</g>')
        first, y = first + size, y + tall + gap
    heads = "".join(
        _text(x + wide / 2, TOP - 32, name) for x, name in zip((*inner, down), blocks, strict=True)
    )
    each = "each " if len(inner) > 1 else ""
    heads += _text(
        (inner[0] + inner[-1] + wide) / 2, TOP - 10, f"{each}{d_ff:,} × {d_model:,}", "small"
    )
    heads += _text(down + wide / 2, TOP - 10, f"{d_model:,} × {d_ff:,}", "small")
    plus = ""
    if cut:
        plus = f'<circle class="sum" cx="{end:.0f}" cy="{middle:.0f}" r="{SUM}"/>' + _text(
            end, middle + 6, "Σ"
        )
        plus += f'<path class="sum" d="M{end + SUM:.0f} {middle:.0f}H{end + 40:.0f}"/>'
    about = (
        f"An MLP with {d_ff:,} neurons, drawn as lines from the input through "
        f"{_joined(list(blocks))} to the output"
    )
    about += f", cut into {len(sizes)} branches that are added up." if cut else ", in one piece."
    return (
        f'<svg class="mlp" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
        f'<path class="wire" d="M24 {TOP:.0f}V{TOP + LENGTH + ALL_GAPS:.0f}"/>'
        f"{_text(24, TOP - 10, 'x')}{heads}{''.join(parts)}{plus}"
        f"{_text(end + 54, middle + 6, 'y')}</svg>"
    )


def _columns(count: int, wide: float) -> list[float]:
    """Left edges of the blocks: those that read x side by side, then down."""
    edges = [62 + number * (wide + 12) for number in range(count - 1)]
    return [*edges, edges[-1] + wide + LINK]


def _lines(size: int, branches: int) -> int:
    return min(size, max(1, round(LINES / branches)))


def _split(first: int, size: int, lines: int) -> list[tuple[int, slice]]:
    """Number and neurons of each line of a branch."""
    edges = [first + size * line // lines for line in range(lines + 1)]
    return [(line, slice(edges[line], edges[line + 1])) for line in range(lines)]


def _strength(values: Tensor, neurons: slice) -> float:
    """Opacity of a line: its mean between the smallest and the largest of all neurons, but for the
    few giants."""
    low, high = float(values.min()), float(values.quantile(0.98))
    share = (float(values[neurons].mean()) - low) / max(high - low, 1e-30)
    return FAINTEST + (1 - FAINTEST) * min(1.0, share)


def _line(x: float, y: float, wide: float, thick: float, strength: float) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.1f}" width="{wide:.0f}" height="{max(0.5, thick - 0.6):.1f}" '
        f'opacity="{strength:.2f}"/>'
    )


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text{shown} x="{x:.0f}" y="{y:.0f}">{escape(words)}</text>'


def _joined(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
