"""What a slider shows at once: true counts, a name for known recipes, and code that runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from mlpmoe import PRESETS, ConversionSpec, UserError, convert, parameter_report
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.loaded import LoadedModel
from mlpmoe.explorer.preview import (
    HISTOGRAM_BINS,
    QUANTITY_NAMES,
    histograms,
    preset_name,
    preview,
    summary,
)
from mlpmoe.measure.notation import count
from mlpmoe.models import named_calibration

SPECS = [
    ConversionSpec(),
    ConversionSpec(branches=1),
    ConversionSpec(branches=48, fade=2.0),
    ConversionSpec(branches=5, fade=0.9, keep=1),
    ConversionSpec(branches=7, keep=3, compensation="none"),
]


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
@pytest.mark.parametrize("quantity", list(QUANTITY_NAMES))
def test_preview(tiny, spec, quantity):
    shown = preview(tiny, spec, 1, "gate", quantity)
    converted = parameter_report(convert(tiny.model, spec))
    assert shown.nonzero.dense == count(parameter_report(tiny.model).nonzero)
    assert shown.nonzero.converted == count(converted.nonzero)
    assert shown.compute.converted == count(converted.macs_per_token)
    assert np.shape(shown.heat.data[0].z) == (2, spec.branches)


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_heat_map_is_what_each_branch_lost(tiny, spec):
    """Recounted from the weights of the two models, without the project's measurements."""
    lost = np.array(preview(tiny, spec, 0, "gate", "nonzero").heat.data[0].z)
    dense = tiny.model.state_dict()
    converted = convert(tiny.model, spec).state_dict()
    for layer in range(2):
        before, after = np.zeros(spec.branches), np.zeros(spec.branches)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            pieces = dense[key].tensor_split(spec.branches, dim=dim)
            start = 0
            for b, piece in enumerate(pieces):
                before[b] += piece.count_nonzero()
                if b < spec.kept:
                    kept = converted[key].narrow(dim, start, piece.shape[dim])
                    after[b] += kept.count_nonzero()
                    start += piece.shape[dim]
        assert lost[layer] == pytest.approx(100 * (1 - after / before))


@pytest.mark.parametrize("quantity", list(QUANTITY_NAMES))
def test_nothing_is_lost_without_fade_and_keep(tiny, quantity):
    heat = preview(tiny, ConversionSpec(branches=3), 0, "up", quantity).heat
    assert np.array(heat.data[0].z) == pytest.approx(0)


def test_squared_weights_lose_less_than_their_number(tiny):
    """Fade takes the smallest."""
    spec = ConversionSpec(fade=0.9)
    number, energy = (
        np.array(preview(tiny, spec, 0, "gate", quantity).heat.data[0].z)
        for quantity in ("nonzero", "energy")
    )
    assert (energy[:, 1:] < number[:, 1:]).all()


def test_gateless_models_have_two_projections(gateless):
    assert gateless.projections == ["up", "down"]
    for projection in gateless.projections:
        preview(gateless, ConversionSpec(fade=0.9, keep=5), 1, projection, "energy")
    with pytest.raises(UserError, match="up, down"):
        preview(gateless, ConversionSpec(), 0, "gate", "nonzero")


@pytest.mark.parametrize("name", ["", "bias", "up ", None, 3, "x" * 10_000])
def test_unknown_names_are_refused_in_a_short_sentence(tiny, name):
    for arguments in ((name, "nonzero"), ("up", name)):
        with pytest.raises(UserError, match="is not one of") as caught:
            preview(tiny, ConversionSpec(), 0, *arguments)
        assert len(str(caught.value)) < 200


def test_a_layer_of_a_deeper_model_shows_the_last_layer(tiny, one_layer):
    assert "layer 1" in histograms(tiny, ConversionSpec(), 30, "up").layout.xaxis.title.text
    assert "layer 0" in histograms(one_layer, ConversionSpec(), 1, "up").layout.xaxis.title.text


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_histograms_count_the_weights(tiny, projection):
    """Bars add up to the weights inside the axis, branch by branch."""
    spec = ConversionSpec(branches=4)
    figure = histograms(tiny, spec, 0, projection)
    weight = getattr(tiny.model.model.layers[0].mlp, f"{projection}_proj").weight.detach().abs()
    upper = figure.layout.xaxis.range[1]
    assert upper == pytest.approx(4 * float(weight.square().mean().sqrt()), rel=1e-5)
    pieces = weight.tensor_split(4, dim=1 if projection == "down" else 0)
    stays = figure.data[2]
    for b, piece in enumerate(pieces):
        notes = [n for n in stays.text if n.startswith(f"branch {b}<br>")]
        assert len(notes) == HISTOGRAM_BINS
        counts = [int(n.split("<br>")[1].split()[0].replace(",", "")) for n in notes]
        assert sum(counts) == int((piece <= upper).sum())


