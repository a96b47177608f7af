"""The search on tiny models: bounded by trials, so that nothing depends on time."""

import gc
import sys
import threading
import warnings
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all, observe
from mlpmoe.core.errors import UserError
from mlpmoe.core.presets import PRESETS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.encoding import EncodedText, encode_text
from mlpmoe.measure.quality.perplexity import compare, measure
from mlpmoe.measure.runs import trials as trials_module
from mlpmoe.measure.runs.deadline import Deadline
from mlpmoe.measure.runs.search import (
    ALLOWANCE,
    COSTS,
    FINALISTS,
    Budget,
    best,
    finalists,
    front,
    search,
)
from mlpmoe.measure.runs.search_space import AROUND, Space
from mlpmoe.measure.runs.sweep import Run
from mlpmoe.measure.runs.trials import TooSlow, Trials
from tests import families
from tests.tiny import VOCABULARY, byte_tokenizer, tiny_model

TEXT = "A heron stood in the reeds.\n<|endoftext|>\nNobody had told the frogs, so they sang on."
D_FF = 160  # 10 neurons in each of 16 branches, so that a branch of few loses some and not all
WIDE = 640  # 10 in each of 64 branches


def some_text(vocabulary=VOCABULARY, length=64):
    """A calibration text of tokens drawn at random."""
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(1, vocabulary, (8, length), generator=generator))


@pytest.fixture(scope="module")
def model():
    return tiny_model(intermediate_size=D_FF)


@pytest.fixture(scope="module")
def text():
    return encode_text(byte_tokenizer(), TEXT)


@pytest.fixture(scope="module")
def observed(model):
    return observe(model, some_text())


def tried(model, text, budget, calibration=None, most=20, **more):
    return list(search(Trials(model, text, calibration), budget, Deadline(), most, **more))


def check_run(run, model, text, calibration=None):
    """The figures of a run are those of its spec, converted and measured by itself."""
    converted = convert(model, run.spec, calibration)
    dense, other = measure(model, text), measure(converted, text)
    before, after = parameter_report(model), parameter_report(converted)
    changed = compare(dense, other)
    assert run.perplexity == pytest.approx(other.value, rel=1e-5)
    assert run.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-5)
    assert run.ratio == pytest.approx(changed.ratio, rel=1e-5)
    assert run.stderr == pytest.approx(changed.stderr, rel=1e-3)
    assert (run.nonzero, run.macs_per_token) == (after.nonzero, after.macs_per_token)
    assert run.mlp_nonzero_share == pytest.approx(after.mlp_nonzero / before.mlp_nonzero)
    macs = after.mlp_macs_per_token / before.mlp_macs_per_token
    assert run.mlp_macs_share == pytest.approx(macs)


# Budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"share": 0.1}, "between 0.2 and 0.98 of the MLP parameters that are not zero, not 0.1"),
        ({"share": 0.0}, "between 0.2 and 0.98"),
        ({"share": 1.0}, "between 0.2 and 0.98"),
        ({"share": -0.5}, "between 0.2 and 0.98"),
        ({"share": float("nan")}, "between 0.2 and 0.98"),
        ({"share": float("inf")}, "between 0.2 and 0.98"),
        ({"cost": "compute", "share": 75}, "of the MLP multiply-adds per token, not 75"),
        ({"share": None}, "either a share of the cost or a ratio"),
        ({"share": 0.5, "ratio": 1.1}, "either a share of the cost or a ratio"),
        ({"ratio": 1.1}, "either a share of the cost or a ratio"),  # beside the default share
        ({"share": None, "ratio": 1.0}, "more than 1"),
        ({"share": None, "ratio": 0.5}, "more than 1"),
        ({"share": None, "ratio": -2.0}, "more than 1"),
        ({"share": None, "ratio": float("nan")}, "more than 1"),
        ({"share": None, "ratio": float("inf")}, "more than 1"),
        ({"cost": "time"}, "nonzero, compute; got 'time'"),
        ({"cost": ""}, "nonzero, compute"),
    ],
)
def test_impossible_budgets_are_refused(budget, words):
    with pytest.raises(UserError) as refusal:
        Budget(**budget)
    assert words in str(refusal.value)


@pytest.mark.parametrize("cost", COSTS)
def test_budgets_that_are_possible(cost):
    for share in (0.2, 0.5, 0.98):
        assert Budget.from_text(cost, f" {share} ") == Budget(cost, share)
    assert Budget(cost, None, 1.0001).share is None


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ("much", "must be a number, not 'much'"),
        ("", "must be a number, not ''"),
        ("75 %", "must be a number, not '75 %'"),
        ("0,75", "must be a number"),
        ("x" * 1000, "must be a number"),
        ("75", "not 75"),
        ("nan", "between 0.2 and 0.98"),
    ],
)
def test_shares_as_text(share, words):
    with pytest.raises(UserError) as refusal:
        Budget.from_text("nonzero", share)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 200


