"""What a slider shows at once: true counts, a name for known recipes, and code that runs."""

from __future__ import annotations

import copy
import shlex
from dataclasses import replace
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch

from mlpmoe import PRESETS, ConversionSpec, UserError, convert, load, parameter_report
from mlpmoe.explorer.preview import (
    HISTOGRAM_BINS,
    QUANTITY_NAMES,
    histograms,
    preset_name,
    preview,
    snippet,
    summary,
)
from mlpmoe.explorer.workbench import LoadedModel
from mlpmoe.measure.notation import count

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
    assert spec.to_python() in shown.snippet


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
    zeroed = values["gate_and_up_zeroed"]
    assert 0 <= zeroed["requested"] <= zeroed["realised"] + 0.01 <= 1.01


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recognised(name):
    assert preset_name(PRESETS[name]) == name


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_recognised_by_what_it_does(name):
    """K = B is the same as all, and compensation says nothing then."""
    spec = replace(PRESETS[name], keep=PRESETS[name].kept)
    assert preset_name(spec) == name
    if spec.kept == spec.branches:
        assert preset_name(replace(spec, compensation="none")) == name


def test_other_specs_are_no_preset():
    assert preset_name(ConversionSpec(branches=15)) is None
    assert preset_name(ConversionSpec(fade=0.85)) is None
    assert preset_name(ConversionSpec(fade=0.9, keep=11)) is None


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_the_snippet_makes_the_same_model(tiny, tiny_folder, spec):
    names: dict = {}
    exec(snippet(str(tiny_folder), spec), names)
    expected = convert(load(tiny_folder)[0], spec).state_dict()
    made = names["converted"].state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in made)


@pytest.mark.parametrize("model", ["demo", "owner/model", 'my models/a\'b "c"', "back\\slash"])
@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_the_shell_line_survives_the_shell(model, spec):
    (line,) = (line for line in snippet(model, spec).splitlines() if " -m mlpmoe " in line)
    words = shlex.split(line[line.index("python") :])
    assert words[:5] == ["python", "-m", "mlpmoe", "evaluate", model]
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    query = "&".join(f"{flag.removeprefix('--')}={value}" for flag, value in flags.items())
    assert ConversionSpec.from_query(query) == spec
    assert dict(parse_qsl(spec.to_query())) == dict(parse_qsl(query))
