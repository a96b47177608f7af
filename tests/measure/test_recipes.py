"""The recipes: one budget within a group, and every one of them converts."""

import itertools

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.choices import ALLOCATIONS
from mlpmoe.core.conversion import convert_all, mlp_modules
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.scores import SCORES
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.runs.recipes import recipes
from tests import families
from tests.tiny import D_MODEL, LAYERS, VOCABULARY, tiny_model

GROUPS = {"75 % kept": 12, "50 % kept": 8, "28.1 % zeroed": 16}  # name -> branches kept
D_FF = 512  # 28.1 % of the neurons of a branch are a whole number, as of the inputs
MATRIX = LAYERS * D_FF * D_MODEL  # weights of one kind of matrix in the whole tiny model


def some_text(vocabulary=VOCABULARY, length=64):
    """A calibration text of tokens drawn at random."""
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(1, vocabulary, (8, length), generator=generator))


@pytest.fixture(scope="module")
def converted():
    """Name -> converted model."""
    specs = recipes()
    made = convert_all(dense_model(), list(specs.values()), some_text())
    return dict(zip(specs, made, strict=True))


def dense_model():
    return tiny_model(intermediate_size=D_FF)


def in_group(group):
    return {name: spec for name, spec in recipes().items() if name.startswith(f"{group}: ")}


def share_of_zeros(spec):
    """Of the weights of a gated MLP, as the schedule is defined."""
    branches = range(spec.branches)
    ramp = [min(1, spec.fade * i / spec.branches) for i in branches]
    if spec.fade_schedule == "uniform":  # as much as the ramp, which nothing cuts off
        ramp = [spec.fade * (spec.branches - 1) / 2 / spec.branches for _ in branches]
    return sum(ramp) / spec.branches * len(spec.fade_projections.split("-")) / 3


def test_every_recipe_is_in_one_group_and_said_once():
    assert sum(len(in_group(group)) for group in GROUPS) == len(recipes())
    specs = list(recipes().values())
    assert len(set(specs)) == len(specs)
    assert len(in_group("75 % kept")) == len(in_group("50 % kept")) >= 12
    assert len(in_group("28.1 % zeroed")) >= 8


@pytest.mark.parametrize("group", GROUPS)
def test_one_budget_within_a_group(group):
    zeros = 0.28125 if "zeroed" in group else 0
    for spec in in_group(group).values():
        assert (spec.branches, spec.kept) == (16, GROUPS[group])
        assert spec.routed is None
        assert spec.pattern is None
        assert spec.fade_unit == "weight"
        assert share_of_zeros(spec) == pytest.approx(zeros, abs=1e-12)


@pytest.mark.parametrize("group", GROUPS)
def test_from_the_published_recipe_in_steps(group):
    """Each differs from one before in one field; where the score is fitted, two belong together."""
    specs = [spec.to_dict() for spec in in_group(group).values()]
    first = next(iter(in_group(group).values()))
    assert not first.needs_calibration
    assert (first.order, first.fade_score, first.compensation) == (
        "contiguous",
        "magnitude",
        "sqrt",
    )
    for i, spec in enumerate(specs[1:], 1):
        steps = [sum(spec[field] != other[field] for field in spec) for other in specs[:i]]
        assert min(steps) <= 2


def test_the_stages_are_all_there():
    kept = in_group("75 % kept").values()
    assert {spec.order for spec in kept} == {*ORDERS} - {"random"}
    zeroed = in_group("28.1 % zeroed").values()
    assert {spec.fade_score for spec in zeroed} == {*SCORES}
    for specs in (kept, zeroed):
        assert {spec.progressive for spec in specs} == {True, False}
    assert {spec.allocation for spec in kept} == {*ALLOCATIONS}
    assert {spec.allocation for spec in zeroed} == {"uniform", "sensitivity"}


@pytest.mark.parametrize("keep", [12, 8])
def test_the_same_neurons_are_left(converted, keep):
    """Also where the layers share them out: the mean over the layers is the same."""
    left = D_FF * keep // 16
    for name in in_group(f"{100 * keep // 16} % kept"):
        assert parameter_report(converted[name]).mlp_macs_per_token == LAYERS * 3 * D_MODEL * left


def test_as_many_weights_are_zero(converted):
    for name, spec in in_group("28.1 % zeroed").items():
        weights = [
            parameter
            for module in mlp_modules(converted[name])
            for parameter in module.parameters()
            if parameter.ndim == 2
        ]
        assert sum(weight.numel() for weight in weights) == 3 * MATRIX
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        slack = 0.002 if spec.allocation == "uniform" else 0.02  # shared out in steps
        assert zeros / (3 * MATRIX) == pytest.approx(0.28125, abs=slack), name


def test_every_recipe_converts_to_another_model(converted):
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = dense_model()(ids).logits
        outputs = {name: model(ids).logits for name, model in converted.items()}
    for name, logits in outputs.items():
        assert torch.isfinite(logits).all(), name
        assert not torch.allclose(logits, dense, atol=1e-4), name
    uniform = [name for name, spec in recipes().items() if spec.allocation == "uniform"]
    for one, other in itertools.combinations(uniform, 2):
        assert not torch.allclose(outputs[one], outputs[other], atol=1e-5), (one, other)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])  # GPT-2 stores its matrices transposed
def test_plain_mlps_convert_as_well(family):
    model = families.build(family)
    specs = list(recipes().values())
    assert len(convert_all(model, specs, some_text(families.VOCABULARY, 32))) == len(specs)
