"""The controls and the spec they make: what is shown of a spec makes it again, and settings that
do the same make the same spec."""

from __future__ import annotations

import math
from dataclasses import replace
from time import time

import gradio as gr
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec, UserError, convert
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.choices import ALLOCATIONS, unit_choices
from mlpmoe.core.compensation import COMPENSATIONS
from mlpmoe.core.order import ORDERS
from mlpmoe.core.schedule import SCHEDULES
from mlpmoe.core.scores import SCORES
from mlpmoe.core.spec import MAX_FADE, PROJECTIONS
from mlpmoe.explorer import settings
from mlpmoe.explorer.convert_panel import convert_panel
from mlpmoe.explorer.preview import preset_name
from mlpmoe.explorer.settings import (
    ARRIVING,
    AS_THEY_ARE,
    CONTROLS,
    FADE_FIELDS,
    MAX_BRANCHES,
    Share,
    arriving,
    check_shown,
    most_branches,
    read_asked,
    read_spec,
    settle,
    settled,
    show_spec,
)
from tests.core.specs import static_specs
from tests.explorer.controls import UNTOUCHED, chosen, controls, preview_values
from tests.tiny import VOCABULARY, tiny_model

branch_counts = st.integers(1, 48)  # of the tiny model's 48 neurons
UNITS = [unit for _, unit in unit_choices()]


@st.composite
def settings_of_the_page(draw):
    """Anything that a visitor can set, as the page sends it."""
    branches = draw(branch_counts)
    return {
        "branches": branches,
        "fade": draw(st.one_of(st.just(0.0), st.just(0), st.floats(0, MAX_FADE))),
        "keep": draw(st.integers(1, MAX_BRANCHES)),
        "compensation": draw(st.sampled_from(list(COMPENSATIONS))),
        "order": draw(st.sampled_from(list(ORDERS))),
        "fade_schedule": draw(st.sampled_from(list(SCHEDULES))),
        "fade_exponent": draw(st.floats(0.25, 8)),
        "fade_projections": draw(st.permutations(PROJECTIONS))[: draw(st.integers(1, 3))],
        "fade_score": draw(st.sampled_from(list(SCORES))),
        "fade_unit": draw(st.sampled_from([*UNITS, "3:7"])),
        "allocation": draw(st.sampled_from(list(ALLOCATIONS))),
        "progressive": draw(st.booleans()),
    }


specs = settings_of_the_page().map(lambda values: read_spec(controls(**values)))


def test_every_control_is_a_field_once():
    assert len(set(CONTROLS)) == len(CONTROLS) == len(UNTOUCHED)
    assert set(CONTROLS) <= set(ConversionSpec().to_dict())
    assert set(FADE_FIELDS) <= set(CONTROLS)


def test_untouched_controls_are_the_defaults(tiny):
    assert read_spec(controls()) == ConversionSpec()
    assert chosen(show_spec(ConversionSpec(), tiny)) == controls()


@given(spec=specs)
def test_what_is_shown_of_a_spec_makes_it_again(tiny, spec):
    shown = show_spec(spec, tiny)
    assert read_spec(chosen(shown)) == spec
    assert Share.read(shown[-1]).shown == spec.kept
    branches, keep = shown[CONTROLS.index("branches")], shown[CONTROLS.index("keep")]
    assert 1 <= keep["value"] <= branches["value"] <= branches["maximum"] == 48
    assert keep["maximum"] == max(2, branches["value"])


@given(specs)
def test_what_the_controls_make_is_settled(spec):
    assert settled(spec) == spec


@given(static_specs(48))
def test_a_settled_spec_says_once_what_it_does(spec):
    """For a sweep, which names what has no effect too."""
    spec = replace(spec, seed=0)
    assert settled(spec) == spec.canonical()


