"""Sweeps against the same conversions one by one, and the standard comparison on a tiny model."""

import json

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all
from mlpmoe.core.errors import SpecError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.parameters import parameter_report
from mlpmoe.measure.perplexity import compare, encode_text, perplexity
from mlpmoe.measure.sweep import AT_ONCE, BOUND, ROUTED, STATIC, comparison, measure, sweep
from tests import families
from tests.tiny import D_FF, D_MODEL, VOCABULARY, byte_tokenizer, tiny_model

TEXT = "A heron stood in the reeds.\n<|endoftext|>\nNobody had told the frogs, so they sang on."


def some_text(vocabulary=VOCABULARY, length=64):
    """A calibration text of tokens drawn at random."""
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(1, vocabulary, (8, length), generator=generator))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def text():
    return encode_text(byte_tokenizer(), TEXT)


# sweep -------------------------------------------------------------------------------------

SPECS = [
    ConversionSpec(branches=6, fade=0.9),
    ConversionSpec(branches=16, keep=8, order="fluctuation", compensation="mean"),
    ConversionSpec(method="expertweaver", active=0.5),  # its τ needs a pass of its own
    ConversionSpec(method="coactivation", active=0.75, compensation="mean", selection="threshold"),
    ConversionSpec(method="cmoe", active=0.5, progressive=True),
    ConversionSpec(method="random", active=0.5, seed=3),
    ConversionSpec(method="neurons", active=0.25, router="gate-norm"),
]


def test_a_sweep_equals_conversions_measured_one_by_one(model, text):
    assert len(SPECS) > AT_ONCE
    calibration, doing = some_text(), []
    runs = list(sweep(model, text, SPECS, calibration, 32, 8, doing.append))
    assert [run.spec for run in runs] == SPECS
    assert doing
    dense = perplexity(model, byte_tokenizer(), TEXT, 32, 8)
    dense_macs = parameter_report(model).mlp_macs_per_token
    for run in runs:
        converted = convert(model, run.spec, calibration)
        expected = perplexity(converted, byte_tokenizer(), TEXT, 32, 8)
        assert run.perplexity == pytest.approx(expected.value, rel=1e-5)
        assert run.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
        change, counted = compare(dense, expected), parameter_report(converted)
        assert run.ratio == pytest.approx(change.ratio, rel=1e-5)
        assert run.stderr == pytest.approx(change.stderr, rel=1e-4)
        assert (run.nonzero, run.macs_per_token) == (counted.nonzero, counted.macs_per_token)
        assert run.mlp_macs_share == pytest.approx(counted.mlp_macs_per_token / dense_macs)
        assert ConversionSpec.from_dict(json.loads(json.dumps(run.to_dict()))["spec"]) == run.spec


def test_runs_come_as_they_are_known(model, text):
    """A sweep that is stopped has given what it measured."""
    doing = []
    runs = sweep(model, text, [ConversionSpec(branches=b) for b in (2, 3)], report=doing.append)
    assert not doing
    assert next(runs).spec.branches == 2
    assert doing[-1] == "perplexity, 0 of 2 measured"
    assert next(runs).spec.branches == 3
    assert doing[-1] == "perplexity, 1 of 2 measured"


def test_nothing_to_measure(model, text):
    doing = []
    assert list(sweep(model, text, [], report=doing.append)) == doing == []


def test_a_missing_calibration_text_is_refused(model, text):
    with pytest.raises(SpecError, match="calibration"):
        list(sweep(model, text, [ConversionSpec(method="cmoe")]))


def test_measure_is_perplexity(model, text):
    measured = measure(model, text, 16, 4)
    assert measured == perplexity(model, byte_tokenizer(), TEXT, 16, 4)


@pytest.mark.parametrize(
    ("spec", "neurons", "router"),
    [  # neurons that run for a token; multiply-adds of the router
        (ConversionSpec(branches=16, keep=4), 12, 0),
        # 16 experts of 3 neurons
        (ConversionSpec(method="contiguous", active=0.5), 8 * 3, 16 * D_MODEL),
        # 8 experts of 6 neurons: 2 always run, 2 of the other 6 as one neuron of each says
        (ConversionSpec(method="cmoe", active=0.5), 2 * 6 + 2 * 6, 2 * 6 * D_MODEL),
        # 48 experts of 1 neuron: 12 always run, 24 of the other 36 by choice
        (ConversionSpec(method="random", active=0.75, shared=0.25), 12 + 24, 36 * D_MODEL),
        # all run, so nothing is chosen
        (ConversionSpec(method="random", active=1.0), 48, 0),
        (ConversionSpec(method="moefication", active=0.5, router="oracle"), 24, 0),
    ],
    ids=lambda value: value.to_flags() if isinstance(value, ConversionSpec) else None,
)
def test_compute_is_what_runs_and_the_router(model, text, spec, neurons, router):
    (run,) = sweep(model, text, [spec], some_text())
    share = (neurons * 3 * D_MODEL + router) / (D_FF * 3 * D_MODEL)
    assert run.mlp_macs_share == pytest.approx(share, abs=1e-9)


# comparison --------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [0.875, 0.75, 0.5, 0.4, 0.1])
def test_all_methods_convert_at_equal_compute(model, active):
    chosen = comparison(active)
    specs = [spec for _, spec in chosen.values()]
    assert len(set(specs)) == len(specs)
    dense = parameter_report(model).mlp_macs_per_token
    converted = convert_all(model, specs, some_text())
    for (kind, spec), other in zip(chosen.values(), converted, strict=True):
        assert kind in (STATIC, ROUTED, BOUND)
        assert (kind == STATIC) == (spec.routed is None)
        assert (kind == BOUND) == (spec.router == "oracle")
        share = parameter_report(other).mlp_macs_per_token / dense
        if kind == STATIC:
            assert spec.branches == 16
            distances = {k: abs(k / 16 - active) for k in range(1, 17)}
            assert distances[spec.keep] == min(distances.values())
            assert share == pytest.approx(spec.keep / 16)
        elif spec.method == "neurons":
            assert share == pytest.approx(active, abs=1 / D_FF)
        else:
            assert spec.active == active
    names = {name for name, (_, spec) in chosen.items() if spec.method == "neurons"}
    assert len(names) == (3 if active > 1 / 3 else 0)


def test_every_method_is_compared():
    methods = {spec.method for _, spec in comparison(0.75).values()}
    assert methods == {
        "mlpmoe", "random", "contiguous", "moefication", "cmoe", "expertweaver", "coactivation",
        "neurons",
    }  # fmt: skip


@pytest.mark.parametrize("active", [0.75, 0.6])
def test_neurons_of_plain_mlps(active):
    """Up runs in full, so half of the multiply-adds are gone before a neuron is chosen."""
    model = families.build("gpt2")
    specs = [spec for _, spec in comparison(active, gated=False).values()]
    dense = parameter_report(model).mlp_macs_per_token
    converted = convert_all(model, specs, some_text(families.VOCABULARY, 32))
    shares = [
        parameter_report(other).mlp_macs_per_token / dense
        for spec, other in zip(specs, converted, strict=True)
        if spec.method == "neurons"
    ]
    assert shares == pytest.approx([active] * 3, abs=1 / families.D_FF)


@pytest.mark.parametrize(("active", "gated"), [(0.5, False), (0.3, False), (1 / 3, True)])
def test_no_neurons_where_choosing_them_takes_it_all(active, gated):
    chosen = comparison(active, gated)
    assert all(spec.method != "neurons" for _, spec in chosen.values())
    assert len(chosen) == len(comparison(0.75)) - 3