# What is tried -----------------------------------------------------------------------------

BUDGETS = [
    Budget("nonzero", 0.75),
    Budget("nonzero", None, 1.1),
    Budget("compute", 0.6),
    Budget("compute", None, 1.1),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_runs_are_what_their_specs_measure(model, text, observed, budget):
    runs = tried(model, text, budget, observed, most=6)
    assert len({run.spec for run in runs}) == len(runs) > 6
    for run in runs:
        check_run(run, model, text, some_text())


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_without_calibration_no_spec_needs_one(model, text, budget):
    runs = tried(model, text, budget, most=30)
    assert len({run.spec for run in runs}) == len(runs) > 10
    assert all(not run.spec.needs_calibration for run in runs)
    for run in runs[-3:]:
        check_run(run, model, text)


def test_with_calibration_specs_use_it(model, text, observed):
    runs = tried(model, text, Budget("nonzero", 0.6), observed, most=12)
    proposed = [run.spec for run in runs if run.spec not in PRESETS.values()]
    assert any(spec.needs_calibration for spec in proposed)
    assert not any(spec.progressive for spec in proposed)  # that would take a pass for each
    again = tried(model, text, Budget("nonzero", 0.6), some_text(), most=12)
    assert [run.spec for run in again] == [run.spec for run in runs]


@pytest.mark.parametrize("calibrated", [False, True])
def test_compute_is_saved_by_routing_too(text, observed, calibrated):
    """Good routed recipes are among the first, and what they cost counts their routers."""
    model = tiny_model(intermediate_size=WIDE)
    seen = some_text() if calibrated else None
    budget = Budget("compute", 0.6)
    runs = tried(model, text, budget, seen, most=8)
    routed = [run for run in runs if run.spec.routed]
    assert {"neurons", "inputs"} < {run.spec.method for run in routed}  # and some with experts
    for run in routed:
        assert run.mlp_macs_share < budget.share + AROUND + 0.05
    nearest = min(routed, key=lambda run: abs(run.mlp_macs_share - 0.6))
    assert nearest.mlp_macs_share == pytest.approx(0.6, abs=0.05)
    check_run(nearest, model, text, seen)
    assert not any(run.spec.routed for run in tried(model, text, Budget("nonzero", 0.6), most=8))


def zeroes_single_weights(spec):
    return spec.fades and spec.fade_unit != "neuron"


@pytest.mark.parametrize("budget", [b for b in BUDGETS if b.cost == "compute"], ids=str)
def test_zeroed_weights_save_no_compute(model, text, observed, budget):
    for calibration in (None, observed):
        runs = tried(model, text, budget, calibration, most=10)
        proposed = [run.spec for run in runs if run.spec not in PRESETS.values()]
        assert len(proposed) > 5
        assert not any(zeroes_single_weights(spec) for spec in proposed)


def test_no_preset_zeroes_weights_where_that_saves_nothing(model, text):
    runs = tried(model, text, Budget("compute", 0.75), most=0)
    assert not any(zeroes_single_weights(run.spec) for run in runs)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.5])
@pytest.mark.parametrize("cost", COSTS)
def test_every_preset_that_the_budget_allows_is_tried(model, text, observed, cost, share):
    budget, dense = Budget(cost, share), parameter_report(model)
    for calibration in (None, observed):
        specs = {run.spec for run in tried(model, text, budget, calibration, most=0)}
        assert specs <= {*PRESETS.values()}
        for spec in PRESETS.values():
            zeroes = cost == "compute" and zeroes_single_weights(spec)
            if zeroes or (spec.needs_calibration and calibration is None):
                assert spec not in specs
                continue
            report = parameter_report(convert(model, spec, some_text()))
            left = {
                "nonzero": report.mlp_nonzero / dense.mlp_nonzero,
                "compute": report.mlp_macs_per_token / dense.mlp_macs_per_token,
            }[cost]
            assert spec in specs or left > share
            assert spec not in specs or left < share + 0.02


