"""What has no effect beside the other fields is left out of the canonical form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_mlp, mlp_modules
from mlpmoe.core.errors import SpecError
from mlpmoe.core.presets import PRESETS
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.spec import ConversionSpec, without_idle
from tests.core.layers import KINDS, layer_of, random_mlp
from tests.core.specs import static_specs
from tests.families import VOCABULARY, build

CALIBRATION = Calibration(
    torch.randint(2, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(3))
)
LAYERS = {kind: layer_of(random_mlp(kind)) for kind in KINDS}


@st.composite
def routed_specs(draw):
    method = draw(st.sampled_from(sorted(ROUTED_METHODS)))
    routed = ROUTED_METHODS[method]
    active = draw(st.sampled_from([0.25, 0.5, 1.0]))
    choices = {
        "experts": st.sampled_from([2, 4, 11]),
        "shared": st.sampled_from([0.0, active / 2]),
        "router": st.sampled_from(routed.routers),
        "selection": st.sampled_from(["topk", "threshold"]),
        "compensation": st.sampled_from(["none", "mean"]),
        "progressive": st.booleans(),
        "seed": st.integers(0, 3),
    }
    # without one it is the median of a model, and here is one MLP
    tau = {"tau": st.sampled_from([0.3, 2.0])} if "tau" in routed.fields else {}
    used = {n: c for n, c in choices.items() if n in (*routed.fields, "compensation")}
    return ConversionSpec(
        method=method, active=active, **draw(st.fixed_dictionaries(tau, optional=used))
    )


def weights(module):
    found = {name: tensor for name, tensor in module.state_dict().items() if tensor is not None}
    return found | {"sizes": torch.tensor(getattr(module, "sizes", ()))}


def assert_alike(module, other):
    mine, theirs = weights(module), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@torch.no_grad()
@given(spec=static_specs(24) | routed_specs(), kind=st.sampled_from(KINDS))
def test_it_gives_the_same_weights(spec, kind):
    layer, same = LAYERS[kind], spec.canonical()
    try:
        made = convert_mlp(layer.weights, spec, layer)
    except SpecError as error:
        with pytest.raises(SpecError) as caught:
            convert_mlp(layer.weights, same, layer)
        assert str(caught.value) == str(error)
    else:
        assert_alike(made, convert_mlp(layer.weights, same, layer))


@settings(max_examples=40)
@given(spec=static_specs(12) | routed_specs(), spared=st.sampled_from(["", "1", "0,1"]))
@pytest.mark.filterwarnings("ignore::mlpmoe.core.errors.CalibrationWarning")
def test_it_converts_a_whole_model_alike(spec, spared):
    """With what only a model knows: shares of layers, layer by layer, spared ones."""
    dense = build("llama", intermediate_size=24)
    spec = ConversionSpec.from_dict(spec.to_dict() | {"spared": spared})
    try:
        made = convert(dense, spec, CALIBRATION)
    except SpecError:
        return
    for layers in (None, 2):
        same = convert(dense, spec.canonical(layers), CALIBRATION)
        for one, other in zip(mlp_modules(made), mlp_modules(same), strict=True):
            assert_alike(one, other)


@given(spec=static_specs(64) | routed_specs())
def test_it_is_one_form(spec):
    same = spec.canonical()
    assert same.canonical() == same
    assert ConversionSpec.from_query(same.to_query()) == same


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        (ConversionSpec(branches=8, keep=8, compensation="ratio"), ConversionSpec(branches=8)),
        (ConversionSpec(compensation="refit", progressive=True), ConversionSpec()),
        (ConversionSpec(fade_score="wanda", fade_unit="neuron", keep=4), ConversionSpec(keep=4)),
        # the first branch loses nothing in a ramp
        (ConversionSpec(fade=0.9, keep=1), ConversionSpec(keep=1)),
        (ConversionSpec(fade=0.9, branches=1, fade_schedule="power"), ConversionSpec(branches=1)),
        (ConversionSpec(keep=8, seed=3), ConversionSpec(keep=8)),
        (ConversionSpec(allocation="sensitivity", spared="1"), ConversionSpec()),
        (
            ConversionSpec(method="random", progressive=True),
            ConversionSpec(method="random"),
        ),
        (
            ConversionSpec(method="neurons", active=1, selection="threshold", compensation="mean"),
            ConversionSpec(method="neurons", active=1),
        ),
        (
            ConversionSpec(method="inputs", active=1, selection="threshold", compensation="refit"),
            ConversionSpec(method="inputs", active=1),
        ),
        (
            ConversionSpec(method="expertweaver", shared=0.2, tau=0.5),
            ConversionSpec(method="expertweaver", shared=0.2),
        ),
    ],
    ids=str,
)
def test_what_is_left_out(spec, canonical):
    assert spec != canonical and spec.canonical() == canonical


@pytest.mark.parametrize(
    "spec",
    [
        *PRESETS.values(),
        ConversionSpec(fade=0.9, keep=1, allocation="sensitivity"),  # others may keep more
        ConversionSpec(fade=0.9, keep=1, fade_schedule="reverse"),
        ConversionSpec(fade=0.9, branches=1, fade_schedule="uniform"),
        ConversionSpec(order="norm", spared="0"),
        ConversionSpec(order="random", seed=3),
        ConversionSpec(method="expertweaver", tau=0.5),
        ConversionSpec(method="random", shared=0.2, progressive=True),
    ],
    ids=ConversionSpec.to_flags,
)
def test_what_counts_stays(spec):
    assert spec.canonical() == spec


def test_with_all_layers_spared_nothing_else_counts():
    spec = ConversionSpec(keep=8, order="random", seed=3, spared="0,1")
    assert spec.canonical(layers=3) == spec == spec.canonical()
    assert spec.canonical(layers=2) == ConversionSpec()


def test_values_that_would_be_refused_beside_the_others_are_left_out():
    every = {"fade": 0.5, "fade_schedule": "uniform", "fade_exponent": 2.0, "progressive": True}
    assert without_idle(every) == {"fade": 0.5, "fade_schedule": "uniform"}
    pattern = every | {"fade_unit": "2:4", "fade_score": "wanda"}
    assert without_idle(pattern) == {"fade_unit": "2:4", "fade_score": "wanda", "progressive": True}
