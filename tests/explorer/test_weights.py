"""The tab Weights: histograms of the branches, and what the experts of a layer do on a text."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from html import unescape

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, convert
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.shell.settings import read_spec
from mlpmoe.explorer.tabs.weights import HISTOGRAM_BINS, SHOWN, WeightsHandlers, histograms
from mlpmoe.measure.quality.routing import routing
from mlpmoe.models import named_calibration
from tests.explorer.calibrated import direct
from tests.explorer.controls import controls, settings

SKIPPED = gr.skip()
HOSTILE = "<img src=x onerror='alert(1)'>&\""
ROUTED = {"method": "cmoe", "experts": 8, "active": 0.5}


@pytest.fixture
def tab(workbench) -> WeightsHandlers:
    return WeightsHandlers(workbench)


def values(layer=0, projection="gate", **change) -> tuple:
    return "demo", *settings(**change), layer, projection


def made(loaded: LoadedModel, **change):
    """The conversion, made; and as the library makes it."""
    spec = read_spec(controls(**change))
    loaded.converted(loaded.asked(spec))
    return direct(loaded, spec)


# which view


@pytest.mark.parametrize(
    ("change", "routed"), [({"keep": 12, "order": "activation"}, False), (ROUTED, True)], ids=str
)
def test_the_view_follows_the_method_and_its_figures_once_it_is_made(tab, demo, change, routed):
    before = tab.show(*values(**change))
    assert before[2:] == (SKIPPED,) * (SHOWN - 2) or before[3:] == (SKIPPED,) * (SHOWN - 3)
    made(demo, **change)
    static, ridges, experts, *figures = tab.show(*values(**change))
    assert (static["visible"], experts["visible"]) == (not routed, routed)
    assert (ridges == SKIPPED) == routed
    assert all((figure == SKIPPED) != routed for figure in figures)
    if not routed:
        assert ridges == histograms(demo, demo.asked(read_spec(controls(**change))), 0, "gate")


def test_another_model_sets_layer_and_projection(tab, gateless_folder, one_layer_folder):
    *_, guest = tab.workbench.load(str(gateless_folder))
    layer, projection = tab.another_model(guest.key)
    assert (layer["maximum"], layer["value"]) == (1, 0)
    assert (projection["choices"], projection["value"]) == (["up", "down"], "up")
    *_, guest = tab.workbench.load(str(one_layer_folder))
    assert tab.another_model(guest.key)[0]["maximum"] == 1  # a slider needs two ends


# experts


@pytest.mark.parametrize(
    "change",
    [
        ROUTED,
        ROUTED | {"spared": "1"},
        ROUTED | {"selection": "threshold"},
        {"method": "moefication", "experts": 8, "active": 0.5},
        {"method": "neurons", "active": 0.25},
        {"method": "inputs", "active": 0.25},
    ],
    ids=str,
)
def test_what_runs_adds_up(tab, demo, change):
    model = made(demo, **change)
    split = tab.show(*values(**change))[3]
    always, by_routing, idle = (dict(zip(bar.x, bar.y, strict=True)) for bar in split.data)
    size = 1 if change["method"] in ("neurons", "inputs") else 6
    for number, layer in enumerate(routing(model, demo.routing_ids)):
        if str(number) in change.get("spared", ""):
            assert (always[number], by_routing[number]) == (100, 0)
        else:
            assert always[number] == pytest.approx(100 * layer.shared * size / 48)
            mean = float(layer.chosen.float().sum(1).mean())
            assert by_routing[number] == pytest.approx(100 * mean * size / 48)
            assert 0 < by_routing[number] <= 55
        parts = always[number] + by_routing[number] + idle[number]
        assert parts == pytest.approx(100)


def test_variation_is_shown_of_the_method_that_computes_it(tab, demo):
    for change, there in ((ROUTED, False), (ROUTED | {"method": "expertweaver"}, True)):
        made(demo, **change)
        shown = tab.show(*values(**change))[4]
        assert shown["visible"] == there == (shown["value"] is not None)
    counts, tau = shown["value"].data
    assert sum(counts.y) == 2 * 48  # all neurons of both layers
    below = sum(n for x, n in zip(counts.x, counts.y, strict=True) if x < tau.x[0])
    assert below == pytest.approx(48, abs=8)  # the median parts them in halves, to a bin


@pytest.mark.parametrize("layer", [0, 1, 7])
def test_each_word_has_the_experts_that_it_runs(tab, demo, layer):
    found = routing(made(demo, **ROUTED), demo.routing_ids)
    words, about = tab.show(*values(layer, **ROUTED))[5:]
    chosen = found[min(layer, 1)]
    spans = re.findall(r'<span data-cells="([\d ]*)">(.*?)</span>', words, re.DOTALL)
    ids = demo.routing_ids.tolist()
    special = demo.tokenizer.all_special_ids  # which are no words
    shown = [(p, token) for p, token in enumerate(ids) if token not in special][: len(spans)]
    assert len(spans) > 100
    for (cells, text), (position, token) in zip(spans, shown, strict=True):
        ran = {*range(chosen.shared)} | {
            chosen.shared + expert for expert in chosen.chosen[position].nonzero()[:, 0].tolist()
        }
        assert {*map(int, cells.split())} == ran
        assert unescape(text) == demo.tokenizer.decode([token])
    popular = chosen.favourite.bincount()
    assert f"expert {chosen.shared + int(popular.argmax())}," in about


def test_words_are_escaped(tab, demo):
    demo.routing_ids = torch.tensor(demo.tokenizer(HOSTILE).input_ids)
    made(demo, **ROUTED)
    words = tab.show(*values(**ROUTED))[5]
    assert {*re.findall(r"<(\w+)", words)} == {"div", "span"}
    assert HOSTILE in unescape(re.sub(r"<[^>]*>", "", words))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (ROUTED | {"spared": "0"}, "kept dense"),
        ({"method": "neurons", "active": 0.5}, "24 of 48"),
        ({"method": "inputs", "active": 0.5}, "gate reads 16 of 32 numbers"),
        ({"method": "inputs", "router": "inputs", "active": 0.5}, "gate and up read 16 of 32"),
    ],
    ids=str,
)
def test_where_there_are_no_experts_that_is_said(tab, demo, change, said):
    made(demo, **change)
    words, about = tab.show(*values(**change))[5:]
    assert words == "" and said in about


# histograms


def counts_in(trace, branch: int) -> list[int]:
    """The numbers of weights that the hover texts of a branch tell, bin by bin."""
    notes = [note for note in trace.text if note.startswith(f"branch {branch}<br>")]
    return [int(note.split("<br>")[1].split()[0].replace(",", "")) for note in notes]


@cache
def direct_mlps(loaded: LoadedModel, spec: ConversionSpec) -> list:
    calibration = Calibration.from_text(loaded.tokenizer, named_calibration("stories"))
    model = convert(loaded.model, spec, calibration if spec.needs_calibration else None)
    return [layer.mlp for layer in model.model.layers]


def test_layer_and_projection_of_another_model_are_the_nearest(tiny, one_layer, gateless):
    titles = [
        histograms(loaded, ConversionSpec(), layer, "gate").layout.xaxis.title.text
        for loaded, layer in ((tiny, 30), (one_layer, 1), (gateless, 1))
    ]
    assert ["layer 1" in titles[0], "layer 0" in titles[1], "of up" in titles[2]] == [True] * 3


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_histograms_count_the_weights(tiny, projection):
    """Bars add up to the weights inside the axis, branch by branch."""
    figure = histograms(tiny, ConversionSpec(branches=4), 0, projection)
    weight = getattr(tiny.model.model.layers[0].mlp, f"{projection}_proj").weight.detach().abs()
    upper = figure.layout.xaxis.range[1]
    assert upper == pytest.approx(4 * float(weight.square().mean().sqrt()), rel=1e-5)
    pieces = weight.tensor_split(4, dim=1 if projection == "down" else 0)
    for b, piece in enumerate(pieces):
        found = counts_in(figure.data[2], b)
        assert len(found) == HISTOGRAM_BINS
        assert sum(found) == int((piece <= upper).sum())


def test_a_layer_of_zeros_is_shown(tiny):
    """Block expansion adds such layers; the axis has no scale to take from them."""
    dense = copy.deepcopy(tiny.model)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.zero_()
    expanded = LoadedModel("expanded", "Expanded", tiny.checked, dense, tiny.tokenizer)
    figure = histograms(expanded, ConversionSpec(fade=0.5), 1, "down")
    assert figure.layout.xaxis.range[1] > 0
    assert not any("-" in note for trace in figure.data[:3] for note in trace.text)


DIFFERING = [
    ConversionSpec(branches=8, keep=5, allocation="sensitivity"),
    ConversionSpec(branches=8, fade=2.0, fade_unit="neuron"),
    ConversionSpec(
        branches=8, keep=5, fade=0.8, fade_unit="neuron", fade_score="wanda",
        allocation="sensitivity",
    ),
]  # fmt: skip


@pytest.mark.parametrize("spec", DIFFERING, ids=ConversionSpec.to_query)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("projection", ["gate", "down"])
def test_histograms_of_layers_and_branches_that_differ(uneven, spec, layer, projection):
    figure = histograms(uneven, uneven.asked(spec), layer, projection)
    dropped, removed, stays, thresholds = figure.data
    mlp = direct_mlps(uneven, spec)[layer]
    kept, upper = len(mlp.sizes), figure.layout.xaxis.range[1]
    weight = mlp.state_dict()[f"{projection}_proj.weight"].abs()
    pieces = weight.split(mlp.sizes, dim=1 if projection == "down" else 0)
    for b in range(8):
        if b >= kept:
            assert counts_in(stays, b) == counts_in(removed, b) == []
            assert sum(counts_in(dropped, b)) > 0
            continue
        assert counts_in(dropped, b) == []
        found = counts_in(stays, b)
        assert len(found) == HISTOGRAM_BINS
        assert sum(found) == int((pieces[b] <= upper).sum())
        assert (counts_in(removed, b) == []) == (mlp.sizes[b] == 6)  # whole branches lose nothing
        if counts_in(removed, b):  # it lies behind what stays
            pairs = zip(counts_in(removed, b), found, strict=True)
            assert all(before >= after for before, after in pairs)
    assert not thresholds.x  # no magnitude decides
    json.loads(figure.to_json())


@pytest.mark.parametrize("projection", ["gate", "down"])
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_histograms_of_scores_without_a_threshold(tiny, score, projection):
    spec = ConversionSpec(
        branches=8, fade=0.9, fade_score=score, fade_projections="gate-up-down", keep=6
    )
    _, removed, stays, thresholds = histograms(
        tiny, tiny.asked(spec, "stories"), 1, projection
    ).data
    (_, mlp), whole = direct_mlps(tiny, spec), tiny.model.model.layers[1].mlp
    axis = 1 if projection == "down" else 0
    after = mlp.state_dict()[f"{projection}_proj.weight"].split(mlp.sizes, dim=axis)
    weight = getattr(whole, f"{projection}_proj").weight.detach()
    before = weight.split(6, dim=axis)
    upper = 4 * float(weight.square().mean().sqrt())
    for b in range(6):
        inside = (after[b] != 0) & (after[b].abs() <= upper)
        assert sum(counts_in(stays, b)) == int(inside.sum())
        if b:
            assert sum(counts_in(removed, b)) == int((before[b].abs() <= upper).sum())
    assert counts_in(removed, 0) == []  # fade leaves branch 0 alone
    assert not thresholds.x