@given(settings_of_the_page())
def test_the_spec_is_what_was_chosen_where_it_counts(values):
    spec = read_spec(controls(**values))
    assert (spec.branches, spec.order) == (values["branches"], values["order"])
    assert spec.kept == min(values["keep"], values["branches"])
    if spec.fades:
        assert spec.fade_score == values["fade_score"]
        assert spec.fade_unit == values["fade_unit"]
        if spec.fade:
            assert spec.fade == values["fade"]
            assert spec.fade_schedule == values["fade_schedule"]
        if spec.fade_schedule == "power":
            assert spec.fade_exponent == values["fade_exponent"]
        if spec.fade_unit != "neuron":
            assert set(spec.projections) == set(values["fade_projections"])
    if spec.keep is not None:
        assert spec.compensation == values["compensation"]
    if spec.keep is not None or spec.fade:
        assert spec.allocation == values["allocation"]
    if spec.looks_at_activations and (spec.keep is not None or spec.fades):
        assert spec.progressive == values["progressive"]


@given(settings_of_the_page())
def test_what_is_left_out_does_nothing(one_mlp, values):
    """All that was chosen, said as it is, converts to the same weights. (Calibrated stages have
    their own examples below, and beside n:m the strength cannot be said.)"""
    values |= {"order": "norm", "fade_score": "magnitude", "allocation": "uniform"}
    values |= {"fade_unit": "neuron" if values["fade_unit"] == "neuron" else "weight"}
    if COMPENSATIONS[values["compensation"]].calibrated:
        values["compensation"] = "ratio"
    literal = {name: v for name, v in values.items() if name != "progressive"}
    literal["keep"] = min(values["keep"], values["branches"])
    literal["fade_projections"] = "-".join(values["fade_projections"])
    if values["fade_unit"] == "neuron":
        literal["fade_projections"] = "gate-up"
    if values["fade_schedule"] != "power":
        del literal["fade_exponent"]
    made, expected = (
        weights_of(one_mlp, spec)
        for spec in (read_spec(controls(**values)), ConversionSpec(**literal))
    )
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize("some", [{}, {"order": "fluctuation"}, {"branches": 1, "fade": 1.0}])
@pytest.mark.parametrize("compensation", ["alpha", "mean", "refit"])
def test_nothing_is_fitted_where_nothing_is_lost(one_mlp, some, compensation):
    said = ConversionSpec(**some, compensation=compensation)
    expected = weights_of(one_mlp, replace(said, compensation="sqrt"))
    found = weights_of(one_mlp, said)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name], expected[name], atol=1e-5)


@pytest.fixture(scope="module")
def one_mlp():
    return tiny_model(hidden_size=16, num_hidden_layers=1)


def weights_of(model, spec: ConversionSpec) -> dict[str, torch.Tensor]:
    calibration = None
    if spec.needs_calibration:
        ids = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
        calibration = Calibration(ids)
    try:
        return convert(model, spec, calibration).state_dict()
    except UserError as error:
        assert "leaves no neuron" in str(error)
        return {}


FADE_ONLY = {
    "fade_schedule": "power", "fade_exponent": 3.0, "fade_projections": ["down"],
    "fade_score": "sparsegpt", "fade_unit": "neuron",
}  # fmt: skip


@pytest.mark.parametrize("name", FADE_ONLY)
def test_without_fade_its_settings_say_nothing(name):
    same = read_spec(controls(keep=12))
    assert read_spec(controls(keep=12, **{name: FADE_ONLY[name]})) == same
    assert read_spec(controls(keep=12, **FADE_ONLY)) == same


