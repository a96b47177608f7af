"""Layers that are spared stay dense, whatever becomes of the others."""

from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, mlp_modules, observe
from mlpmoe.core.errors import SpecError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.routed.expertweaver import variation
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.routing import routing
from tests.families import VOCABULARY, build

LAYERS = 4
SPARED = (0, 2)
GENERATOR = torch.Generator().manual_seed(3)
CALIBRATION = Calibration(torch.randint(2, VOCABULARY, (9, 50), generator=GENERATOR))
SPECS = [
    ConversionSpec(branches=11, keep=6),
    ConversionSpec(branches=11, fade=0.9, fade_projections="gate-up-down", fade_score="wanda"),
    ConversionSpec(branches=11, keep=6, order="least-squares", compensation="refit"),
    ConversionSpec(branches=11, fade=0.9, fade_unit="neuron", compensation="mean"),
    ConversionSpec(method="random", experts=11, active=0.5, selection="threshold"),
    ConversionSpec(method="cmoe", experts=11, active=0.5, compensation="mean"),
    ConversionSpec(method="neurons", active=0.5),
    ConversionSpec(method="inputs", active=0.5, selection="threshold"),
]


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense():
    return build("llama", num_hidden_layers=LAYERS)


def logits(model):
    return model(CALIBRATION.samples).logits


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_flags)
def test_spared_layers_are_the_dense_ones_and_the_others_as_ever(dense, spec):
    whole = mlp_modules(convert(dense, spec, CALIBRATION))
    some = mlp_modules(convert(dense, replace(spec, spared="0,2"), CALIBRATION))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    for layer, (mlp, other, found) in enumerate(zip(read_mlps(dense), whole, some, strict=True)):
        if layer in SPARED:
            assert torch.equal(found(x), mlp.module(x))
            assert found.up_proj.weight is mlp.module.up_proj.weight
            assert found.branches == (1 if spec.routed else spec.branches)
        else:
            assert not torch.allclose(other(x), mlp.module(x))
            for one, same in zip(other.parameters(), found.parameters(), strict=True):
                assert torch.equal(one, same)


@pytest.mark.parametrize(
    "spec",
    [
        *SPECS,
        ConversionSpec(method="expertweaver", experts=11),
        ConversionSpec(branches=11, keep=6, allocation="sensitivity", compensation="refit",
                       progressive=True),
    ],
    ids=ConversionSpec.to_flags,
)  # fmt: skip
def test_with_all_layers_spared_it_is_the_dense_model(dense, spec):
    converted = convert(dense, replace(spec, spared="0,1,2,3"), CALIBRATION)
    assert torch.equal(logits(converted), logits(dense))


def test_a_layer_calibrated_behind_a_spared_one_sees_the_dense_stream(dense):
    """Progressive: with every layer before it spared, the last is what it is without."""
    spec = ConversionSpec(method="cmoe", experts=11, active=0.5, spared="0,1,2")
    plain, progressive = (
        convert(dense, replace(spec, progressive=flag), CALIBRATION) for flag in (False, True)
    )
    assert torch.equal(logits(plain), logits(progressive))


def test_layers_that_are_not_spared_share_the_budget(dense):
    spec = ConversionSpec(branches=11, keep=6, compensation="none", allocation="sensitivity")
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[8:] *= 0.01
    converted = convert(dense, replace(spec, spared="3"), CALIBRATION)
    sizes = [sum(mlp.sizes) for mlp in mlp_modules(converted)]
    assert sizes[3] == 44 and sum(sizes[:3]) == 3 * 6 * 4 and len(set(sizes[:3])) > 1


def test_expertweaver_s_median_leaves_out_spared_layers(dense):
    layers = observe(dense, CALIBRATION).layers
    values = [variation(layers[layer].gate_means("signed")) for layer in (1, 3)]
    spec = ConversionSpec(method="expertweaver", experts=11, spared="0,2")
    found = convert(dense, spec, CALIBRATION)
    told = convert(dense, replace(spec, tau=float(torch.cat(values).median())), CALIBRATION)
    assert torch.equal(logits(found), logits(told))


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_flags)
def test_costs_are_those_of_the_layers(dense, spec):
    """With every second layer dense, halfway between all and none."""
    none, half, all_ = (
        parameter_report(convert(dense, s, CALIBRATION))
        for s in (spec, replace(spec, spared="0,2"), replace(spec, spared="0,1,2,3"))
    )
    exact = parameter_report(dense)
    assert all_.mlp_macs_per_token == exact.mlp_macs_per_token
    assert all_.active_per_token == all_.total
    for name in ("total", "active_per_token", "macs_per_token", "mlp_macs_per_token"):
        least, found, most = (getattr(report, name) for report in (none, half, all_))
        if spec.selection == "topk":
            assert found == (least + most) / 2, name
        else:  # by a threshold the layers differ
            assert min(least, most) <= found <= max(least, most), name


def test_routing_says_that_all_of_a_spared_layer_runs(dense):
    model = convert(dense, ConversionSpec(method="random", experts=11, active=0.5, spared="1"))
    found = routing(model, torch.arange(2, 12))
    assert [layer.chosen.shape[1] for layer in found] == [11, 0, 11, 11]
    assert [layer.shared for layer in found] == [0, 1, 0, 0]
    assert int(found[1].favourite.max()) == -1 and int(found[1].counts.sum()) == 0


def test_layers_that_are_not_there(dense):
    with pytest.raises(SpecError, match="no layer 4 to spare: this model has layers 0 to 3"):
        convert(dense, ConversionSpec(spared="0,4"))
