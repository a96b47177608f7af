"""The lesson: its numbers are those of the loaded model, recounted here."""

from __future__ import annotations

import re

import pytest
import torch

from mlpmoe import ConversionSpec, convert
from mlpmoe.explorer.lesson import OTHERS, TOKENS, lesson, published

SPECS = [
    ConversionSpec(),
    ConversionSpec(branches=1, fade=0.9),
    ConversionSpec(branches=5, fade=0.9),
    ConversionSpec(branches=40, keep=1),
    ConversionSpec(branches=7, fade=2.0, keep=3, compensation="none"),
]


@pytest.fixture(params=["tiny", "gateless", "one_layer"])
def any_model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_any_model_and_spec_has_a_lesson(any_model, spec):
    spec.check_fits(40)  # the narrowest of them
    for text in lesson(any_model, spec, layer=99):
        assert text
        assert not re.search(r"\b(nan|inf|undefined)\b", text)
        assert "{" not in re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)


def test_strip_draws_every_branch_as_wide_as_it_is(tiny):
    strip, *_ = lesson(tiny, ConversionSpec(branches=5, fade=1.0, keep=4), 0)
    cells = re.findall(
        r'<span class="(\w+)" style="flex-grow:(\d+);--left:(\d+)%" title="([^"]*)"', strip
    )
    assert [kind for kind, *_ in cells] == ["kept"] * 4 + ["dropped"]
    assert [int(grow) for _, grow, *_ in cells] == [10, 10, 10, 9, 9]
    assert [int(left) for _, _, left, _ in cells] == [100, 80, 60, 40, 20]
    assert "48 neurons in 5 branches, 4 kept" in strip


def test_split_names_sizes_and_formula(tiny, gateless):
    _, text, *_ = lesson(tiny, ConversionSpec(branches=5), 0)
    assert "The 48 neurons" in text
    assert "B = 5 branches of 9 or 10" in text
    assert "gate" in text
    assert "gate" not in lesson(gateless, ConversionSpec(branches=5), 0)[1]
    assert "branches of 3." in lesson(tiny, ConversionSpec(branches=16), 0)[1]


def test_split_measures_rounding_and_no_more(tiny):
    _, text, *_ = lesson(tiny, ConversionSpec(branches=16), 0)
    error = re.search(r"at most \*\*(.*?)\*\*", text)[1]
    assert error == "0" or error.endswith(("10⁻⁷", "10⁻⁶"))
    assert f"{TOKENS} tokens" in text
    assert "float32 rounding" in text


def test_fade_gives_the_threshold_of_its_example(tiny):
    spec = ConversionSpec(branches=6, fade=0.9, keep=4)
    *_, text, _ = lesson(tiny, spec, 1)
    assert "branch 2 loses 0.90 · 2 / 6 = **30.0 %**" in text
    weight = tiny.model.model.layers[1].mlp.gate_proj.weight.detach().abs()
    threshold = weight[16:24].flatten().quantile(0.3)
    assert float(re.search(r"\|w\| = \*\*(.*?)\*\*", text)[1]) == pytest.approx(
        float(threshold), rel=0.006
    )
    zeros = tiny.zeros(spec)
    assert f"{100 * zeros.requested:.2f} % was asked for and" in " ".join(text.split())


def test_fade_says_when_there_is_none(tiny):
    assert "Fade is 0 now" in lesson(tiny, ConversionSpec(), 0)[2]


@pytest.mark.parametrize(
    "spec", [ConversionSpec(fade=0.9, keep=1), ConversionSpec(branches=1, fade=0.9)]
)
def test_fade_is_not_called_zero_when_only_branch_0_is_left(tiny, spec):
    text = lesson(tiny, spec, 0)[2]
    assert "Fade is 0" not in text
    assert "ranch 0" in text.rpartition("$$")[2].partition("stay as they are.")[2]


@pytest.mark.parametrize("compensation", ["sqrt", "none"])
def test_keep_measures_size_and_direction(tiny, compensation):
    """Against the outputs of the dense model's own MLP, caught with a hook."""
    spec = ConversionSpec(branches=6, keep=4, compensation=compensation)
    text = lesson(tiny, spec, 1)[3]
    caught = []
    mlp = tiny.model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, args, out: caught.append((args[0], out)))
    try:
        with torch.no_grad():
            tiny.model(tiny.text("stories").documents[0][None, :TOKENS])
    finally:
        handle.remove()
    x, whole = caught[0]
    plain = ConversionSpec(branches=6, keep=4, compensation="none")
    with torch.no_grad():
        kept = convert(tiny.model, plain).model.layers[1].mlp(x)
    share = float(kept.norm() / whole.norm())
    cosine = float(torch.cosine_similarity(kept.flatten(), whole.flatten(), dim=0))
    shares = [float(s) for s in re.findall(r"\*\*(\d+) %\*\*", text)]
    expected = [100 * share, 100 * share * spec.alpha]
    if compensation == "none":
        assert "compensation is off" in text
        del expected[1]
    assert shares == pytest.approx(expected, abs=0.51)
    assert float(re.search(r"is\s+\*\*(-?[\d.]+)\*\* \(1 would", text)[1]) == pytest.approx(
        cosine, abs=0.0051
    )


def test_keep_says_when_all_are_kept(tiny):
    assert "All branches are kept now" in lesson(tiny, ConversionSpec(fade=0.9), 0)[3]


def test_the_lesson_leaves_no_hook_behind(tiny):
    lesson(tiny, ConversionSpec(branches=4, keep=2), 0)
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


OTHER = {
    "order": {"order": "least-squares"},
    "schedule": {"fade_schedule": "uniform"},
    "power": {"fade_schedule": "power", "fade_exponent": 3.0},
    "matrices": {"fade_projections": "down"},
    "score": {"fade_score": "sparsegpt"},
    "unit": {"fade_unit": "neuron"},
    "allocation": {"allocation": "sensitivity"},
    "seed": {"order": "random", "seed": 3},
    "progressive": {"fade_score": "wanda", "progressive": True},
}


@pytest.mark.parametrize("choices", OTHER.values(), ids=OTHER)
def test_the_lesson_shows_the_published_stages_and_says_so(demo, choices, monkeypatch):
    """Without a calibration, whatever the other choices are."""
    monkeypatch.setattr(demo, "calibration", None)
    basis = {"branches": 6, "fade": 0.9, "keep": 4}
    spec, plain = ConversionSpec(**basis, **choices), ConversionSpec(**basis)
    strip, *steps = lesson(demo, spec, 1)
    expected, *same = lesson(demo, plain, 1)
    assert steps == same
    assert published(spec) == published(plain) == plain
    assert strip != expected == strip.replace(OTHERS, "")
    assert "other choices under More are left out" in strip


@pytest.mark.parametrize("compensation", ["alpha", "mean", "refit"])
def test_a_fitted_compensation_is_not_in_the_lesson(tiny, compensation):
    spec = ConversionSpec(branches=6, keep=4, compensation=compensation)
    strip, *_, keep = lesson(tiny, spec, 0)
    assert OTHERS in strip
    assert "compensation is off" in keep


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_a_published_recipe_leaves_nothing_out(tiny, spec):
    assert published(spec) == spec
    assert OTHERS not in lesson(tiny, spec, 0)[0]


def test_a_pattern_is_no_fade_of_the_lesson(tiny):
    strip, _, fade, _ = lesson(tiny, ConversionSpec(fade_unit="2:4", keep=12), 0)
    assert OTHERS in strip
    assert "Fade is 0 now" in fade