@pytest.mark.parametrize(
    ("some", "change"),
    [
        ({}, {"compensation": "none"}),
        ({}, {"compensation": "refit"}),
        ({}, {"compensation": "mean", "progressive": True}),
        ({}, {"allocation": "sensitivity"}),
        ({}, {"progressive": True}),
        ({"fade": 0.9}, {"compensation": "none"}),
        ({"fade": 0.9}, {"compensation": "ratio"}),
        ({"fade": 0.9}, {"progressive": True}),
        ({"fade": 0.9}, {"fade_exponent": 5.0}),
        ({"fade": 0.9, "fade_unit": "neuron"}, {"fade_projections": ["down"]}),
        ({"fade": 0.9}, {"fade_projections": ["up", "gate"]}),
        ({"keep": 12}, {"progressive": True}),
        ({"fade_unit": "2:4"}, {"allocation": "sensitivity"}),
        ({"fade_unit": "2:4"}, {"fade": 0.7}),
        ({"fade_unit": "2:4"}, {"fade": 2.0, "fade_schedule": "power", "fade_exponent": 7.0}),
        ({"fade_unit": "2:4", "keep": 12}, {"fade": 0.7, "fade_schedule": "reverse"}),
    ],
    ids=str,
)
def test_choices_without_effect_give_equal_specs(some, change):
    assert read_spec(controls(**some, **change)) == read_spec(controls(**some))


@pytest.mark.parametrize(
    ("some", "change"),
    [
        ({"fade": 0.9}, {"compensation": "refit"}),
        ({"fade": 0.9}, {"compensation": "alpha"}),
        ({"fade_unit": "2:4"}, {"compensation": "mean"}),
        ({"fade": 0.9}, {"allocation": "sensitivity"}),
        ({"keep": 12}, {"allocation": "sensitivity"}),
        ({"keep": 12}, {"compensation": "ratio"}),
        ({"keep": 12, "compensation": "mean"}, {"progressive": True}),
        ({"fade": 0.9, "fade_score": "wanda"}, {"progressive": True}),
        ({"fade": 0.9, "fade_schedule": "power"}, {"fade_exponent": 5.0}),
        ({"fade": 0.9}, {"fade_projections": ["gate"]}),
        ({"fade_unit": "2:4"}, {"fade_projections": ["gate", "up", "down"]}),
        ({"fade_unit": "2:4"}, {"fade_unit": "4:8"}),
        ({"keep": 12}, {"order": "norm"}),
        ({}, {"order": "norm"}),
    ],
    ids=str,
)
def test_choices_with_an_effect_give_other_specs(some, change):
    assert read_spec(controls(**some | change)) != read_spec(controls(**some))


@given(branch_counts, st.integers(1, 64))
def test_keep_above_branches_keeps_all(branches, more):
    spec = read_spec(controls(branches=branches, keep=branches + more))
    assert spec == read_spec(controls(branches=branches, keep=branches))
    assert spec.keep is None


@pytest.mark.parametrize("fade", [0.0, 0.9])
@pytest.mark.parametrize("nothing", [[], (), None, ""])
def test_no_matrix_at_all_is_said(fade, nothing):
    with pytest.raises(UserError, match="at least one matrix that fade works on"):
        read_spec(controls(fade=fade, fade_projections=nothing))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_controls(tiny, name):
    spec = read_spec(chosen(show_spec(PRESETS[name], tiny)))
    assert spec == PRESETS[name]
    assert preset_name(spec) == name


def test_a_star_marks_the_presets_that_calibrate():
    for name, spec in PRESETS.items():
        assert name.endswith(" *") == spec.needs_calibration


@given(settings_of_the_page())
def test_the_spec_of_any_settings_has_a_link_that_opens(values):
    spec = read_spec(controls(**values))
    check_shown(spec)
    assert ConversionSpec.from_query(spec.to_query()) == spec


# what is sent is settled


