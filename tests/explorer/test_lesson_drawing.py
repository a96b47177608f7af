"""The drawing of one MLP: well-formed, in proportion, and of all neurons."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from mlpmoe.core.static.branched import branch_sizes
from mlpmoe.explorer.tabs.lesson_drawing import ALL_GAPS, HEIGHT, LENGTH, TOP, WIDTH, mlp_drawing

D_FF, D_MODEL = 768, 256


def drawing(branches: int, names=("gate", "up", "down"), d_ff: int = D_FF) -> ElementTree.Element:
    sizes = branch_sizes(d_ff, branches)
    blocks = {name: torch.rand(d_ff) for name in names}
    return ElementTree.fromstring(
        mlp_drawing(blocks, D_MODEL, torch.rand(d_ff), sizes, [1.0 + b for b in range(branches)])
    )


def boxes(svg: ElementTree.Element) -> list[dict[str, float]]:
    names = ("x", "y", "width", "height", "opacity")
    return [{name: float(rect.get(name)) for name in names} for rect in svg.iter("rect")]


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text for text in svg.iter("text")]


@pytest.mark.parametrize("branches", [1, 2, 5, 16])
def test_every_branch_is_drawn_in_every_matrix(branches):
    svg = drawing(branches)
    groups = list(svg.iter("g"))
    assert len(groups) == branches
    kinds = [group.get("class").split()[1] for group in groups]
    assert kinds == (["whole"] if branches == 1 else (["even", "odd"] * 8)[:branches])
    for group in groups:
        assert len({rect.get("x") for rect in group.iter("rect")}) == 3
        assert [path.get("class") for path in group.iter("path")].count("out") == 1


@pytest.mark.parametrize("branches", [1, 3, 16])
def test_it_fits_and_is_in_proportion(branches):
    found = boxes(drawing(branches))
    top, bottom = min(b["y"] for b in found), max(b["y"] + b["height"] for b in found)
    assert top >= TOP and bottom <= TOP + LENGTH + ALL_GAPS < HEIGHT
    assert bottom - top == pytest.approx(LENGTH + (ALL_GAPS if branches == 16 else 0), abs=33)
    assert all(0 <= b["x"] and b["x"] + b["width"] < WIDTH - 120 for b in found)
    assert found[0]["width"] == pytest.approx(LENGTH * D_MODEL / D_FF, abs=1)
    assert all(0 < b["opacity"] <= 1 for b in found)


def test_branches_move_apart_and_a_sum_comes():
    whole, cut = drawing(1), drawing(4)
    assert "Σ" not in texts(whole) and "Σ" in texts(cut)

    def gaps(svg: ElementTree.Element) -> list[float]:
        edges = sorted({(b["y"], b["y"] + b["height"]) for b in boxes(svg)})
        return [after[0] - before[1] for before, after in pairwise(edges)]

    assert max(gaps(whole)) < 2
    assert sum(gap > 10 for gap in gaps(cut)) == 3


def test_larger_weights_are_darker_and_louder_branches_wider():
    sizes = branch_sizes(64, 2)
    ramp = torch.arange(64.0)
    svg = ElementTree.fromstring(
        mlp_drawing({"up": ramp, "down": ramp}, 16, ramp, sizes, [1.0, 3.0])
    )
    column = [b["opacity"] for b in boxes(svg) if b["x"] == boxes(svg)[0]["x"]]
    assert column == sorted(column) and column[-1] > 2 * column[0]
    widths = [float(p.get("stroke-width")) for p in svg.iter("path") if p.get("class") == "out"]
    assert widths[1] > widths[0] > 0


def test_without_a_gate_there_are_two_blocks():
    svg = drawing(2, names=("up", "down"))
    assert "gate" not in texts(svg) and "gate" not in svg.get("aria-label")
    assert len({b["x"] for b in boxes(svg)}) == 2


def test_few_neurons_and_silent_ones_are_drawn():
    svg = drawing(16, d_ff=20)
    assert len(list(svg.iter("g"))) == 16
    none = torch.zeros(20)
    silent = mlp_drawing({"up": none, "down": none}, 8, none, branch_sizes(20, 4), [0.0] * 4)
    assert "nan" not in silent


def test_it_says_what_it_is():
    svg = drawing(4)
    assert svg.get("role") == "img"
    assert "768 neurons" in svg.get("aria-label") and "4 branches" in svg.get("aria-label")
    assert "each 768 × 256" in texts(svg) and "256 × 768" in texts(svg)
