"""Sweeps against the same conversions one by one, and the standard comparison on a tiny model."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all
from mlpmoe.core.errors import SpecError, UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.measure.quality.perplexity import compare, perplexity
from mlpmoe.measure.runs.sweep import (
    AT_ONCE,
    BOUND,
    ROUTED,
    STATIC,
    Run,
    comparison,
    measure,
    run_of,
    sweep,
)
from mlpmoe.models import assets_folder, load
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
    before = parameter_report(model)
    for run in runs:
        converted = convert(model, run.spec, calibration)
        expected = perplexity(converted, byte_tokenizer(), TEXT, 32, 8)
        assert run.perplexity == pytest.approx(expected.value, rel=1e-5)
        assert run.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
        change, counted = compare(dense, expected), parameter_report(converted)
        assert run.ratio == pytest.approx(change.ratio, rel=1e-5)
        assert run.stderr == pytest.approx(change.stderr, rel=1e-4)
        assert (run.nonzero, run.macs_per_token) == (counted.nonzero, counted.macs_per_token)
        for share, part in {
            "nonzero_share": "nonzero", "mlp_nonzero_share": "mlp_nonzero",
            "macs_share": "macs_per_token", "mlp_macs_share": "mlp_macs_per_token",
        }.items():  # fmt: skip
            expected_share = getattr(counted, part) / getattr(before, part)
            assert getattr(run, share) == pytest.approx(expected_share)
        assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_runs_come_as_they_are_known(model, text):
    """A sweep that is stopped has given what it measured."""
    doing = []
    runs = sweep(model, text, [ConversionSpec(branches=b) for b in (2, 3)], report=doing.append)
    assert not doing
    assert next(runs).spec.branches == 2
    assert doing[-1] == "perplexity, 0 of 2 measured"
    assert next(runs).spec.branches == 3
    assert doing[-1].startswith("perplexity, 1 of 2 measured, about ")
    assert doing[-1].endswith(" s left")


def test_nothing_to_measure(model, text):
    doing = []
    assert list(sweep(model, text, [], report=doing.append)) == doing == []


def test_a_missing_calibration_text_is_refused(model, text):
    with pytest.raises(SpecError, match="calibration"):
        list(sweep(model, text, [ConversionSpec(method="cmoe")]))


def test_what_does_not_fit_is_refused_before_anything_is_measured(model, text):
    doing = []
    specs = [ConversionSpec(branches=4), ConversionSpec(branches=D_FF + 1)]
    with pytest.raises(SpecError, match="between 1 and 48"):
        list(sweep(model, text, specs, report=doing.append))
    assert doing == []


def test_a_spec_that_fails_spares_the_others(model, text):
    """What the fade unit does not fit shows only when the model is converted."""
    failing = ConversionSpec(fade_unit="1:5")  # of 32 inputs
    specs = [*SPECS[:2], failing, SPECS[2], failing, SPECS[3]]
    measured = []
    with pytest.raises(SpecError, match="--fade-unit 1:5: 1:5 zeros need a multiple"):
        for run in sweep(model, text, specs, some_text(), 32, 8):
            measured.append(run)
    assert measured == list(sweep(model, text, SPECS[:4], some_text(), 32, 8))


# Run ---------------------------------------------------------------------------------------

RUN = Run(ConversionSpec(keep=8), 12.5, 1.25, 0.01, 1.1, 900, 0.9, 0.8, 850, 0.85, 0.7)
INFINITE = ("perplexity", "ratio", "stderr", "bits_per_byte")
COUNTS = ("nonzero", "macs_per_token")
FIGURES = [name for name in RUN.to_dict() if name != "spec"]


def as_json(run):
    """What a strict reader of JSON makes of a run."""
    return json.loads(json.dumps(run.to_dict(), allow_nan=False))


@given(
    figures=st.fixed_dictionaries(
        {
            name: st.integers(0, 2**70) if name in COUNTS
            else st.floats(0, 1e300) | (st.just(math.inf) if name in INFINITE else st.nothing())
            for name in FIGURES
        }
    )
)  # fmt: skip
def test_runs_survive_json(figures):
    run = replace(RUN, **figures)
    assert Run.from_dict(as_json(run)) == run
    assert Run.from_dict(asdict(run) | {"spec": run.spec.to_dict(), "model": "demo"}) == run


def test_whole_numbers_are_figures_too():
    """JavaScript writes 1.0 as 1."""
    run = replace(RUN, ratio=1.0, macs_share=1.0)
    assert Run.from_dict(run.to_dict() | {"ratio": 1, "macs_share": 1}) == run


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("value", ["1", True, [1], {}, -1, -0.5, math.nan, 10**400], ids=repr)
def test_other_figures_make_no_run(name, value):
    if value == 10**400 and name in COUNTS:
        value = 1.0
    with pytest.raises(UserError, match=f"not a run: {name} is "):
        Run.from_dict(RUN.to_dict() | {name: value})


@pytest.mark.parametrize("name", sorted(set(FIGURES) - set(INFINITE)))
@pytest.mark.parametrize("value", [None, math.inf])
def test_infinite_is_only_what_a_broken_model_gives(name, value):
    with pytest.raises(UserError, match=f"not a run: {name} is "):
        Run.from_dict(RUN.to_dict() | {name: value})


@pytest.mark.parametrize("missing", ["spec", *FIGURES])
def test_a_run_is_whole(missing):
    values = RUN.to_dict()
    del values[missing]
    with pytest.raises(UserError, match=f"not a run: .*{missing}"):
        Run.from_dict(values)


@pytest.mark.parametrize(
    "values", [None, 5, "run", [], {}, {"spec": 5}, {"spec": []}, {"spec": {"branches": "8"}},
               {"spec": {"speed": 1}}, {"spec": {"method": []}}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_run(values):
    with pytest.raises(UserError):
        Run.from_dict(values)


def test_a_model_whose_losses_are_undefined(model, text):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    dense, undefined = measure(model, text, 32, 8), measure(broken, text, 32, 8)
    counted = parameter_report(model)
    run = run_of(ConversionSpec(), dense, undefined, counted, counted)
    assert [getattr(run, name) for name in INFINITE] == [math.inf] * 4
    assert Run.from_dict(as_json(run)) == run


def test_the_runs_that_come_with_the_project():
    """Their shares are of the demo model as it is."""
    dense = parameter_report(load("demo")[0])
    lines = (assets_folder() / "sweeps" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [Run.from_dict(json.loads(line)) for line in lines]
    assert len({run.spec for run in runs}) == 63
    for run in runs:
        assert run.nonzero_share == run.nonzero / dense.nonzero
        assert run.macs_share == run.macs_per_token / dense.macs_per_token
        inside = run.nonzero - (dense.nonzero - dense.mlp_nonzero)
        assert run.mlp_nonzero_share == pytest.approx(inside / dense.mlp_nonzero, rel=1e-12)


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
        elif spec.method == "inputs":  # of 32 inputs and 48 neurons so many as come near
            assert share == pytest.approx(active, abs=1 / D_MODEL)
        elif spec.method == "neurons":
            assert share == pytest.approx(active, abs=1 / D_FF)
        else:
            assert spec.active == active
    names = {name for name, (_, spec) in chosen.items() if spec.method == "neurons"}
    assert len(names) == (4 if active > 1 / 3 else 0)


def test_every_method_is_compared():
    methods = {spec.method for _, spec in comparison(0.75).values()}
    assert methods == {
        "mlpmoe", "random", "contiguous", "moefication", "cmoe", "expertweaver", "coactivation",
        "neurons", "inputs",
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
    assert shares == pytest.approx([active] * 4, abs=1 / families.D_FF)


@pytest.mark.parametrize(("active", "gated"), [(0.5, False), (0.3, False), (1 / 3, True)])
def test_no_neurons_where_choosing_them_takes_it_all(active, gated):
    chosen = comparison(active, gated)
    assert all(spec.method != "neurons" for _, spec in chosen.values())
    inputs = sum(spec.method == "inputs" for _, spec in chosen.values())
    assert inputs == (4 if gated else 2)  # a gate opens neurons
    assert len(chosen) - inputs == len(comparison(0.75)) - 4 - 4
