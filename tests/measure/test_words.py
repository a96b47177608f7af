"""Every static spec has a sentence that says what it removes."""

import itertools
import re

import pytest
from hypothesis import given

from mlpmoe.core.choices import ALLOCATIONS
from mlpmoe.core.presets import PRESETS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.schedule import SCHEDULES
from mlpmoe.core.static.scores import SCORES
from mlpmoe.measure.words import in_short, in_words
from tests.core.specs import static_specs

MATRICES = ("gate-up", "down", "gate-up-down")
# what is removed inside the branches, in all the ways that a spec can say it
FADES = [
    {},
    *(
        {"fade": 0.5, "fade_schedule": schedule, "fade_projections": names, "fade_score": score}
        for schedule, names, score in itertools.product(SCHEDULES, MATRICES, SCORES)
    ),
    *(
        {"fade": 0.5, "fade_schedule": schedule, "fade_score": score, "fade_unit": "neuron"}
        for schedule, score in itertools.product(SCHEDULES, SCORES)
    ),
    *(
        {"fade_unit": "2:4", "fade_projections": names, "fade_score": score}
        for names, score in itertools.product(MATRICES, SCORES)
    ),
]
KEPT = [{}, {"keep": 13}]


def check(spec):
    sentence = in_words(spec)
    assert sentence
    assert "None" not in sentence
    assert "  " not in sentence
    assert sentence == sentence.strip(" ;,.")
    assert all(part and part == part.strip() for part in sentence.split("; "))
    drops, zeroes = spec.kept < spec.branches, spec.fades and spec.fade_unit != "neuron"
    assert (f"keeps {spec.kept} of {spec.branches} branches" in sentence) == drops
    assert ("keeps" in sentence) == drops
    (zeroed,) = [p for p in sentence.split("; ") if p.startswith("zeroes")] or [""]
    assert bool(zeroed) == zeroes
    if zeroes:
        *others, last = spec.fade_projections.split("-")
        names = f"{', '.join(others)} and {last}" if others else last
        assert re.search(rf"weights of {names}, (?!gate|up|down)", zeroed)
    assert ("drops whole neurons" in sentence) == (spec.fade > 0 and spec.fade_unit == "neuron")
    if spec.pattern:
        assert "zeroes {} of every {} weights".format(*spec.fade_unit.split(":")) in zeroed
    if not (drops or spec.fades):
        assert "removes nothing" in sentence or spec.progressive
    assert ("layer by layer" in sentence) == spec.progressive
    for name, allocation in ALLOCATIONS.items():
        unequal = name == spec.allocation and (drops or (spec.fade > 0 and name == "sensitivity"))
        assert (allocation.about in sentence) == (unequal and name != "uniform")
    return sentence


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    check(PRESETS[name])


def test_the_published_presets_in_full():
    sentences = [in_words(PRESETS[name]) for name in ("All 16 branches", "Fractal Fade (paper)")]
    assert sentences == [
        "cuts into branches and removes nothing",
        "zeroes weights of gate and up, more in later branches, the smallest first",
    ]
    assert in_words(PRESETS["Keep 12 of 16 (paper)"]) == (
        "keeps 12 of 16 branches, as they are stored; scales what stays by √(B/K)"
    )


def test_all_that_can_be_combined():
    for order, compensation, allocation in itertools.product(ORDERS, COMPENSATIONS, ALLOCATIONS):
        choices = {"order": order, "compensation": compensation, "allocation": allocation}
        for keep, fade in itertools.product(KEPT, FADES):
            check(ConversionSpec(branches=20, **choices, **keep, **fade))


def test_layer_by_layer():
    for order, compensation in itertools.product(ORDERS, COMPENSATIONS):
        choices = {"keep": 13, "branches": 20, "order": order, "compensation": compensation}
        if ConversionSpec(**choices).looks_at_activations:
            check(ConversionSpec(**choices, progressive=True))


@given(static_specs())
def test_any_spec(spec):
    check(spec)


@pytest.mark.parametrize(
    "specs",
    [
        [ConversionSpec(keep=12, order=order) for order in ORDERS],
        [ConversionSpec(keep=12, compensation=name) for name in COMPENSATIONS],
        [ConversionSpec(fade=0.5, fade_score=score) for score in SCORES],
        [ConversionSpec(fade_unit="2:4", fade_score=score) for score in SCORES],
        [ConversionSpec(fade=0.5, fade_schedule=schedule) for schedule in SCHEDULES],
        [
            ConversionSpec(fade=0.5, fade_schedule=schedule, fade_unit="neuron")
            for schedule in SCHEDULES
        ],
        [ConversionSpec(fade=0.5, compensation=name) for name in ("alpha", "mean", "refit")],
    ],
    ids=["order", "compensation", "score", "pattern", "schedule", "neurons", "fits"],
)
def test_choices_differ_in_words(specs):
    assert len({in_words(spec) for spec in specs}) == len(specs)


def test_spared_layers_are_named():
    for layers, words in (("3", "layer 3 kept"), ("0,1,11", "layers 0, 1 and 11 kept")):
        assert in_words(ConversionSpec(keep=12, spared=layers)).endswith(f"; {words} dense")


def test_what_does_nothing_is_not_mentioned():
    """α is 1 where all branches stay, and nothing is shared out among layers."""
    plain = in_words(ConversionSpec())
    for compensation in COMPENSATIONS:
        spec = ConversionSpec(compensation=compensation, allocation="sensitivity")
        assert in_words(spec) == plain
    assert "scales" not in in_words(ConversionSpec(fade=0.5))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ConversionSpec(), "B 16 · fade 0.00 · K 16"),
        (ConversionSpec(fade=0.9), "B 16 · fade 0.90 · K 16"),
        (ConversionSpec(keep=12), "B 16 · fade 0.00 · K 12, × √(B/K)"),
        (
            ConversionSpec(branches=4, keep=1, compensation="none"),
            "B 4 · fade 0.00 · K 1, not compensated",
        ),
        (ConversionSpec(fade=0.6, compensation="alpha"), "B 16 · fade 0.60 · K 16 · fitted α"),
        (ConversionSpec(compensation="alpha"), "B 16 · fade 0.00 · K 16"),  # nothing to make up for
        (ConversionSpec(fade_unit="2:4", compensation="none"), "B 16 · 2:4 zeros · K 16"),
        (
            ConversionSpec(fade=0.9, fade_unit="neuron", keep=12, compensation="mean"),
            "B 16 · fade 0.90 by neurons · K 12, mean as a bias",
        ),
        (
            ConversionSpec(order="least-squares", keep=12, compensation="refit"),
            "B 16 · fade 0.00 · K 12, down refitted · least-squares order",
        ),
        (
            ConversionSpec(branches=8, keep=2, compensation="ratio"),
            "B 8 · fade 0.00 · K 2, × B/K",
        ),
        (
            ConversionSpec(keep=12, spared="3"),
            "B 16 · fade 0.00 · K 12, × √(B/K) · layer 3 kept dense",
        ),
        (ConversionSpec(method="cmoe", active=0.5), "CMoE · 50 % active · 8 experts"),
        (
            ConversionSpec(method="neurons", selection="threshold", compensation="mean"),
            "Neuron top-k · 75 % active · threshold · mean output of the others",
        ),
        (
            ConversionSpec(method="inputs", active=0.5, compensation="refit"),
            "Input sparsity · 50 % active · down refitted",
        ),
    ],
)
def test_a_recipe_in_a_line(spec, text):
    assert in_short(spec) == text
