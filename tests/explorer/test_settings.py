"""The controls and the spec they make: what is shown of a spec makes it again, and settings that
do the same make the same spec."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from time import time

import gradio as gr
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec, UserError, convert, parameter_report
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.explorer.shell import settings
from mlpmoe.explorer.shell.convert_panel import AWAY, convert_panel, show_method
from mlpmoe.explorer.shell.preview import preset_name
from mlpmoe.explorer.shell.settings import (
    ACTIVE_STEP,
    ARRIVING,
    AS_THEY_ARE,
    CONTROLS,
    OWN,
    Share,
    arriving,
    check_shown,
    most_branches,
    read_asked,
    read_spec,
    set_budget,
    settle,
    show_spec,
)
from mlpmoe.measure.runs.families import expected_shares
from tests.explorer.calibrated import direct
from tests.explorer.controls import UNTOUCHED, Previewed, chosen, controls, preview_values
from tests.explorer.drawn import (
    all_settings,
    branch_counts,
    routed_settings_of_the_page,
    settings_of_the_page,
    specs,
)
from tests.tiny import VOCABULARY, tiny_model


def test_every_field_has_a_control_or_is_refused():
    assert len(set(CONTROLS)) == len(CONTROLS) == len(UNTOUCHED)
    without = {"profile": "absolute", "tau": 0.5, "seed": 3, "recover_rate": 0.1}
    # what routed methods call compensation is another control than that of static ones
    assert {*CONTROLS, *without} == {f.name for f in fields(ConversionSpec)} | {"own_share", "fill"}
    for name, value in without.items():
        with pytest.raises(UserError, match=f"no control for {name}"):
            check_shown(ConversionSpec(method="expertweaver", **{name: value}))


def test_untouched_controls_are_the_defaults(tiny):
    assert read_spec(controls()) == ConversionSpec()
    assert chosen(show_spec(ConversionSpec(), tiny)) == controls()


@given(spec=specs)
def test_what_is_shown_of_a_spec_makes_it_again(tiny, spec):
    shown = show_spec(spec, tiny)
    assert read_spec(chosen(shown)) == spec
    if not spec.routed:
        assert Share.read(shown[-1]).shown == spec.kept
        branches, keep = shown[CONTROLS.index("branches")], shown[CONTROLS.index("keep")]
        assert 1 <= keep["value"] <= branches["value"] <= branches["maximum"] == 48
        assert keep["maximum"] == max(2, branches["value"])


@given(routed_settings_of_the_page())
def test_a_routed_spec_is_what_was_chosen_where_it_counts(values):
    spec = read_spec(controls(**values))
    method = ROUTED_METHODS[values["method"]]
    usual = ConversionSpec(method=spec.method, active=spec.active)
    assert (spec.method, spec.active) == (values["method"], values["active"])
    fits = values["router"] in method.routers
    assert spec.router == (values["router"] if fits else usual.router)
    if "experts" in method.fields:
        assert spec.experts == values["experts"]
    if "shared" in method.fields:
        own = values["own_share"]
        # of what runs, no more can be shared
        assert spec.shared == (usual.shared if own else min(values["shared"], values["active"]))
    if spec.active < 1:
        assert spec.compensation == values["fill"]
        selects = "selection" in method.fields
        assert spec.selection == (values["selection"] if selects else "topk")
    if spec.looks_at_activations:
        assert spec.progressive == values["progressive"]
    assert spec.spared == values["spared"].replace(" ", "")


@pytest.mark.parametrize("typed", ["0,1", "1, 0", " 0  1 ", "1+0", "0,,1", "01, 0", "1 0, 1"])
def test_spared_layers_are_typed_in_several_ways(tiny, typed):
    for change in ({"fade": 0.9}, {"method": "random", "experts": 8}):
        asked = read_asked(tiny, (*controls(**change, spared=typed), "stories"))
        assert asked == read_spec(controls(**change, spared="0,1"))
    assert read_spec(controls(fade=0.9, spared="none")) == read_spec(controls(fade=0.9))


@pytest.mark.parametrize("typed", ["first", "-1", "1.5", "0;1", "9" * 50, None, 3, "<b>"])
def test_what_names_no_layers_is_said(typed):
    with pytest.raises(UserError, match="name layers by their numbers") as caught:
        read_spec(controls(fade=0.9, spared=typed))
    assert len(str(caught.value)) < 200


def test_layers_that_the_model_has_not_cannot_be_spared(tiny):
    with pytest.raises(UserError, match="layers 0 to 1"):
        read_asked(tiny, (*controls(fade=0.9, spared="0, 2"), "stories"))


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
    if spec.keep is not None or (spec.fade and values["allocation"] != "global"):  # of K only
        assert spec.allocation == values["allocation"]
    if spec.looks_at_activations and (spec.keep is not None or spec.fades):
        assert spec.progressive == values["progressive"]
    if spec.keep is not None or spec.fades or spec.order != "contiguous":
        assert spec.spared == values["spared"]


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


@given(specs)
def test_the_spec_of_any_settings_has_a_link_that_opens(spec):
    check_shown(spec)
    assert ConversionSpec.from_query(spec.to_query()) == spec


# what is sent is settled


def kept_of(kept: int, of: int) -> str:
    """The share that K stands for, as it was shown for that many branches."""
    return str(Share(kept, of, of))


ALL_16 = kept_of(16, 16)


def settle_at(loaded, share=ALL_16, **change):
    """What is used, what is shown instead (B, fade, K and share), and what is said."""
    used, shown, said = settle(loaded, (*controls(**change), "stories"), share, 100)
    assert used[-1] == "stories"
    return dict(zip(CONTROLS, used, strict=False)), shown[:4], said


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
    share = ALL_16 if share == gr.skip() else share
    assert Share.read(share).shown == found["keep"]
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
    assert share == kept_of(9, 16)


def test_keep_stays_the_same_share_while_branches_are_dragged(tiny):
    """Step by step, over numbers of which it is no whole share, and back."""
    share, keep = kept_of(8, 16), 8
    seen = {}
    for branches in [*range(17, 33), *range(31, 0, -1), *range(2, 17)]:
        used, shown, said = settle_at(tiny, share, branches=branches, keep=keep)
        # left where it may stay: the visitor may have moved it further
        assert shown[2].get("value") == (None if used["keep"] == keep else used["keep"])
        assert shown[2]["maximum"] == max(2, branches)
        keep, share = used["keep"], shown[3]
        assert abs(keep - branches / 2) <= 0.5
        assert said == []
        seen[branches] = keep
    assert (seen[32], seen[1], seen[16]) == (16, 1, 8)


def test_after_another_method_k_stays_where_the_visitor_moves_it(tiny):
    *_, share = show_spec(ConversionSpec(method="random", active=0.5), tiny)
    _, shown, _ = settle_at(tiny, share, keep=13)  # 14 may be on its way
    assert "value" not in shown[2] and shown[2]["maximum"] == 16


def test_all_stay_all(tiny):
    share, keep = ALL_16, 16
    for branches in (17, 32, 5, 48, 1, 16):
        used, shown, _ = settle_at(tiny, share, branches=branches, keep=keep)
        keep, share = used["keep"], shown[3]
        assert keep == branches


def test_a_chosen_keep_is_the_share_from_then_on(tiny):
    used, shown, _ = settle_at(tiny, ALL_16, keep=4)
    assert (used["keep"], shown[3]) == (4, kept_of(4, 16))
    used, *_ = settle_at(tiny, shown[3], branches=32, keep=4)
    assert used["keep"] == 8


@pytest.mark.parametrize(
    "share", ["", "x", "1 2", "0 4 4 0 -", "5 4 4 0 -", "1 1 -3 0 -", None, "9" * 5000]
)
@pytest.mark.parametrize("keep", [1, 9, 16])
def test_without_a_share_that_can_be_read_keep_is_what_was_sent(tiny, share, keep):
    used, *_ = settle_at(tiny, share, keep=keep)
    assert used["keep"] == keep


def test_more_cannot_be_shared_than_runs(tiny):
    values = controls(method="cmoe", active=0.3, own_share=False, shared=0.5)
    used, shown, said = settle(tiny, (*values, "stories"), AS_THEY_ARE, 30)
    assert dict(zip(CONTROLS, used, strict=False))["shared"] == shown[4] == 0.3
    assert said == []
    values = controls(method="cmoe", active=0.3, own_share=False, shared=0.25)
    assert settle(tiny, (*values, "stories"), AS_THEY_ARE, 30)[1][4] == gr.skip()


# what was sent before a link arrived


@pytest.mark.parametrize(
    ("sent", "link"),
    [
        ({}, {"branches": 8, "keep": 4}),
        ({"branches": 8}, {"branches": 8, "keep": 4}),
        ({"keep": 4}, {"branches": 8, "keep": 4}),
        ({"branches": 8, "keep": 4, "order": "norm"}, {"branches": 8, "keep": 4}),
        ({}, {"method": "random", "experts": 8}),
        ({"method": "random"}, {"method": "random", "experts": 8}),
        ({"method": "neurons", "router": "oracle"}, {"method": "neurons", "router": "gate-norm"}),
        ({"method": "inputs", "router": "gate"}, {"method": "inputs", "router": "inputs-norm"}),
        ({"method": "random", "experts": 8}, {"branches": 8, "keep": 4}),
        ({"fade_projections": [], "fade": 0.9}, {"fade": 0.9}),  # no spec at all, on its way
    ],
    ids=str,
)
def test_values_of_before_a_link_do_not_undo_it(demo, handlers, visitor, sent, link):
    """What was set says so of the share first, of sliders and lists later."""
    *_, share = show_spec(read_spec(controls(**link)), demo)
    stale = [
        Previewed(*handlers.preview(visitor(), *preview_values(share=share, **sent)))
        for _ in range(2)
    ]
    for shown in stale:
        assert set(map(str, shown._replace(arrived=gr.skip()))) == {str(gr.skip())}
    assert len({gr.skip()["__type__"], *(shown.arrived for shown in stale)}) == 3  # asks again
    found = Previewed(*handlers.preview(visitor(), *preview_values(share=share, **link)))
    assert read_spec(controls(**link)).to_query() in found.query
    assert found.arrived == gr.skip()
    if "method" not in link:
        assert found.branches == found.keep == gr.skip()  # as they were set


def test_after_a_link_has_arrived_k_follows_as_ever(demo, handlers, visitor):
    *_, share = show_spec(ConversionSpec(branches=8, keep=4), demo)
    values = preview_values(share=share, branches=8, keep=4)
    share = Previewed(*handlers.preview(visitor(), *values)).share
    values = preview_values(share=share, branches=16, keep=4)
    assert Previewed(*handlers.preview(visitor(), *values)).keep["value"] == 8


@given(before=all_settings, spec=specs)
def test_only_what_makes_the_spec_of_a_link_has_arrived(tiny, before, spec):
    shown = show_spec(spec, tiny)
    assert not arriving(chosen(shown), shown[-1])
    assert arriving(controls(**before), shown[-1]) == (read_spec(controls(**before)) != spec)


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
    share = kept_of(min(kept, branches), branches)
    used, shown, _ = settle_at(tiny, share, branches=moved, keep=sent)
    assert 1 <= used["keep"] <= moved
    share = share if shown[3] == gr.skip() else shown[3]
    again, shown, said = settle_at(tiny, share, branches=moved, keep=used["keep"])
    assert again["keep"] == used["keep"]
    assert shown[0] == shown[2] == shown[3] == gr.skip() and said == []


# the budget


@st.composite
def budgeted_settings(draw):
    static = st.fixed_dictionaries({"branches": branch_counts, "keep": st.integers(1, 48)})
    routed = st.fixed_dictionaries(
        {
            "method": st.sampled_from(sorted(ROUTED_METHODS)),
            "active": st.integers(4, 80).map(lambda steps: steps * ACTIVE_STEP),
        }
    )
    return draw(static | routed) | {"spared": draw(st.sampled_from(["", "1", "0, 1"]))}


budgets = st.integers(5, 100)


def shown_budget(loaded, budget, **change):
    """What the budget shows after these values, None where it is left alone."""
    values = (*controls(**change), "stories")
    update = settle(loaded, values, AS_THEY_ARE, budget)[1][-1]
    return None if update == gr.skip() else update


def at_budget(loaded, budget, **change) -> dict:
    """The values after a budget was set."""
    keep, active = set_budget(loaded, (*controls(**change), "stories"), budget)
    moved = {} if keep == gr.skip() else {"keep": keep}
    return change | moved | ({} if active == gr.skip() else {"active": active})


def compute_of(loaded, change) -> float:
    """Of the dense MLPs', in per cent; routers aside."""
    shares = expected_shares(
        read_spec(controls(**change | {"spared": ""})), len(loaded.projections) == 3
    )
    spared = len(change.get("spared", "").replace(",", "").split()) / len(loaded.mlps)
    return 100 * (spared + (1 - spared) * shares.compute)


