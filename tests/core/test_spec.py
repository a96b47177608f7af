"""A spec is right or refused with the allowed values, and survives every form it can take."""

import dataclasses
import json
import shlex
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.choices import ALLOCATIONS, METHODS, PROFILES, SELECTIONS
from mlpmoe.core.errors import SpecError, UserError
from mlpmoe.core.presets import PRESETS
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.spec import ConversionSpec, fields_of
from mlpmoe.core.static.compensation import COMPENSATIONS, FILLS
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.schedule import SCHEDULES, branch_sparsities
from mlpmoe.core.static.scores import SCORES
from tests.core.specs import patterns, spared, static_specs

HUGE = 10**6000  # Python refuses to print it, and it overflows a float


@st.composite
def specs(draw):
    method = draw(st.sampled_from(list(METHODS)))
    if method == "mlpmoe":
        return dataclasses.replace(draw(static_specs()), spared=draw(spared()))
    active = draw(st.floats(0.01, 1))
    routed = ROUTED_METHODS[method]
    choices = {
        "experts": st.integers(2, 10**6),
        "shared": st.floats(0, active),
        "router": st.sampled_from(routed.routers),
        "selection": st.sampled_from(list(SELECTIONS)),
        "profile": st.sampled_from(list(PROFILES)),
        "tau": st.none() | st.floats(0, 10),
        "progressive": st.booleans(),
        "seed": st.integers(0, 10**6),
        "spared": spared(),
    }
    used = {name: choices[name] for name in choices if name in fields_of(method)}
    chosen = draw(st.fixed_dictionaries({}, optional=used))
    compensation = draw(st.none() | st.sampled_from(list(FILLS)))
    return ConversionSpec(method=method, active=active, compensation=compensation, **chosen)


def refusal(**values):
    with pytest.raises(SpecError) as caught:
        ConversionSpec(**values)
    message = str(caught.value)
    assert_readable(message)
    return message


def assert_readable(message):
    assert len(message) < 400
    assert message.isprintable()
    assert message.endswith(".")


# Validation --------------------------------------------------------------------------------


def test_defaults_are_the_paper_s_and_change_nothing():
    spec = ConversionSpec()
    assert (spec.method, spec.branches, spec.fade, spec.keep) == ("mlpmoe", 16, 0.0, None)
    assert spec.compensation == "sqrt"
    assert spec.kept == 16
    assert spec.alpha == 1


def test_fields_are_given_by_name_and_stay():
    with pytest.raises(TypeError):
        ConversionSpec("mlpmoe", 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConversionSpec().branches = 4
    assert len({ConversionSpec(branches=4), ConversionSpec(branches=4)}) == 1


@pytest.mark.parametrize("branches", [0, -1, -(10**30)])
def test_too_few_branches(branches):
    message = refusal(branches=branches)
    assert message.startswith("branches (B) must be at least 1, not ")


@pytest.mark.parametrize(
    "value",
    [16.0, "16", True, False, float("nan"), None, [16], 16 + 0j, np.bool_(True), torch.tensor(3.5)],
    ids=repr,
)
def test_branches_and_keep_are_whole_numbers(value):
    message = refusal(branches=value)
    assert message.startswith("branches (B) must be a whole number, not ")
    if value is not None:
        assert refusal(keep=value).startswith("keep (K) must be a whole number, not ")


@pytest.mark.parametrize("keep", [0, -1, 9, 10**30])
def test_keep_lies_between_one_and_branches(keep):
    message = refusal(branches=8, keep=keep)
    assert f"keep (K) is {keep}" in message
    assert "between 1 and branches (B) = 8" in message


@pytest.mark.parametrize("name", ["branches", "keep", "fade"])
@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["huge", "minus huge"])
def test_numbers_that_cannot_even_be_printed(name, value):
    if (name, value) != ("branches", HUGE):
        refusal(**{name: value})
        return
    with pytest.raises(SpecError) as caught:
        ConversionSpec(branches=value).check_fits(172)
    assert_readable(str(caught.value))


