"""The plain sentence: every figure in it is one that was measured, and it claims nothing more."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf, nan
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec
from mlpmoe.explorer.shell.sentence import cost_axis, sentence
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.measure.notation import NO_CHANGE
from mlpmoe.measure.quality.estimate import Evaluation
from mlpmoe.measure.quality.perplexity import PerplexityChange
from mlpmoe.measure.runs.families import Estimate, Shares, cost_of, estimate, expected_shares
from mlpmoe.measure.runs.sweep import Run, comparison
from tests.explorer.made import made_run

RUNS = {key: [record.run for record in shipped(key)] for key in ("smollm2-135m", "demo")}
REAL = RUNS["smollm2-135m"]
SPECS = [
    *PRESETS.values(), *(spec for a in (0.3, 0.6, 0.75) for _, spec in comparison(a).values()),
    ConversionSpec(keep=12, fade=0.9), ConversionSpec(keep=12, fade=0.9, fade_unit="neuron"),
    ConversionSpec(fade_unit="2:4"), ConversionSpec(fade=0.5, fade_unit="neuron"),
]  # fmt: skip


def evaluation(ratio: float, stderr: float, measurable: bool = True, settled: bool = True):
    dense = SimpleNamespace(tokens=10**6 if settled else 10)
    change = PerplexityChange(ratio, stderr, measurable)
    return Evaluation(dense, None, change, total=10**6)


def shares_of(run: Run) -> Shares:
    return Shares(run.mlp_nonzero_share, run.mlp_macs_share)


def text_of(html: str) -> str:
    (text,) = re.fullmatch(r"<p>([^<>]*)</p>", html).groups()  # one paragraph, nothing in it
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("model", RUNS)
def test_two_lines_at_most_for_whatever_was_measured(model):
    for run in RUNS[model]:
        for known in (evaluation(run.ratio, run.stderr), estimate(RUNS[model], run.spec), None):
            text = text_of(sentence(
                run.spec, shares_of(run), known, RUNS[model], toy=model == "demo",
                calibration="WikiText-2",
            ))  # fmt: skip
            assert len(text) <= 270, text
            assert ("toy" in text) == (model == "demo")
            looks = run.spec.needs_calibration and not isinstance(known, Estimate)
            assert ("calibrated on WikiText-2" in text) == looks


known_things = st.one_of(
    st.none(),
    st.builds(
        evaluation, st.floats(0.5, 1e300) | st.just(inf), st.floats(0, 1e6) | st.just(nan),
        st.booleans(), st.booleans(),
    ),
    st.builds(lambda a, b, c: Estimate(a * b, a, a * b * c, ()), *[st.floats(1, 1e60)] * 3),
)  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(SPECS), st.booleans(), known_things, st.booleans(), st.booleans())
def test_any_spec_has_a_sentence(spec, counted, known, real, toy):
    shares = expected_shares(spec) if counted else None
    text = text_of(
        sentence(spec, shares, known, REAL if real else [], toy=toy, calibration="a <b>")
    )
    assert text.endswith(".") and "nan" not in text and "None" not in text


def test_the_figures_are_those_that_were_measured():
    spec = ConversionSpec(fade=0.9)
    (run,) = (r for r in REAL if r.spec == spec)
    text = text_of(sentence(spec, shares_of(run), evaluation(run.ratio, run.stderr), REAL))
    gone = f"{100 * (1 - run.mlp_nonzero_share):.3g} %"
    assert gone in text
    assert "6.3" in text and "0.3" in text
    best = min(r.ratio for r in REAL if r.mlp_nonzero_share < run.mlp_nonzero_share + 0.015)
    plain = min(
        r.ratio for r in REAL
        if r.mlp_nonzero_share < run.mlp_nonzero_share + 0.015 and not r.spec.needs_calibration
    )  # fmt: skip
    assert f"× {best:.3f}" in text and f"× {plain:.2f}" in text


def test_a_router_stands_beside_the_best_static_recipe_of_its_compute():
    for run in REAL:
        if not run.spec.routed:
            continue
        text = text_of(sentence(run.spec, shares_of(run), estimate(REAL, run.spec), REAL))
        static = min(
            (r for r in REAL if r.spec.method == "mlpmoe"
             and r.mlp_macs_share <= run.mlp_macs_share + 0.015),
            key=lambda r: r.ratio,
        )  # fmt: skip
        assert any(f"× {static.ratio:.{d}f}" in text for d in (1, 2, 3)), text


def test_the_best_says_so_and_an_oracle_never_does():
    for run in REAL:
        axis = cost_axis(run.spec)
        rivals = [
            r for r in REAL
            if r.spec.router != "oracle" and cost_of(r, axis) <= cost_of(run, axis) + 0.015
        ]  # fmt: skip
        text = text_of(sentence(run.spec, shares_of(run), evaluation(run.ratio, run.stderr), REAL))
        claims = "No run" in text
        if run.spec.router == "oracle":
            assert not claims and "bound" in text
        elif run.ratio == min(r.ratio for r in rivals):
            assert claims
        elif claims:  # within the errors only
            best = min(rivals, key=lambda r: r.ratio)
            assert run.ratio - best.ratio < 2 * (run.stderr + best.stderr)


def test_what_is_estimated_is_called_so():
    spec = ConversionSpec(keep=13)
    text = text_of(sentence(spec, expected_shares(spec), estimate(REAL, spec), REAL))
    assert "estimated" in text and "±" not in text and "No run" not in text
    known = ConversionSpec(keep=12)  # a run of this very spec is no estimate
    text = text_of(sentence(known, expected_shares(known), estimate(REAL, known), REAL))
    assert "estimated" not in text and "32" in text
    assert "estimated" not in sentence(spec, None, None, REAL)


def test_a_difference_inside_its_error_is_none():
    spec, none = ConversionSpec(keep=15), evaluation(1.01, 0.02, measurable=False)
    assert NO_CHANGE in sentence(spec, None, none)
    early = evaluation(1.01, 0.02, measurable=False, settled=False)
    assert "so far" in sentence(spec, None, early) and "so far" not in sentence(spec, None, none)
    noisy = made_run(spec, ratio=1.001, stderr=0.002, mlp_macs_share=0.93, mlp_nonzero_share=0.93)
    other = ConversionSpec(keep=15, order="norm")
    text = sentence(other, expected_shares(other), evaluation(1.5, 0.01), [noisy])
    assert NO_CHANGE in text


def test_nothing_removed_costs_nothing():
    for spec in (ConversionSpec(), ConversionSpec(method="cmoe", active=1.0)):
        text = text_of(sentence(spec, Shares(1, 1), evaluation(1.0, 0.0, False), REAL))
        assert text.count(".") == 1 and "×" not in text


def test_texts_are_escaped():
    spec = ConversionSpec(method="cmoe")
    assert "<b>" not in sentence(spec, None, None, calibration="<b>mine</b>")


# training


def report(steps: int, best: int) -> SimpleNamespace:
    return SimpleNamespace(steps=steps, best=best)


@pytest.mark.parametrize("model", RUNS)
def test_two_lines_at_most_with_training(model):
    for run in RUNS[model]:
        spec = replace(run.spec, recover="all", recover_steps=1000)
        for known, done in (
            (evaluation(run.ratio, run.stderr), report(1000, 875)),
            (evaluation(run.ratio, run.stderr), report(1000, 0)), (None, None),
        ):  # fmt: skip
            text = text_of(sentence(
                spec, shares_of(run), known, RUNS[model], toy=model == "demo",
                calibration="WikiText-2", recovery=done,
            ))  # fmt: skip
            assert len(text) <= 270, text
            assert ("1,000 steps" in text) == spec.recovers


def test_the_steps_are_those_that_were_done():
    spec = ConversionSpec(keep=8, recover="lora", recover_steps=40)
    known, shares = evaluation(1.4, 0.02), expected_shares(spec)

    def said(done):
        measured = known if done else None
        return text_of(sentence(spec, shares, measured, calibration="tales", recovery=done))

    assert ", then trained for 40 steps: not measured yet." in said(None)
    assert ", then trained for 17 steps on tales: perplexity × 1.40 ± 0.02." in said(report(17, 10))
    assert ", then trained for 1 step on tales: " in said(report(1, 1))
    assert ", trained for 40 steps on tales in vain: perplexity × 1.40" in said(report(40, 0))


def test_what_does_better_is_said_to_be_trained():
    spec = ConversionSpec(keep=12)
    shares = Shares(0.75, 0.75)
    for best, name in (
        (
            ConversionSpec(keep=12, order="norm", recover="all"),
            "12 of 16 branches by norm",
        ),
        (ConversionSpec(method="cmoe", active=0.75, recover="down"), "CMoE"),
    ):
        run = made_run(best, ratio=1.1, mlp_macs_share=0.75)
        text = text_of(sentence(spec, shares, evaluation(2.0, 0.01), [run]))
        assert f"Best at this compute: {name}, trained, × 1.10 (calibrated)." in text
