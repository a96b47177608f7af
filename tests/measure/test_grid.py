"""Grids of specs: how values are read, what is left out, and what is refused before it is built."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import SpecError, UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.runs import grid as grid_module
from mlpmoe.measure.runs.grid import MOST_SPECS, Grid, grid, read_grid, read_values
from tests.tiny import VOCABULARY, tiny_model


def specs_of(**texts):
    """The grid of values written as on the command line."""
    return grid({name: read_values(name, text) for name, text in texts.items()})


# Values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("branches", "8,16,32", ["8", "16", "32"]),
        ("branches", " 8 , 16,8", ["8", "16"]),
        ("branches", "4:16:4", ["4", "8", "12", "16"]),
        ("branches", "1:2:1,8:10:2,9", ["1", "2", "8", "10", "9"]),
        ("fade", "0:1:0.25", ["0", "0.25", "0.5", "0.75", "1"]),
        ("fade", "0:0.9:0.3", ["0", "0.3", "0.6", "0.9"]),
        ("fade", "0:1:0.3", ["0", "0.3", "0.6", "0.9"]),  # no step meets the stop
        ("fade", "0.5:0.5:1", ["0.5"]),
        ("fade", "1e-3,0.50", ["1e-3", "0.50"]),
        ("sparsity", "0.25:0.5:0.125", ["0.25", "0.375", "0.5"]),
        ("keep", "all, 75%,12", ["all", "75%", "12"]),
        ("keep", "4:8:2,all", ["4", "6", "8", "all"]),
        ("shared", "auto,0:0.5:0.25", ["auto", "0", "0.25", "0.5"]),
        ("fade_unit", "weight,2:4,1:2", ["weight", "2:4", "1:2"]),
        ("fade_projections", "gate-up,up", ["gate-up", "up"]),
        ("progressive", "false,TRUE", ["false", "TRUE"]),
    ],
)
def test_values_of_a_text(field, text, values):
    assert read_values(field, text) == values


@given(
    start=st.decimals(0, 1000, places=3),
    step=st.decimals("0.001", 50, places=3),
    count=st.integers(1, 50),
)
def test_a_range_is_exact(start, step, count):
    stop = start + (count - 1) * step
    found = [Fraction(text) for text in read_values("tau", f"{start}:{stop}:{step}")]
    assert found == [Fraction(start) + i * Fraction(step) for i in range(count)]


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("branches", "", "--branches must be a whole number or a range start:stop:step"),
        ("branches", "8,,16", "not ''"),
        ("branches", "8;16", "not '8;16'"),
        ("branches", "4.5", "--branches must be a whole number"),
        ("branches", "0:8:0.5", "must be whole numbers"),
        ("branches", "2:4", "start:stop:step"),
        ("branches", "1:2:3:4", "start:stop:step"),
        ("branches", "8:4:1", "its stop not below its start"),
        ("branches", "4:8:0", "its step must be above 0"),
        ("branches", "8:4:-1", "its step must be above 0"),
        ("fade", "0:1:nan", "--fade must be a number or a range"),
        ("fade", "0:1e9999:1", "--fade must be a number or a range"),
        ("fade", "0:1:0.0000001", "10,000,001 values; a sweep takes up to 10,000"),
        ("fade_exponent", "a", "--fade-exponent must be a number"),
        ("keep", "0%", "--keep 0%: a percentage of B lies above 0 % and up to 100 %"),
        ("keep", "101%", "up to 100 %"),
        ("keep", "-5%", "all, a percentage of B such as 75%"),
        ("keep", "some", "all, a percentage of B such as 75%, a whole number"),
        ("fade", "50%", "--fade must be a number"),
        ("sparsity", "50%", "--sparsity must be a number"),
        ("shared", "much", "auto, a number"),
        ("progressive", "yes", "--progressive must be true or false"),
        ("order", "contiguous,", "--order has a value that is empty"),
        ("experts ", "8", "no field of a conversion is called 'experts '; allowed: method, "),
    ],
)
def test_values_that_are_refused(field, text, words):
    with pytest.raises(UserError) as refused:
        read_values(field, text)
    assert words in str(refused.value)


# A sweep file ------------------------------------------------------------------------------


def test_a_sweep_file():
    content = {
        "branches": "8,16",
        "fade": "0:0.9:0.3",
        "keep": ["75%", 12, "all"],
        "order": ["contiguous", "activation"],
        "seed": 3,
        "progressive": [False, True],
    }
    assert read_grid(json.dumps(content)) == {
        "branches": ["8", "16"],
        "fade": ["0", "0.3", "0.6", "0.9"],
        "keep": ["75%", "12", "all"],
        "order": ["contiguous", "activation"],
        "seed": ["3"],
        "progressive": ["false", "true"],
    }
    assert read_grid('{"fade": [0.1, 1e-05]}') == {"fade": ["0.1", "1e-05"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ('{"branches": 8', "is not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[8, 16]", "must hold one object"),
        ("8", "must hold one object"),
        ('{"branchs": 8}', "'branchs'; allowed: method, branches"),
        ('{"branches": 8, "branches": 16}', "names 'branches' twice"),
        ('{"branches": null}', "--branches in the sweep file must be a text, a number"),
        ('{"branches": {"a": 1}}', "--branches in the sweep file must be"),
        ('{"branches": [[8]]}', "--branches in the sweep file must be"),
        ('{"branches": []}', "--branches has no value"),
        ('{"branches": true}', "--branches must be a whole number"),
        ('{"branches": 8.5}', "--branches must be a whole number"),
        ('{"fade-schedule": "linear"}', "allowed: "),
    ],
)
def test_sweep_files_that_are_refused(text, words):
    with pytest.raises(UserError) as refused:
        read_grid(text)
    assert words in str(refused.value)


# Grids -------------------------------------------------------------------------------------


def test_all_combinations_in_order():
    assert specs_of(branches="8,16", fade="0.5,0.9", order="norm") == Grid(
        tuple(
            ConversionSpec(branches=branches, fade=fade, order="norm")
            for branches in (8, 16)
            for fade in (0.5, 0.9)
        ),
        left_out=0,
    )
    assert grid({}) == Grid((ConversionSpec(),), 0)


def test_keep_in_other_words():
    found = specs_of(branches="8,5", keep="all,50%,1%")
    assert [(spec.branches, spec.keep) for spec in found.specs] == [
        (8, None), (8, 4), (8, 1), (5, None), (5, 3), (5, 1),
    ]  # fmt: skip


def test_branches_that_are_not_there_cannot_be_kept():
    found = specs_of(branches="4,8,16", keep="6,12", fade="0.5,0.9")
    kept = [(spec.branches, spec.keep) for spec in found.specs]
    assert kept == [(8, 6), (8, 6), (16, 6), (16, 6), (16, 12), (16, 12)]
    assert found.left_out == 6
    with pytest.raises(SpecError, match=r"--keep .K. above its --branches .B."):
        specs_of(branches="4,8", keep="9")


@pytest.mark.parametrize(
    ("texts", "specs"),
    [
        ({"keep": "8,8,50%"}, [ConversionSpec(keep=8)]),
        ({"keep": "all,16,100%"}, [ConversionSpec()]),
        ({"keep": "16,all"}, [ConversionSpec(keep=16)]),  # the first that was asked for
        ({"compensation": "none,sqrt,refit"}, [ConversionSpec(compensation="none")]),
        (  # without fade and with all branches kept, nothing is there to compensate or choose
            {
                "fade": "0",
                "fade_schedule": "uniform,linear",
                "fade_score": "wanda,magnitude",
                "fade_projections": "up,gate-up",
                "fade_unit": "neuron,weight",
                "allocation": "uniform,sensitivity",
                "compensation": "sqrt,refit,none",
            },
            [ConversionSpec(fade_schedule="uniform", fade_score="wanda", fade_unit="neuron")],
        ),
        (  # α is 1 where all branches stay
            {"fade": "0.5", "compensation": "none,sqrt,mean"},
            [
                ConversionSpec(fade=0.5, compensation="none"),
                ConversionSpec(fade=0.5, compensation="mean"),
            ],
        ),
        (
            {"order": "random,norm", "seed": "1,2"},
            [
                ConversionSpec(order="random", seed=1),
                ConversionSpec(order="random", seed=2),
                ConversionSpec(order="norm", seed=1),
            ],
        ),
        (  # the share of zeros is fixed for 2:4, and the exponent for a ramp
            {"fade": "0.3,0.5", "fade_unit": "weight,2:4"},
            [
                ConversionSpec(fade=0.3),
                ConversionSpec(fade_unit="2:4"),
                ConversionSpec(fade=0.5),
            ],
        ),
        (  # the same share of zeros, whatever the schedule and the branches
            {
                "sparsity": "0.25",
                "fade_schedule": "linear,uniform",
                "branches": "2,4",
                "keep": "all,2",
            },
            [
                ConversionSpec(branches=2, fade=1),
                ConversionSpec(branches=4, fade=2 / 3),
                ConversionSpec(branches=4, fade=2, keep=2),
                ConversionSpec(branches=2, fade=1, fade_schedule="uniform"),
                ConversionSpec(branches=4, fade=2 / 3, fade_schedule="uniform"),
                ConversionSpec(branches=4, fade=2 / 3, fade_schedule="uniform", keep=2),
            ],
        ),
        (
            {"sparsity": "0.25", "fade_unit": "weight,2:4", "method": "mlpmoe,random"},
            [
                ConversionSpec(fade=8 / 15),
                ConversionSpec(fade_unit="2:4"),
                ConversionSpec(method="random"),
            ],
        ),
        (
            {"fade": "0.5", "fade_schedule": "linear,power", "fade_exponent": "2,3"},
            [
                ConversionSpec(fade=0.5),
                ConversionSpec(fade=0.5, fade_schedule="power", fade_exponent=2),
                ConversionSpec(fade=0.5, fade_schedule="power", fade_exponent=3),
            ],
        ),
        (
            {"keep": "8", "order": "norm,activation", "progressive": "true"},
            [
                ConversionSpec(keep=8, order="norm"),
                ConversionSpec(keep=8, order="activation", progressive=True),
            ],
        ),
        (
            {"method": "mlpmoe,contiguous", "keep": "8", "active": "0.5,0.25", "experts": "16"},
            [
                ConversionSpec(keep=8),
                ConversionSpec(method="contiguous", active=0.5),
                ConversionSpec(method="contiguous", active=0.25),
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_conversions_that_are_alike_appear_once(texts, specs):
    assert list(specs_of(**texts).specs) == specs


@pytest.mark.parametrize(
    "spec",
    [
        ConversionSpec(keep=16, compensation="ratio"),
        ConversionSpec(fade_schedule="power", fade_exponent=3, fade_unit="neuron", keep=8),
        ConversionSpec(fade_score="sparsegpt", fade_projections="gate-up-down", keep=8),
        ConversionSpec(order="activation", compensation="refit", progressive=True),
        ConversionSpec(compensation="alpha", allocation="sensitivity"),
        ConversionSpec(fade_unit="2:4", compensation="ratio", allocation="sensitivity"),
        ConversionSpec(fade=0.5, compensation="ratio", allocation="sensitivity"),
        ConversionSpec(order="norm", keep=8, seed=5),
        ConversionSpec(order="random", keep=8, seed=5),
        ConversionSpec(fade=0.9, fade_unit="neuron", fade_score="wanda", seed=5),
    ],
    ids=ConversionSpec.to_flags,
)
def test_what_is_taken_as_alike_is_converted_alike(spec):
    generator = torch.Generator().manual_seed(2)
    text = Calibration(torch.randint(1, VOCABULARY, (8, 32), generator=generator))
    same = spec.canonical()
    assert same != spec or spec.order == "random"
    found, expected = (convert(tiny_model(), s, text).state_dict() for s in (spec, same))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_layers_spared_together_are_joined_by_plus_signs():
    assert [spec.spared for spec in specs_of(keep="8", spared="none,0,0+11,11+0,0 11").specs] == [
        "", "0", "0,11"
    ]  # fmt: skip


def test_branches_and_orders_are_no_detail():
    """They change what the branches are, even where nothing is dropped yet."""
    assert len(specs_of(branches="8,16", order="contiguous,norm").specs) == 4


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"experts": "8"}, "--experts does not belong to mlpmoe; it is for expertweaver, "),
        ({"method": "cmoe,neurons", "keep": "8"}, "--keep does not belong to cmoe, neurons; it"),
        ({"method": "magic"}, "--method magic: method must be one of mlpmoe"),
        ({"fade": "0,7"}, "--fade 7: fade must be a number between 0 and 2"),
        ({"fade": "0.5", "sparsity": "0.5"}, "--fade 0.5 --sparsity 0.5: fade and sparsity say"),
        ({"sparsity": "0.5,0.8"}, "--sparsity 0.8: sparsity is 0.8, but with the schedule linear"),
        ({"sparsity": "0.5", "method": "cmoe"}, "--sparsity does not belong to cmoe; it is for ml"),
        ({"sparsity": "0.5", "fade_unit": "2:4"}, "2:4 fixes the share of zeros"),
        ({"branches": "0"}, "--branches 0: branches (B) must be at least 1"),
        ({"keep": "0"}, "must lie between 1 and"),
        ({"order": "best"}, "--order best: order must be one of contiguous"),
        ({"fade_unit": "2:4", "fade": "0.5"}, "leave fade at 0"),
        ({"fade_exponent": "2"}, "fade_exponent belongs to the schedule power"),
        ({"order": "norm", "progressive": "true"}, "no stage of this spec looks at activations"),
        ({"fade_unit": "neuron", "fade_projections": "up"}, "leave fade_projections alone"),
        ({"method": "cmoe", "active": "0.2", "shared": "0.1,0.5"}, "--shared 0.5: shared is 0.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_grids_that_are_refused(texts, words):
    with pytest.raises(SpecError) as refused:
        specs_of(**texts)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [{"branches": ["x"]}, {"keep": ["120%"]}, {"fade": []}, {"method": []}, {"speed": ["1"]}],
    ids=str,
)
def test_values_that_were_not_read_here_are_checked_as_well(values):
    with pytest.raises(UserError, match=r"branches|keep|fade|method|speed"):
        grid(values)


def test_too_many_are_refused_before_one_is_built(monkeypatch):
    def build(texts):
        assert texts == {"method": "mlpmoe"}, "a combination was built"

    values = {"branches": "1:200:1", "keep": "1:100:1", "method": "mlpmoe"}
    values = {name: read_values(name, text) for name, text in values.items()}
    monkeypatch.setattr(grid_module.ConversionSpec, "from_texts", build)
    with pytest.raises(UserError, match=r"20,000 combinations; a sweep takes up to 10,000"):
        grid(values)
    assert MOST_SPECS == 10_000