@pytest.mark.parametrize(
    "fade",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        -0.001,
        2.0001,
        1e308,
        10**400,
        True,
        "0.9",
        "",
        None,
        [0.9],
        0.9 + 0j,
        Decimal("0.9"),
        np.float32("nan"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_fade_is_a_number_from_zero_to_two(fade):
    message = refusal(fade=fade)
    assert message.startswith("fade must be a number between 0 and 2, not ")


def test_boundaries_are_allowed():
    assert ConversionSpec(branches=1, keep=1, fade=0).kept == 1
    assert ConversionSpec(branches=8, keep=8, fade=2).fade == 2.0
    assert ConversionSpec(fade=-0.0).fade == 0


def test_other_number_types_become_plain_ones():
    spec = ConversionSpec(branches=np.int64(8), keep=np.int32(4), fade=np.float32(0.5))
    assert spec == ConversionSpec(branches=8, keep=4, fade=0.5)
    values = spec.to_dict()
    types = {name: type(values[name]) for name in ("branches", "fade", "keep")}
    assert types == {"branches": int, "fade": float, "keep": int}
    routed = ConversionSpec(method="cmoe", experts=np.int64(8), active=np.float32(0.5), shared=0)
    assert routed == ConversionSpec(method="cmoe", experts=8, active=0.5, shared=0.0)
    json.dumps(routed.to_dict())
    assert ConversionSpec(fade=Fraction(1, 2)).fade == 0.5
    json.dumps(spec.to_dict())


@pytest.mark.parametrize("name", ["method", "compensation"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "none ",
        "MLPMOE",
        "smart",
        None,
        3,
        ["sqrt"],
        "x" * 10**6,
        "\u202etrqs",
        "\ud800",
        "\0\n",
    ],
    ids=lambda value: ascii(value)[:12],
)
def test_names_are_among_the_known_ones(name, value):
    if (name, value) == ("compensation", None):  # the method's own
        assert ConversionSpec(compensation=None) == ConversionSpec(compensation="sqrt")
        return
    message = refusal(**{name: value})
    allowed = METHODS if name == "method" else COMPENSATIONS
    assert message.startswith(f"{name} must be one of {', '.join(allowed)}; got ")


def test_branches_must_fit_the_model():
    spec = ConversionSpec(branches=173)
    spec.check_fits(173)
    with pytest.raises(SpecError, match=r"173.* 172 neurons.* between 1 and 172"):
        spec.check_fits(172)


@pytest.mark.parametrize("value", [None, 1, -1, 0.5, "a", True, [], float("nan"), object()])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ConversionSpec)])
def test_nothing_but_a_spec_error_ever_comes_out(name, value):
    try:
        spec = ConversionSpec(**{name: value})
    except SpecError as error:
        assert isinstance(error, UserError)
    else:
        assert getattr(spec, name) == value or value is None


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", ()), ("none", ()), ("0", (0,)), ("11,0", (0, 11)), (" 3, 1 ,03", (1, 3)),
        ("0+11", (0, 11)), ("0 11", (0, 11)), (",".join(["7"] * 1000), (7,)),
    ],
)  # fmt: skip
def test_spared_layers_have_one_form(text, layers):
    spec = ConversionSpec(spared=text)
    assert spec.spared_layers == layers
    assert spec.spared == ",".join(map(str, layers))
    assert spec == ConversionSpec(method="mlpmoe", spared=spec.spared)


@pytest.mark.parametrize(
    "value",
    ["-1", "1.0", "1,,2,", "a", "0-3", "²", "9" * 7, 1, None, [0], True, "none,1"],
    ids=ascii,
)
def test_spared_layers_are_numbers(value):
    message = refusal(spared=value)
    assert message.startswith("spared must name layers by their numbers from 0, joined by commas")


def test_records_of_before_know_of_no_spared_layer():
    values = ConversionSpec(keep=12).to_dict()
    del values["spared"]
    assert ConversionSpec.from_dict(values) == ConversionSpec(keep=12)


# Static stages -----------------------------------------------------------------------------


def test_what_the_stages_leave_out_changes_nothing():
    spec = ConversionSpec()
    assert (spec.order, spec.allocation, spec.progressive, spec.seed) == (
        "contiguous", "uniform", False, 0
    )  # fmt: skip
    assert spec.projections == ("gate", "up")
    assert (spec.fades, spec.pattern, spec.needs_calibration) == (False, None, False)


CHOICES = {
    "order": ORDERS,
    "fade_schedule": SCHEDULES,
    "fade_score": SCORES,
    "allocation": ALLOCATIONS,
}


@pytest.mark.parametrize("value", ["", "best", "Linear", None, 3, ["linear"], "\0"], ids=ascii)
@pytest.mark.parametrize("name", CHOICES)
def test_unknown_names_are_answered_with_the_known_ones(name, value):
    words = f"{name} must be one of {', '.join(CHOICES[name])}; got "
    assert refusal(**{name: value}).startswith(words)


