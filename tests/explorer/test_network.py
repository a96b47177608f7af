"""The picture of the network: what is sent to the browser, and the scales it is drawn with."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.explorer.plots.style import CONVERTED, DENSE
from mlpmoe.explorer.shell.network import (
    Column,
    cells_used,
    network_component,
    network_value,
    routed_columns,
    static_columns,
)
from mlpmoe.measure.quality.routing import LayerRouting
from mlpmoe.models import assets_folder

# of the page and of blocks on it; the dark ones are those of Gradio's usual greys
BACKGROUNDS = {
    "light": ["#ffffff", "#fafafa"],
    "dark": ["#0b0f19", "#1f2937", "#09090b", "#0f0f11", "#18181b", "#27272a"],
}
# linear RGB as it is seen without one kind of cone (Machado, Oliveira and Fernandes 2009)
SEEN = {
    "without red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
WHITE = torch.tensor([0.9505, 1.0, 1.089])


def routed(shared: int, chosen: list[list[int]], experts: int, router: bool = True) -> LayerRouting:
    """chosen: per token."""
    picked = torch.zeros(len(chosen), experts, dtype=torch.bool)
    for token, some in enumerate(chosen):
        picked[token, some] = True
    favourite = torch.tensor([some[0] if router else -1 for some in chosen])
    return LayerRouting(shared, picked, favourite)


def sent(columns: list[Column]) -> list[dict]:
    return json.loads(network_value("branches", columns, 0)["columns"])


@given(st.floats(0, 1))
def test_only_what_is_gone_is_sent_as_gone(share):
    [column] = sent([Column([share])])
    [left] = column["left"]
    assert left == pytest.approx(share, abs=1e-4)
    assert (left == 0) == (share == 0)
    assert (left == 1) == (share == 1)


@given(st.lists(st.integers(0, 127), unique=True))
def test_the_cells_of_a_token_are_the_bits_of_a_number(cells):
    value = network_value("experts", [Column([0.5] * 128)] * 2, 0, used=[[[], cells]])
    [[none, some]] = json.loads(value["used"])
    assert int(none, 16) == 0
    assert {cell for cell in range(128) if int(some, 16) >> cell & 1} == set(cells)


def test_a_value_is_quick_to_compare():
    """Gradio compares numbers one by one in the browser, so there are none but the layer."""
    value = network_value("branches", static_columns(torch.rand(30, 64)), 3, [[[1]] * 30])
    assert [name for name, v in value.items() if not isinstance(v, str)] == ["looked"]
    json.dumps(value)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError):
        network_value("heads", [], 0)


def test_static_columns_know_what_is_spared():
    columns = static_columns(torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.25, 0.0]]), {0})
    assert [column.spared for column in columns] == [True, False, False]
    assert columns[2].left == [0.25, 0.0]


def test_experts_follow_the_shared_ones():
    found = [routed(2, [[0], [1], [1], [1]], experts=3), None, routed(0, [[2]] * 4, experts=3)]
    kind, columns = routed_columns(found, spared={1})
    assert kind == "experts"
    assert columns == [
        Column([1.0, 1.0, 0.25, 0.75, 0.0], always=2),
        Column([], spared=True),
        Column([0.0, 0.0, 1.0]),
    ]
    assert cells_used(found)[1] == [[0, 1, 3], [], [2]]


def test_single_neurons_come_in_few_groups_the_busiest_first():
    found = [routed(0, [[1, 7], [1, 200]], experts=1536, router=False)]
    kind, [column] = routed_columns(found)
    assert kind == "neurons"
    assert len(column.left) == 64
    assert column.left == sorted(column.left, reverse=True)
    assert sum(column.left) / 64 == pytest.approx(4 / (2 * 1536))


def test_a_model_that_is_dense_throughout_has_its_layers():
    assert routed_columns([None, None], {0}) == ("experts", [Column([], spared=True), Column([])])
    assert cells_used([None, None]) == []


def test_the_script_is_one_that_gradio_can_run():
    """It is text in the page; its template goes through two languages of templates."""
    component = network_component()
    assert component.value is None
    assert not re.search(r"\$\{|\{\{|`|<script", component.html_template)


def scale(theme: str, name: str) -> list[str]:
    """Of network.css, from nothing to everything."""
    style = (assets_folder() / "network.css").read_text(encoding="utf-8")
    rule = {"light": r":root \{(.*?)\}", "dark": r"^\.dark \{(.*?)\}"}[theme]
    block = re.search(rule, style, re.DOTALL | re.MULTILINE).group(1)
    found = dict(re.findall(rf"--{name}-(\d): (#[0-9a-f]{{6}})", block))
    return [found[str(step)] for step in range(len(found))]


def linear(colour: str) -> torch.Tensor:
    c = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""
    dark, bright = sorted(float(linear(c) @ torch.tensor(XYZ[1])) for c in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def lab(colour: torch.Tensor) -> torch.Tensor:
    x, y, z = (torch.tensor(XYZ) @ colour.clamp(0, 1) / WHITE) ** (1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("name", "steps"), [("damage", 6), ("load", 5)])
def test_more_is_further_from_the_background(theme, name, steps):
    colours = scale(theme, name)
    assert len(colours) == steps
    for background in BACKGROUNDS[theme]:
        levels = [contrast(colour, background) for colour in colours]
        assert levels[0] > 1.1
        assert all(more > 1.15 * less for less, more in pairwise(levels))
        assert levels[-1] > 3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", SEEN)
def test_damage_is_told_from_dense_and_converted(theme, eyes):
    seen = torch.tensor(SEEN[eyes])
    for colour in scale(theme, "damage"):
        for other in (DENSE, CONVERTED):
            apart = lab(seen @ linear(colour)) - lab(seen @ linear(other))
            assert float(apart.norm()) > 9, (colour, other)  # 2 are just noticed
