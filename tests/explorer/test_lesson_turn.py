"""The challenge: it can be met, does not say how, and is judged by what was measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlpmoe.core.spec import ConversionSpec
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.explorer.tabs.lesson_turn import (
    ANY_MODEL,
    PUBLISHED,
    Challenge,
    challenge,
    good_start,
    verdict,
    words,
)
from mlpmoe.measure.runs.families import cost_of, family_of

MODELS = ("demo", "smollm2-135m")
ASKED = Challenge(0.52, 3.2)
HALVED = ConversionSpec(branches=16, keep=8, order="least-squares", compensation="refit")


def runs(model: str) -> list:
    return [record.run for record in shipped(model)]


def measured(ratio: float, stderr: float = 0.05, complete: bool = True) -> SimpleNamespace:
    return SimpleNamespace(change=SimpleNamespace(ratio=ratio, stderr=stderr), complete=complete)


@pytest.mark.parametrize("model", MODELS)
def test_several_runs_meet_the_challenge_and_no_start_does(model):
    asked = challenge(runs(model))
    meeting = [
        run for run in runs(model)
        if cost_of(run, "compute") <= asked.share and run.ratio < asked.ratio
        and family_of(run.spec) != "oracle"
    ]  # fmt: skip
    assert meeting
    starts = (PUBLISHED, good_start(runs(model)))
    for run in runs(model):
        if run.spec in starts:
            assert cost_of(run, "compute") > asked.share


@pytest.mark.parametrize("model", MODELS)
def test_the_words_say_what_and_not_how(model):
    asked = challenge(runs(model))
    said = words(asked)
    assert f"{100 * asked.share:.0f} %" in said and f"× {asked.ratio:g}" in said
    for hint in ("least squares", "co-activation", "refit", "single neurons"):
        assert hint not in said.lower()


def test_without_runs_there_is_a_challenge_too():
    assert challenge([]) == ANY_MODEL
    assert good_start([]).keep == 12


@pytest.mark.parametrize(
    ("spec", "share", "found", "kind", "said"),
    [
        (HALVED, 0.5, measured(2.6), "right", "✓ You have it"),
        (HALVED, 0.5, measured(3.4), "wrong", "✗ Not yet"),
        (HALVED, 0.5, None, "", "Not measured yet"),
        (HALVED, 0.5, measured(3.15, 0.2, complete=False), "", "Too close to tell"),
        (HALVED, 0.5, measured(2.9, float("nan"), complete=False), "", "Too close to tell"),
        (HALVED, 0.5, measured(3.15, 0.2), "right", "✓ You have it"),
        (HALVED, 0.5, measured(float("inf"), float("nan")), "wrong", "✗ Not yet"),
        (PUBLISHED, 0.75, measured(1.1), "wrong", "✗ Too dear"),
        (
            ConversionSpec(method="coactivation", active=0.5, router="oracle"), 0.5,
            measured(1.1), "wrong", "An oracle cannot be used",
        ),
    ],
)  # fmt: skip
def test_a_setting_is_judged_by_what_was_measured(spec, share, found, kind, said):
    text = verdict(ASKED, spec, share, found)
    assert f'class="{kind}"' in text and said in text
    assert text.count("<strong>") == 1
    assert "nan" not in text and "undefined" not in text