def settle_at(loaded, share="16 16 16", **change):
    """What is used, what is shown instead (B, fade, K and share), and what is said."""
    used, shown, said = settle(loaded, (*controls(**change), "stories"), share)
    assert used[-1] == "stories"
    return dict(zip(CONTROLS, used, strict=False)), shown, said


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({"fade": 5}, {"fade": 2.0}),
        ({"fade": -1}, {"fade": 0.0}),
        ({"branches": 0}, {"branches": 1, "keep": 1}),
        ({"branches": -7}, {"branches": 1, "keep": 1}),
        ({"branches": 1000}, {"branches": 48, "keep": 48}),  # as many as there are neurons
        ({"branches": 1e300}, {"branches": 48, "keep": 48}),
        ({"branches": 2.5}, {"branches": 3, "keep": 3}),
        ({"branches": 8.4}, {"branches": 8, "keep": 8}),
        ({"keep": 0}, {"keep": 1}),
        ({"keep": 17}, {"keep": 16}),
        ({"keep": 1e300}, {"keep": 16}),
        ({"keep": 11.5}, {"keep": 12}),
        ({"branches": 0, "fade": 9, "keep": -3}, {"branches": 1, "fade": 2.0, "keep": 1}),
    ],
    ids=str,
)
def test_what_is_out_of_range_counts_as_the_nearest_and_that_is_shown(tiny, change, used):
    found, (branches, fade, keep, share), said = settle_at(tiny, **change)
    assert found == UNTOUCHED | used
    for name, update in (("branches", branches), ("fade", fade), ("keep", keep)):
        value = update.get("value", "as sent") if isinstance(update, dict) else update
        if found[name] != (UNTOUCHED | change)[name]:
            assert value == used[name]
        else:
            assert value in ("as sent", used.get(name))
    assert len(said) == len(change)  # a K that only follows B is no mistake
    assert all(sentence.endswith("is used.") for sentence in said)
    assert Share.read(share if share != gr.skip() else "16 16 16").shown == found["keep"]
    # whatever else asks for the conversion meanwhile gets the same one; K follows B in a moment
    asked = read_asked(tiny, (*controls(**change), "stories"))
    fade = found["fade"] if found["branches"] > 1 else 0.0  # one branch loses nothing
    assert (asked.branches, asked.fade) == (found["branches"], fade)
    if "branches" not in change:
        assert asked == read_spec(list(found.values()))


def test_what_is_in_range_is_left_alone(tiny):
    found, (branches, fade, keep, share), said = settle_at(tiny, fade=0.35, keep=9)
    assert found == UNTOUCHED | {"fade": 0.35, "keep": 9}
    assert (branches, keep, said) == (gr.skip(), gr.skip(), [])
    assert "value" not in fade
    assert share == "9 16 16"


def test_keep_stays_the_same_share_while_branches_are_dragged(tiny):
    """Step by step, over numbers of which it is no whole share, and back."""
    share, keep = "8 16 16", 8
    seen = {}
    for branches in [*range(17, 33), *range(31, 0, -1), *range(2, 17)]:
        used, shown, said = settle_at(tiny, share, branches=branches, keep=keep)
        keep, share = used["keep"], shown[3]
        assert shown[2]["value"] == keep and shown[2]["maximum"] == max(2, branches)
        assert abs(keep - branches / 2) <= 0.5
        assert said == []
        seen[branches] = keep
    assert (seen[32], seen[1], seen[16]) == (16, 1, 8)


def test_all_stay_all(tiny):
    share, keep = "16 16 16", 16
    for branches in (17, 32, 5, 48, 1, 16):
        used, shown, _ = settle_at(tiny, share, branches=branches, keep=keep)
        keep, share = used["keep"], shown[3]
        assert keep == branches


def test_a_chosen_keep_is_the_share_from_then_on(tiny):
    used, shown, _ = settle_at(tiny, "16 16 16", keep=4)
    assert (used["keep"], shown[3]) == (4, "4 16 16")
    used, *_ = settle_at(tiny, shown[3], branches=32, keep=4)
    assert used["keep"] == 8


@pytest.mark.parametrize("share", ["", "x", "1 2", "0 4 4", "5 4 4", "1 1 -3", None, "9" * 5000])
@pytest.mark.parametrize("keep", [1, 9, 16])
def test_without_a_share_that_can_be_read_keep_is_what_was_sent(tiny, share, keep):
    used, *_ = settle_at(tiny, share, keep=keep)
    assert used["keep"] == keep