@given(values=budgeted_settings(), budget=budgets, gate=st.booleans())
def test_a_budget_is_met_as_nearly_as_it_can_be(tiny, gateless, values, budget, gate):
    loaded = tiny if gate else gateless
    found = at_budget(loaded, budget, **values)
    name = "active" if "method" in values else "keep"
    assert {k for k in found if found[k] != values.get(k)} <= {name}
    if name == "keep":
        every = [values | {"keep": k} for k in range(1, values["branches"] + 1)]
    else:
        every = [values | {"active": n * ACTIVE_STEP} for n in range(4, 81)]
    best = min(abs(compute_of(loaded, other) - budget) for other in every)
    assert abs(compute_of(loaded, found) - budget) == pytest.approx(best, abs=1e-6)


@given(values=budgeted_settings(), budget=budgets, gate=st.booleans())
def test_a_budget_that_was_set_stays(tiny, gateless, values, budget, gate):
    """The sliders that it moved do not move it, and it moves them once."""
    loaded = tiny if gate else gateless
    found = at_budget(loaded, budget, **values)
    assert shown_budget(loaded, budget, **found) is None
    assert at_budget(loaded, budget, **found) == found


@given(values=budgeted_settings(), before=budgets, gate=st.booleans())
def test_the_budget_follows_the_sliders_and_then_stays(tiny, gateless, values, before, gate):
    loaded = tiny if gate else gateless
    budget = shown_budget(loaded, before, **values)
    if budget is None:  # they stand for it, as near as they come
        assert at_budget(loaded, before, **values) == values
    else:
        values |= {"keep": min(values.get("keep", 16), values.get("branches", 16))}
        assert budget == pytest.approx(compute_of(loaded, values), abs=0.5 + 1e-9)
        assert shown_budget(loaded, budget, **values) in (None, budget)