def test_a_layer_of_zeros_is_shown(tiny):
    """Block expansion adds such layers; the axis has no scale to take from them."""
    dense = copy.deepcopy(tiny.model)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.zero_()
    expanded = LoadedModel("expanded", "Expanded", tiny.checked, dense, tiny.tokenizer)
    figure = preview(expanded, ConversionSpec(fade=0.5), 1, "down", "nonzero").histograms
    assert figure.layout.xaxis.range[1] > 0
    assert not any("-" in note for trace in figure.data[:3] for note in trace.text)


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_summary(tiny, spec):
    values = summary(tiny, spec)
    dense, converted = (
        parameter_report(model) for model in (tiny.model, convert(tiny.model, spec))
    )
    assert values["spec"] == spec.to_dict()
    assert values["parameters"] == {"dense": dense.total, "converted": converted.total}
    assert values["nonzero"] == {"dense": dense.nonzero, "converted": converted.nonzero}
    assert values["mlp_nonzero"] == {
        "dense": dense.mlp_nonzero,
        "converted": converted.mlp_nonzero,
    }
    assert values["macs_per_token"]["converted"] == converted.macs_per_token
    if spec.fade:
        faded = values["faded"]
        assert faded["what"] == "gate and up"
        assert 0 <= faded["requested"] <= faded["realised"] + 0.01 <= 1.01
    else:
        assert values["faded"] is None
    json.dumps(values)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recognised(name):
    assert preset_name(PRESETS[name]) == name


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_recognised_by_what_it_does(name):
    """K = B is the same as all, and compensation says nothing then, unless it makes up for fade."""
    spec = replace(PRESETS[name], keep=PRESETS[name].kept)
    assert preset_name(spec) == name
    if spec.kept == spec.branches:
        fitted = spec.compensation == "refit"
        assert preset_name(replace(spec, compensation="none")) == (None if fitted else name)
        assert preset_name(replace(spec, compensation="ratio")) == (None if fitted else name)


def test_other_specs_are_no_preset():
    assert preset_name(ConversionSpec(branches=15)) is None
    assert preset_name(ConversionSpec(fade=0.85)) is None
    assert preset_name(ConversionSpec(fade=0.9, keep=11)) is None


# layers that keep different branches, and branches that keep fewer neurons

SHARED_OUT = ConversionSpec(branches=8, keep=5, allocation="sensitivity")
BY_NEURONS = ConversionSpec(branches=8, fade=1.2, fade_unit="neuron")
EMPTIED = ConversionSpec(branches=8, fade=2.0, fade_unit="neuron")  # the last four are
BOTH = ConversionSpec(
    branches=8, keep=5, fade=0.8, fade_unit="neuron", fade_score="wanda", allocation="sensitivity"
)
DIFFERING = [SHARED_OUT, BY_NEURONS, EMPTIED, BOTH]


@cache
def direct_mlps(loaded: LoadedModel, spec: ConversionSpec) -> list:
    calibration = Calibration.from_text(loaded.tokenizer, named_calibration("stories"))
    model = convert(loaded.model, spec, calibration if spec.needs_calibration else None)
    return [layer.mlp for layer in model.model.layers]


def neurons_left(loaded: LoadedModel, spec: ConversionSpec) -> list[list[int]]:
    """Neurons of all branches, layer by layer, from the shapes of a direct conversion."""
    mlps = direct_mlps(loaded, spec)
    for mlp in mlps:
        assert sum(mlp.sizes) == mlp.state_dict()["up_proj.weight"].shape[0]
    return [[*mlp.sizes, *[0] * (spec.branches - len(mlp.sizes))] for mlp in mlps]


def counts_in(trace, branch: int) -> list[int]:
    """The numbers of weights that the hover texts of a branch tell, bin by bin."""
    notes = [note for note in trace.text if note.startswith(f"branch {branch}<br>")]
    return [int(note.split("<br>")[1].split()[0].replace(",", "")) for note in notes]


@pytest.mark.parametrize("spec", DIFFERING, ids=ConversionSpec.to_query)
@pytest.mark.parametrize("quantity", list(QUANTITY_NAMES))
def test_heat_map_of_layers_and_branches_that_differ(uneven, spec, quantity):
    asked = uneven.asked(spec)
    heat = np.array(preview(uneven, asked, 0, "gate", quantity).heat.data[0].z)
    left = np.array(neurons_left(uneven, spec))
    assert heat.shape == (2, 8)
    if quantity == "nonzero":
        assert heat == pytest.approx(100 * (1 - left / 6))
    else:
        assert ((heat == 0) == (left == 6)).all()
        assert ((heat == 100) == (left == 0)).all()
    if spec.allocation == "sensitivity":
        kept = (left > 0).sum(1)
        assert kept[0] > kept[1]  # which loses least where it says least
        assert sum(len(mlp.sizes) for mlp in direct_mlps(uneven, spec)) == 2 * spec.kept
    if spec is EMPTIED:
        assert (left[:, 4:] == 0).all() and (left[:, :4] > 0).all()


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


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_histograms_of_scores_without_a_threshold(tiny, score, projection):
    spec = ConversionSpec(
        branches=8, fade=0.9, fade_score=score, fade_projections="gate-up-down", keep=6
    )
    _, removed, stays, thresholds = histograms(tiny, tiny.asked(spec), 1, projection).data
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


CALIBRATED = [
    ConversionSpec(keep=12, order="least-squares", compensation="refit"),
    ConversionSpec(fade=0.6, fade_score="sparsegpt", fade_projections="gate-up-down"),
    SHARED_OUT,
    BOTH,
]


@pytest.mark.parametrize("spec", CALIBRATED, ids=ConversionSpec.to_query)
def test_summary_of_a_calibrated_conversion(uneven, spec):
    values = summary(uneven, uneven.asked(spec))
    calibration = Calibration.from_text(uneven.tokenizer, named_calibration("stories"))
    report = parameter_report(convert(uneven.model, spec, calibration))
    assert values["spec"] == spec.to_dict()
    assert values["parameters"]["converted"] == report.total
    assert values["nonzero"]["converted"] == report.nonzero
    assert values["macs_per_token"]["converted"] == report.macs_per_token
    assert (values["faded"] is None) == (not spec.fades)
    assert "text" not in json.dumps(values)  # the calibration's would be long