@pytest.mark.parametrize("sent", [(16, 16), (8, 16), (16, 4), (12, 12)])
def test_values_of_before_a_link_do_not_undo_it(tiny, handlers, demo, visitor, sent):
    """A link sets B = 8 and K = 4; the page says so of the share first, of the sliders later."""
    *_, share = show_spec(ConversionSpec(branches=8, keep=4), demo)
    branches, keep = sent
    stale = preview_values(share=share, branches=branches, keep=keep)
    assert set(map(str, handlers.preview(visitor(), *stale))) == {str(gr.skip())}
    found = handlers.preview(visitor(), *preview_values(share=share, branches=8, keep=4))
    assert "branches=8&keep=4" in found[5]
    *_, share = shown = found[:4]
    assert shown[2] == gr.skip()  # K stays
    moved = handlers.preview(visitor(), *preview_values(share=share, branches=16, keep=4))
    assert moved[2]["value"] == 8  # from now on as ever


def test_a_link_that_never_arrives_holds_up_nobody(demo, monkeypatch):
    *_, share = show_spec(ConversionSpec(branches=8, keep=4), demo)
    assert arriving(controls(branches=8, keep=5), share)
    monkeypatch.setattr(settings, "time", lambda: time() + ARRIVING + 1)
    assert not arriving(controls(branches=8, keep=5), share)
    assert arriving(controls(), "")  # nothing was ever set
    assert not arriving(controls(), AS_THEY_ARE)


@given(
    branches=st.integers(1, 48), moved=st.integers(1, 48), kept=st.integers(1, 48),
    sent=st.integers(-3, 99),
)  # fmt: skip
def test_what_is_settled_stays(tiny, branches, moved, kept, sent):
    """Shown once, it is sent again and nothing is shown anew."""
    share = str(Share(min(kept, branches), branches, branches))
    used, shown, _ = settle_at(tiny, share, branches=moved, keep=sent)
    assert 1 <= used["keep"] <= moved
    share = share if shown[3] == gr.skip() else shown[3]
    again, shown, said = settle_at(tiny, share, branches=moved, keep=used["keep"])
    assert again["keep"] == used["keep"]
    assert shown[0] == shown[2] == shown[3] == gr.skip() and said == []


@pytest.fixture(scope="module")
def panel():
    with gr.Blocks():
        return convert_panel()


@pytest.mark.parametrize("slider", ["branches", "fade", "keep"])
@pytest.mark.parametrize("sent", [None, "", "8", True, [8], math.nan, math.inf, 10**400],
                         ids=lambda sent: str(sent)[:8])  # fmt: skip
def test_what_is_no_number_is_said(panel, slider, sent):
    """An emptied field sends none. Other numbers are passed on, to be settled."""
    component = getattr(panel, slider)
    with pytest.raises(gr.Error, match="needs a number"):
        component.preprocess(sent)
    for number in (-1, 0.5, 1000):
        assert component.preprocess(number) == number


# what the controls cannot show


def test_no_more_branches_than_the_slider_or_the_model_has(tiny, monkeypatch):
    assert most_branches(tiny) == 48
    monkeypatch.setattr("mlpmoe.explorer.settings.MAX_BRANCHES", 20)
    assert most_branches(tiny) == 20
    check_shown(ConversionSpec(branches=20))
    with pytest.raises(UserError, match="at most 20 branches"):
        check_shown(ConversionSpec(branches=21))


@pytest.mark.parametrize("value", [math.nan, -0.1, "0.5", True])
def test_an_odd_fade_is_refused(value):
    with pytest.raises(UserError, match="between 0 and 2"):
        read_spec(controls(fade=value))


def test_the_spec_does_not_depend_on_how_a_matrix_was_ticked():
    spec = ConversionSpec(fade=0.5, fade_projections="gate-down")
    for ticked in (["down", "gate"], ["gate", "down"], ("down", "gate", "gate")):
        assert read_spec(controls(fade=0.5, fade_projections=ticked)) == spec
    assert replace(spec, fade_projections="gate-up") == read_spec(controls(fade=0.5))