@pytest.mark.parametrize(
    "change",
    [
        {"branches": 8, "keep": 6},
        {"branches": 8, "keep": 4, "spared": "1"},
        {"branches": 8, "keep": 4, "spared": "0 1"},
        {"method": "neurons", "active": 0.5},
        {"method": "neurons", "active": 0.25, "spared": "0"},
        {"method": "inputs", "active": 0.5},
        {"method": "inputs", "active": 0.25, "router": "inputs", "spared": "0"},
    ],
    ids=str,
)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
def test_the_budget_is_what_a_conversion_costs(tiny, gateless, change, gate):
    loaded = tiny if gate else gateless
    dense, converted = (
        parameter_report(model).mlp_macs_per_token
        for model in (loaded.model, direct(loaded, read_spec(controls(**change))))
    )
    shown = shown_budget(loaded, 7, **change)
    assert shown == pytest.approx(100 * converted / dense, abs=0.5 + 1e-9)


# the method


def test_every_method_is_said_in_words(panel):
    names = [name for _, name in panel.method.choices]
    assert {*names} == {"mlpmoe", *ROUTED_METHODS}
    said = [show_method(name)[0]["info"] for name in names]
    assert all(said) and len({*said}) == len(said)


@pytest.mark.parametrize("name", ["mlpmoe", *ROUTED_METHODS])
def test_only_the_controls_of_the_method_are_seen(name):
    _, *columns, selection, experts, shared, own_share, router = show_method(name)
    away = [AWAY in column["elem_classes"] for column in columns]
    assert away == [name != "mlpmoe"] * 2 + [name == "mlpmoe"] * 2
    if name == "mlpmoe":
        return
    fields = ROUTED_METHODS[name].fields
    # hidden, and still in the page with its value
    expected = True if "experts" in fields else "hidden"
    assert experts["visible"] == expected
    expected = True if "shared" in fields else "hidden"
    assert {shared["visible"], own_share["visible"]} == {expected}
    assert selection["visible"] == (True if "selection" in fields else "hidden")
    listed = [value for _, value in router["choices"]]
    usual = ConversionSpec(method=name).router
    made = [read_spec(controls(method=name, router=value)).router for value in listed]
    assert made == [usual if value == OWN else value for value in listed]
    assert {*made} == {*ROUTED_METHODS[name].routers}


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
    monkeypatch.setattr("mlpmoe.explorer.shell.settings.MAX_BRANCHES", 20)
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