def test_good_recipes_come_first_then_the_presets_and_none_twice(model, text, observed):
    runs = tried(model, text, Budget("nonzero", 0.9), observed, most=15)
    known = [run.spec in PRESETS.values() for run in runs]
    assert sum(known) >= 7
    first = known.index(True)
    assert known[first:] == sorted(known[first:], reverse=True)
    ahead = [run.spec for run in runs[:first]]
    assert {spec.fade_score for spec in ahead if spec.fades} == {"wanda", "sparsegpt"}
    assert {"fluctuation", "loss"} <= {spec.order for spec in ahead}
    scores = [spec.fade_score for spec in ahead if spec.fades]
    assert scores.index("wanda") < scores.index("sparsegpt")  # what takes less time, first


@pytest.mark.parametrize("cost", COSTS)
def test_costs_lie_around_the_budget(text, cost):
    model = tiny_model(intermediate_size=WIDE)
    for share in (0.4, 0.7):
        budget = Budget(cost, share)
        runs = tried(model, text, budget, most=30)
        proposed = [run for run in runs if run.spec not in PRESETS.values()]
        costs = [budget.cost_of(run) for run in proposed]
        assert len(costs) > 15
        # what stays of branches that fade more in later ones holds fewer zeros than planned
        # a K below is at most one of 16 branches less
        assert all(share - AROUND - 0.07 < cost < share + AROUND + 0.1 for cost in costs)
        assert any(budget.allows(run) and budget.cost_of(run) > share - 0.05 for run in proposed)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_same_seed_tries_the_same(model, text, budget):
    first = tried(model, text, budget, most=18, seed=1)
    assert tried(model, text, budget, most=18, seed=1) == first
    other = tried(model, text, budget, most=18, seed=2)
    assert {run.spec for run in other} != {run.spec for run in first}


def test_the_number_of_trials(model, text):
    presets = tried(model, text, Budget(), most=0)
    for most in (1, 5):
        runs = tried(model, text, Budget(), most=most)
        assert len(presets) < len(runs) <= len(presets) + most
        assert [run for run in runs if run in presets] == presets


@pytest.mark.parametrize("seconds", [0, 9, 10, 35, 95])
def test_nothing_is_begun_that_does_not_fit_into_the_time(model, text, monkeypatch, seconds):
    """By a clock on which measuring takes 10 seconds and nothing else any."""
    now = [100.0]

    def measured(*given):
        now[0] += 10
        return measure(*given)

    monkeypatch.setattr(trials_module, "measure", measured)
    trials, started = Trials(model, text, clock=lambda: now[0]), now[0]
    trials.seconds = 10.0
    runs = list(search(trials, Budget(), Deadline(seconds, lambda: now[0])))
    assert now[0] - started == 10 * len(runs)
    assert len(runs) == max(0, seconds - 1) // 10  # with one more, the time would be up
    assert runs == tried(model, text, Budget())[: len(runs)]


def test_a_search_without_time_for_any_of_its_proposals_ends(model, text, monkeypatch):
    monkeypatch.setattr(Trials, "run", too_slow)
    assert list(search(Trials(model, text), Budget(), Deadline(), most=None)) == []


def too_slow(*_):
    raise TooSlow(1e9)


def test_a_search_of_another_budget_measures_nothing_again(model, text, monkeypatch):
    trials = Trials(model, text)
    first = list(search(trials, Budget("nonzero", 0.75), Deadline(), most=5))
    measured = []

    def converted(dense, specs, *more):
        measured.extend(specs)
        return convert_all(dense, specs, *more)

    monkeypatch.setattr(trials_module, "convert_all", converted)
    second = list(search(trials, Budget("nonzero", 0.9), Deadline(), most=5))
    again = {run.spec for run in first} & {run.spec for run in second}
    assert again
    assert measured and not again & {*measured}


def test_progress_is_told(model, text):
    told = []
    runs = tried(model, text, Budget(), most=3, report=told.append)
    assert [f"{count} tried" for count in range(len(runs))] == list(dict.fromkeys(told))