def test_all_known_names_are_taken():
    for name, allowed in CHOICES.items():
        for value in allowed:
            assert getattr(ConversionSpec(**{name: value}), name) == value


@pytest.mark.parametrize(
    "value", [-1, 100.5, float("nan"), float("inf"), "2", True, HUGE], ids=lambda v: str(type(v))
)
def test_exponents_are_positive_numbers(value):
    message = refusal(fade_schedule="power", fade_exponent=value)
    assert message.startswith("fade_exponent must be a number between 0 and 100, not ")
    assert refusal(fade_schedule="power", fade_exponent=0) == "fade_exponent must be more than 0."


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"power"}))
def test_an_exponent_belongs_to_the_schedule_power(schedule):
    message = refusal(fade_schedule=schedule, fade_exponent=2.0)
    assert message == f"fade_exponent belongs to the schedule power, not to {schedule}."
    assert ConversionSpec(fade_schedule="power").fade_exponent == 2


@pytest.mark.parametrize(
    "unit",
    ["2:", ":4", "a:b", 3, "", ":", "2:4:8", "-1:4", "+1:4", "1.5:4", "2/4", " 2:4", "neurons",
     "²:4", None, True, ["2:4"], 0.5, "1" * 9 + ":4", "2:4\n", (2, 4)],
    ids=ascii,
)  # fmt: skip
def test_malformed_patterns(unit):
    message = refusal(fade_unit=unit)
    assert message.startswith("fade_unit must be weight, neuron, or n:m such as 2:4; got ")


@pytest.mark.parametrize("unit", ["0:4", "4:4", "5:4", "1:65", "64:65", "1:1000", "0:0", "1:1"])
def test_patterns_out_of_range(unit):
    message = refusal(fade_unit=unit)
    assert message.startswith(f"fade_unit {unit}: ")
    assert "n must be at least 1 and less than m, and m at most 64" in message


@given(unit=patterns())
def test_patterns_say_how_many_zeros_there_are(unit):
    spec = ConversionSpec(fade_unit=unit)
    assert f"{spec.pattern[0]}:{spec.pattern[1]}" == unit == spec.fade_unit
    assert spec.fades
    assert ConversionSpec(fade_unit=unit.replace(":", ":0")) == spec  # written otherwise


@pytest.mark.parametrize("more", [{"fade": 0.5}, {"fade_schedule": "uniform"}], ids=str)
def test_a_pattern_leaves_nothing_for_fade_to_say(more):
    message = refusal(fade_unit="2:4", **more)
    assert message == ("2:4 fixes the share of zeros: leave fade at 0 and fade_schedule at linear.")


@pytest.mark.parametrize("value", ["", "gates", "gate_up", "gate-", "gate up", None, 3, ["up"]])
def test_projections_are_names_joined_by_hyphens(value):
    message = refusal(fade_projections=value)
    assert message.startswith("fade_projections must name gate, up or down, joined by hyphens")


def test_projections_have_one_form():
    for value in ("down-up", "up-down", "up-down-up"):
        assert ConversionSpec(fade_projections=value).fade_projections == "up-down"


@pytest.mark.parametrize("value", ["gate", "up", "down", "gate-up-down"])
def test_neurons_leave_projections_alone(value):
    assert "leave fade_projections alone" in refusal(fade_unit="neuron", fade_projections=value)


def test_nothing_to_calibrate_progressively():
    for values in (
        {},
        {"fade": 0.5},
        {"keep": 8, "order": "norm"},
        {"fade_score": "wanda"},  # of a fade that is not there
        {"keep": 8, "allocation": "sensitivity"},  # which looks at the dense layers
    ):
        assert "no stage of this spec looks at activations" in refusal(progressive=True, **values)
    for values in (
        {"order": "activation"},
        {"compensation": "alpha"},
        {"fade": 0.5, "fade_score": "wanda"},
        {"fade_unit": "1:2", "fade_score": "sparsegpt"},
    ):
        assert ConversionSpec(progressive=True, **values).needs_calibration


@pytest.mark.parametrize("value", [1, 0, "true", None, 1.0, np.bool_(True)], ids=repr)
def test_progressive_is_true_or_false(value):
    message = refusal(order="activation", progressive=value)
    assert message.startswith("progressive must be True or False, not ")


@pytest.mark.parametrize(
    "value", [-1, 2**32, 0.5, "1", None, True, HUGE], ids=lambda v: repr(type(v))
)
def test_seeds_are_whole_numbers(value):
    assert refusal(seed=value).startswith("seed must ")


@pytest.mark.parametrize("method", METHODS)
def test_fields_of_methods_are_fields(method):
    assert set(fields_of(method)) <= {field.name for field in dataclasses.fields(ConversionSpec)}


# Forms -------------------------------------------------------------------------------------


@given(spec=specs())
def test_dict_round_trip(spec):
    values = spec.to_dict()
    assert list(values) == [field.name for field in dataclasses.fields(spec)]
    assert ConversionSpec.from_dict(values) == spec
    assert ConversionSpec.from_dict(json.loads(json.dumps(values))) == spec


@given(spec=st.one_of(specs(), static_specs()))
def test_query_round_trip(spec):
    query = spec.to_query()
    assert ConversionSpec.from_query(query) == spec
    assert set(query) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-=&+%"
    )


@given(spec=st.one_of(specs(), static_specs()))
def test_python_round_trip(spec):
    assert eval(spec.to_python(), {"ConversionSpec": ConversionSpec}) == spec


@given(spec=st.one_of(specs(), static_specs()))
def test_flags_round_trip(spec):
    words = shlex.split(spec.to_flags())
    flags, values = words[::2], words[1::2]
    assert all(flag.startswith("--") for flag in flags)
    assert not any(value.startswith("-") for value in values)
    assert not any("_" in flag for flag in flags)
    texts = {f[2:].replace("-", "_"): v for f, v in zip(flags, values, strict=True)}
    assert ConversionSpec.from_texts(texts) == spec


def test_forms_are_short():
    spec = ConversionSpec(fade=0.9, keep=12)
    assert spec.to_query() == "branches=16&fade=0.9&keep=12"
    assert spec.to_python() == "ConversionSpec(branches=16, fade=0.9, keep=12)"
    assert spec.to_flags() == "--branches 16 --fade 0.9 --keep 12"
    assert ConversionSpec().to_query() == "branches=16"
    spec = ConversionSpec(fade_unit="2:4", fade_score="wanda", progressive=True)
    assert spec.to_flags() == "--branches 16 --fade-score wanda --fade-unit 2:4 --progressive True"
    assert spec.to_query() == "branches=16&fade_score=wanda&fade_unit=2%3A4&progressive=True"


# The share of zeros in place of fade ---------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "spec"),
    [
        ("sparsity=0.421875", ConversionSpec(fade=0.9)),
        ("sparsity=0", ConversionSpec()),
        (
            "sparsity=0.5&branches=1&fade_schedule=uniform",
            ConversionSpec(branches=1, fade=1, fade_schedule="uniform"),
        ),
        (
            "sparsity=0.25&branches=4&keep=2&fade_unit=neuron",  # of the branches that stay
            ConversionSpec(branches=4, keep=2, fade=2, fade_unit="neuron"),
        ),
        (  # nothing could be calibrated without a fade
            "sparsity=0.28125&fade_schedule=uniform&fade_score=wanda&progressive=true",
            ConversionSpec(fade=0.6, fade_schedule="uniform", fade_score="wanda", progressive=True),
        ),
    ],
)
def test_a_share_of_zeros_says_fade_in_another_way(query, spec):
    assert ConversionSpec.from_query(query) == spec
    assert "sparsity" not in spec.to_query()


@given(spec=static_specs(300))
def test_the_share_of_zeros_of_a_spec_gives_it_again(spec):
    shares = branch_sparsities(spec.branches, spec.fade, spec.fade_schedule, spec.fade_exponent)
    values = spec.to_dict() | {"sparsity": sum(shares[: spec.kept]) / spec.kept}
    del values["fade"]
    if spec.pattern:
        with pytest.raises(SpecError, match="fixes the share of zeros: leave out sparsity"):
            ConversionSpec.from_dict(values)
        return
    try:
        found = ConversionSpec.from_dict(values)
    except SpecError as refused:  # a strength that zeroes nothing is none
        assert spec.progressive and values["sparsity"] == 0, refused
        return
    again = branch_sparsities(spec.branches, found.fade, spec.fade_schedule, spec.fade_exponent)
    assert again[: spec.kept] == pytest.approx(shares[: spec.kept], abs=1e-9)
    assert dataclasses.replace(found, fade=spec.fade) == spec


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("sparsity=0.5&fade=0.9", "fade and sparsity say the same in two ways"),
        ("sparsity=0.5&fade=0", "fade and sparsity say the same in two ways"),
        ("sparsity=1.5", "sparsity must be a number between 0 and 1, not 1.5"),
        ("sparsity=nan", "sparsity must be a number between 0 and 1, not nan"),
        ("sparsity=half", "sparsity must be a number, not 'half'"),
        ("sparsity=0.9", "with the schedule linear fade zeroes at most 0.71875 of the weights"),
        ("sparsity=0.5&branches=1", "at most 0 of the weights in 1 branch"),
        ("sparsity=0.5&fade_unit=2:4", "2:4 fixes the share of zeros: leave out sparsity"),
        ("sparsity=0.5&method=cmoe", "sparsity does not belong to the method cmoe, as fade"),
        ("sparsity=0.5&progressive=true", "no stage of this spec looks at activations"),
    ],
)
def test_shares_of_zeros_that_are_refused(query, words):
    assert words in query_refusal(query)