def test_nothing_is_written_and_nobody_warned(model, text, observed, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried(model, text, Budget(), observed, most=10)
    assert capfd.readouterr() == ("", "")


def test_nobody_is_warned_at_a_large_budget(model, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried(model, text, Budget("nonzero", 0.98), most=3)


# Interrupted, or impossible ----------------------------------------------------------------


def branched_mlps():
    gc.collect()
    return sum(type(thing) is BranchedMLP for thing in gc.get_objects())


def test_an_interrupted_search_leaves_nothing_behind(text, observed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(intermediate_size=D_FF)
    modules = list(model.modules())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    tried(model, text, Budget(), most=1)  # what is loaded once and stays, is there
    threads, converted = set(threading.enumerate()), branched_mlps()

    runs = search(Trials(model, text, some_text()), Budget(), Deadline())
    begun = list(islice(runs, 12))
    runs.close()

    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads  # one of another test may have ended
    assert branched_mlps() == converted
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    for module in modules:
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert model.training is False
    again = search(Trials(model, text, some_text()), Budget(), Deadline())
    assert list(islice(again, 12)) == begun
    again.close()


def test_nothing_happens_before_the_first_request(model, text):
    told = []
    search(Trials(model, text), Budget(), Deadline(), report=told.append)
    assert told == []


def test_without_optuna_a_search_says_what_is_missing(model, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        next(search(Trials(model, text), Budget(), Deadline()))


# Other models ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("cost", COSTS)
def test_models_without_a_gate_and_with_a_fused_one(family, cost):
    model = families.build(family)
    ids = torch.randint(1, families.VOCABULARY, (50,), generator=torch.Generator().manual_seed(3))
    text, calibration = EncodedText((ids,), (ids,)), some_text(families.VOCABULARY, 32)
    for given_text in (None, calibration):
        runs = tried(model, text, Budget(cost, 0.7), given_text, most=12)
        assert len(runs) > 8
        for run in runs[::4]:
            check_run(run, model, text, given_text)


@pytest.mark.parametrize("d_ff", [2, 5, 12, 16, 17])
def test_narrow_mlps(text, d_ff):
    model = tiny_model(intermediate_size=d_ff)
    runs = tried(model, text, Budget("nonzero", 0.75), most=15)
    assert any(run.mlp_nonzero_share < 1 for run in runs)
    for run in runs:
        assert run.spec.branches <= d_ff
    for run in runs[::4]:
        check_run(run, model, text)


def choices(**more):
    """What a trial may ask for, as Optuna would answer."""
    usual = {
        "by": "weights",
        "share": 0.5,
        "part": 0.5,
        "branches": 16,
        "order": "contiguous",
        "compensation": "none",
        "schedule": "uniform",
        "score": "magnitude",
        "projections": "all",
        "allocation": "uniform",
    }
    return usual | more


@pytest.mark.parametrize(
    ("d_ff", "budget", "chosen"),
    [
        pytest.param(
            48,
            Budget("nonzero", 0.75),
            choices(share=0.75, score="wanda", allocation="sensitivity"),
            id="a layer may get a fade of 0",
        ),
        pytest.param(
            48,
            Budget("nonzero", 0.4),
            choices(by="neurons", share=0.4, allocation="sensitivity"),
            id="a layer may get a fade of 2",
        ),
        pytest.param(
            48,
            Budget("nonzero", 0.2),
            choices(by="keep and weights", share=0.2, part=0.1, schedule="linear"),
            id="the strongest fade",
        ),
        pytest.param(
            48,
            Budget("nonzero", 0.95),
            choices(by="keep", share=0.98, branches=32),
            id="all but one branch",
        ),
    ],
)
def test_every_choice_gives_a_spec_that_converts(text, d_ff, budget, chosen, monkeypatch):
    """The search starts with one choice in place of its own."""
    monkeypatch.setattr(Space, "presets", lambda space: iter(()))
    monkeypatch.setattr(Space, "starts", lambda space: iter([chosen]))
    model = tiny_model(intermediate_size=d_ff)
    (run,) = tried(model, text, budget, some_text(), most=1)
    assert 0 < budget.cost_of(run) < 1.05
    check_run(run, model, text, some_text())


def test_a_spec_that_cannot_be_is_passed_over(text, monkeypatch):
    """With one neuron in a branch, evenly zeroing more than half leaves none."""
    emptied = choices(by="neurons", share=0.4)
    monkeypatch.setattr(Space, "presets", lambda space: iter(()))
    monkeypatch.setattr(Space, "starts", lambda space: iter([emptied]))
    runs = tried(tiny_model(intermediate_size=16), text, Budget("compute", 0.4), most=4)
    assert len(runs) <= 3
    evenly = [run.spec for run in runs if run.spec.fade_schedule == "uniform"]
    assert all(spec.fade < 1 or spec.fade_unit == "weight" for spec in evenly)


# Choosing from what was tried --------------------------------------------------------------

PLAIN = Run(ConversionSpec(), 10.0, 1.0, 0.1, 1.0, 100, 1.0, 1.0, 1000, 1.0, 1.0)
TENTHS = st.integers(2, 12).map(lambda n: n / 10)
RATIOS = st.sampled_from([0.9, 1.0, 1.05, 1.1, 1.2, 1.5, 4.0, float("inf")])
SPECS = st.sampled_from(sorted(PRESETS.values(), key=str)) | st.builds(
    ConversionSpec, branches=st.integers(17, 40)
)


@st.composite
def some_runs(draw):
    """Runs with many ties, a spec for each."""
    specs = draw(st.lists(SPECS, unique=True, max_size=12))
    return [
        replace(
            PLAIN,
            spec=spec,
            ratio=draw(RATIOS),
            mlp_nonzero_share=draw(TENTHS),
            mlp_macs_share=draw(TENTHS),
        )
        for spec in specs
    ]


SHARES = st.builds(Budget, st.sampled_from(sorted(COSTS)), st.sampled_from([0.3, 0.5, 0.7, 0.9]))
GIVEN_RATIOS = st.builds(
    Budget, st.sampled_from(sorted(COSTS)), st.none(), st.sampled_from([1.05, 1.2, 2.0])
)
ANY_BUDGET = SHARES | GIVEN_RATIOS


def point(run, budget):
    cost = {"nonzero": run.mlp_nonzero_share, "compute": run.mlp_macs_share}[budget.cost]
    return cost, run.ratio


def beats(one, other):
    """Whether a point is as good in both and better in one."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def allowed(run, budget):
    cost, ratio = point(run, budget)
    return ratio <= budget.ratio if budget.share is None else cost < budget.share + 0.001


@given(some_runs(), ANY_BUDGET)
def test_the_front_is_what_nothing_beats(runs, budget):
    points = {point(run, budget) for run in runs}
    unbeaten = {p for p in points if not any(beats(other, p) for other in points)}
    found = front(runs, budget)
    assert all(run in runs for run in found)
    assert [point(run, budget) for run in found] == sorted(unbeaten)


@given(some_runs(), ANY_BUDGET)
def test_the_best_is_allowed_and_nothing_allowed_is_better(runs, budget):
    found = best(runs, budget)
    candidates = [run for run in runs if allowed(run, budget)]
    assert [run for run in runs if budget.allows(run)] == candidates
    if not candidates:
        assert found is None
        return
    assert found in candidates
    cost, ratio = point(found, budget)
    for run in candidates:
        other_cost, other_ratio = point(run, budget)
        if budget.share is not None:
            assert (ratio, cost) <= (other_ratio, other_cost)
        else:
            assert (cost, ratio) <= (other_cost, other_ratio)


def could_win(run, chosen, budget):
    """Three standard errors on both sides could turn the two round, or the run is as cheap."""
    if budget.share is None:
        return point(run, budget)[0] < point(chosen, budget)[0] + ALLOWANCE
    return run.ratio - 3 * run.stderr <= chosen.ratio + 3 * chosen.stderr


@given(some_runs(), ANY_BUDGET)
def test_finalists_hold_the_best_and_the_presets_near_it(runs, budget):
    specs = finalists(runs, budget)
    assert len(set(specs)) == len(specs)
    by_spec = {run.spec: run for run in runs}
    winner = best(runs, budget)
    presets = {
        spec
        for spec, run in by_spec.items()
        if spec in PRESETS.values() and allowed(run, budget) and could_win(run, winner, budget)
    }
    assert presets <= set(specs)
    known, chosen = set(presets), best(runs, budget)
    if chosen:
        assert specs[0] == chosen.spec
        known.add(chosen.spec)
        drops = chosen.spec.kept < chosen.spec.branches or chosen.spec.fade_unit == "neuron"
        if chosen.spec.looks_at_activations and drops:  # layer by layer, which is not searched
            known.add(replace(chosen.spec, progressive=True))
    assert known <= set(specs)
    on_front = front(runs, budget)
    assert all(by_spec[spec] in on_front for spec in specs if spec not in known)
    # of the front, those nearest to the budget
    near = budget.share or (budget.cost_of(chosen) if chosen else 1.0)
    distances = sorted(abs(budget.cost_of(run) - near) for run in on_front)[:FINALISTS]
    nearest = sorted(abs(budget.cost_of(run) - near) for run in on_front if run.spec in specs)
    assert nearest[: len(distances)] == distances
    assert len(specs) <= FINALISTS + len(known)


def test_finalists_of_a_search(model, text, observed):
    budget = Budget("nonzero", 0.76)
    runs = tried(model, text, budget, observed, most=10)
    specs = finalists(runs, budget)
    winner = best(runs, budget)
    assert specs[0] == winner.spec
    presets = [run for run in runs if run.spec in PRESETS.values() and allowed(run, budget)]
    near = [run.spec for run in presets if could_win(run, winner, budget)]
    assert near and set(near) <= set(specs)