def query_refusal(query):
    with pytest.raises(SpecError) as caught:
        ConversionSpec.from_query(query)
    message = str(caught.value)
    assert_readable(message)
    return message


def test_empty_query_is_the_default():
    assert ConversionSpec.from_query("") == ConversionSpec()


@pytest.mark.parametrize(
    "query",
    [
        "branches=",
        "branches=x",
        "branches=16.0",
        "branches=1e3",
        "keep=all",
        "fade=much",
        "keep=",
        "fade=",
        f"branches={'9' * 10_000}",
        f"keep={'x' * 10_000}",
        "fade=%E2%80%AE0.9",
        "fade=0,9",
        "branches=%00",
        "fade_exponent=two",
        "seed=",
    ],
    ids=lambda query: query[:20],
)
def test_queries_with_unreadable_numbers(query):
    name = query.partition("=")[0]
    assert query_refusal(query).startswith(f"{name} must be a number, not ")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("branches=0", "at least 1"),
        ("branches=8&keep=9", "between 1 and branches (B) = 8"),
        ("fade=nan", "between 0 and 2"),
        ("fade=inf", "between 0 and 2"),
        ("fade=-1", "between 0 and 2"),
        ("method=magic", "mlpmoe"),
        ("compensation=", "sqrt, ratio, none, alpha, mean, refit"),
        ("fade_schedule=steep", "linear, uniform, reverse, power"),
        ("fade_schedule=power&fade_exponent=0", "more than 0"),
        ("fade_exponent=2", "belongs to the schedule power"),
        ("fade_projections=router", "gate, up or down"),
        ("fade_score=taste", ", ".join(SCORES)),
        ("fade_unit=4:2", "n must be at least 1 and less than m"),
        ("fade_unit=2:4&fade=1", "leave fade at 0"),
        ("allocation=greedy", "uniform, global, sensitivity"),
        ("order=", "contiguous, random, norm, activation, fluctuation, least-squares"),
        ("progressive=yes", "true or false"),
        ("progressive=true", "no stage of this spec"),
        ("seed=-1", "between 0 and"),
    ],
)
def test_queries_with_values_out_of_range(query, words):
    assert words in query_refusal(query)


@pytest.mark.parametrize(
    "name",
    ["Branches", "b", "__class__", "kept", "to_dict", "<img onerror=1>", "x" * 10**5, "\u202e"],
)
def test_unknown_fields_are_named(name):
    allowed = ", ".join(field.name for field in dataclasses.fields(ConversionSpec))
    message = query_refusal(f"branches=4&{name}=1")
    assert message.startswith("unknown field ")
    assert ascii(name)[1:8] in message
    assert allowed in message
    with pytest.raises(SpecError, match="unknown field"):
        ConversionSpec.from_dict({"branches": 4, name: 1})


def test_keys_of_any_type_are_refused_alike():
    with pytest.raises(SpecError, match="unknown field"):
        ConversionSpec.from_dict({1: 2, "a": 3, None: 4})


@given(query=st.text(max_size=60))
def test_no_query_breaks_it(query):
    try:
        ConversionSpec.from_query(query)
    except SpecError as error:
        assert_readable(str(error))


@given(
    values=st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(ConversionSpec)]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    )
)
def test_no_json_breaks_it(values):
    try:
        ConversionSpec.from_dict(values)
    except SpecError as error:
        assert_readable(str(error))


# Presets -----------------------------------------------------------------------------------


def test_presets_are_named_specs():
    assert all(type(spec) is ConversionSpec for spec in PRESETS.values())
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert ConversionSpec(branches=16, fade=0.9) in PRESETS.values()
    assert ConversionSpec(branches=16, keep=12) in PRESETS.values()
