"""What sets the controls of the page: links, runs, presets, loaded models."""

from __future__ import annotations

import re
import shutil
from urllib.parse import unquote_plus

import gradio as gr
import pytest

from mlpmoe import PRESETS, ConversionSpec, UserError
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.explorer.server.events import readable
from mlpmoe.explorer.shell.convert_panel import CUSTOM
from mlpmoe.explorer.shell.handlers import Handlers
from mlpmoe.explorer.shell.links import Link
from mlpmoe.explorer.shell.opening import LOADED, OpeningHandlers
from mlpmoe.explorer.shell.settings import (
    AS_THEY_ARE,
    CONTROLS,
    MAX_BRANCHES,
    OWN,
    STATIC,
    Share,
    arriving,
    read_spec,
    show_spec,
)
from tests.explorer.controls import (
    UNTOUCHED,
    Previewed,
    chosen,
    controls,
    opened_link,
    preview_values,
    settings,
)
from tests.tiny import save_tiny_model

SKIPPED = gr.skip()


# links


def opened(opening, visitor, **query):
    """What a link sets: the model, and the values of the controls."""
    first, *_, last = map(opened_link, opening.open_link(visitor(**query)))
    assert first.model == first.share == SKIPPED
    assert (last.taken, last.text["value"]) == ("", query.get("text", "stories"))
    assert last.tab == SKIPPED
    branches, keep = (last.controls[name] for name in ("branches", "keep"))
    assert last.model == "demo"
    assert "Demo" in last.status
    assert branches["value"] <= branches["maximum"] <= MAX_BRANCHES
    assert keep["value"] <= branches["value"] <= keep["maximum"]
    share = Share.read(last.share)
    assert (share.branches, share.shown) == (branches["value"], keep["value"])
    return last.name, chosen((*last.controls.values(), last.share))


AT_FIRST = controls(fade=0.9)  # the paper's Fractal Fade


def test_no_link_shows_a_conversion(opening, visitor, notices):
    assert opened(opening, visitor) == ("demo", AT_FIRST)
    assert notices == []


def test_a_model_of_few_neurons_starts_with_as_many_branches(workbench, notices, tmp_path):
    folder = str(save_tiny_model(tmp_path / "narrow", intermediate_size=12))
    opening = OpeningHandlers(workbench)
    list(workbench.load(folder))
    shown = opening.restore_taken(f"{Link(folder).to_query()} 1", folder)
    values = chosen(shown[3:-2])
    assert read_spec(values) == ConversionSpec(branches=12)
    workbench.loaded(folder).check_fits(read_spec(values))


@pytest.mark.parametrize(
    "spec",
    [
        *PRESETS.values(),
        ConversionSpec(branches=1, fade=2.0),
        ConversionSpec(branches=48, fade=0.35, keep=1, compensation="none"),
        ConversionSpec(fade=0.5, fade_schedule="power", fade_exponent=3.5, keep=2),
        ConversionSpec(fade=0.5, fade_projections="down", fade_score="wanda", progressive=True),
        ConversionSpec(fade_unit="3:8", fade_projections="up"),
        ConversionSpec(fade=1.2, fade_unit="neuron", order="norm", keep=9, compensation="ratio"),
        ConversionSpec(keep=12, allocation="sensitivity", spared="0"),
    ],
    ids=ConversionSpec.to_query,
)
def test_a_link_restores_its_spec(opening, visitor, notices, spec):
    query = dict(part.split("=") for part in spec.to_query().split("&"))
    query = {name: unquote_plus(text) for name, text in query.items()}
    model, values = opened(opening, visitor, **query, utm_source="mail", theme="dark")
    assert model == "demo"
    assert dict(zip(CONTROLS, values, strict=True)) == UNTOUCHED | {
        **{name: getattr(spec, name) for name in (*STATIC, "progressive", "spared")},
        "keep": spec.kept,
        "fade_exponent": spec.fade_exponent or 2,
        "fade_projections": list(spec.projections),
    }
    assert read_spec(values) == spec.canonical()
    assert notices == []


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"branches": "sixteen"}, "branches must be a number"),
        ({"branches": ""}, "branches must be a number"),
        ({"branches": "1.5"}, "branches must be a number"),
        ({"branches": "0"}, "at least 1"),
        ({"branches": "-4"}, "at least 1"),
        ({"branches": "49"}, "48 neurons"),
        ({"branches": "9" * 5000}, "branches must be a number"),
        ({"branches": "9" * 4000}, "at most 64 branches"),
        ({"fade": "nan"}, "between 0 and 2"),
        ({"fade": "inf"}, "between 0 and 2"),
        ({"fade": "-0.1"}, "between 0 and 2"),
        ({"keep": "17"}, "must lie between 1 and"),
        ({"branches": "8", "keep": "0"}, "must lie between 1 and"),
        ({"compensation": "double"}, "must be one of"),
        ({"method": "other"}, "must be one of"),
        ({"method": "neurons", "progressive": "often"}, "true or false"),
        ({"method": "neurons", "active": "0.01"}, "at least 0.05"),
        ({"method": "expertweaver", "tau": "0.5"}, "no control for tau"),
        ({"spared": "first"}, "layers by their numbers"),
        ({"spared": "0,2", "fade": "0.9"}, "layers 0 to 1"),
        ({"method": "cmoe", "experts": "300"}, "at most 128 experts"),
        ({"order": "alphabetical"}, "must be one of"),
        ({"fade_unit": "4:2"}, "n must be at least 1 and less than m"),
        ({"fade_unit": "half"}, "weight, neuron, or n:m"),
        ({"fade_unit": "2:4", "fade": "0.5"}, "leave fade at 0"),
        ({"fade_projections": ""}, "must name gate, up or down"),
        ({"fade_projections": "gate-left"}, "must name gate, up or down"),
        ({"fade_schedule": "steep"}, "must be one of"),
        ({"fade_exponent": "2"}, "belongs to the schedule power"),
        ({"fade": "0.5", "fade_schedule": "power", "fade_exponent": "50"}, "from 0.25 to 8"),
        ({"order": "random", "seed": "5"}, "no control for seed"),
        ({"fade_score": "zodiac"}, "must be one of"),
        ({"allocation": "fair"}, "must be one of"),
        ({"progressive": "perhaps"}, "true or false"),
        ({"progressive": "true"}, "no stage of this spec looks at activations"),
        ({"experts": "8"}, "does not belong to the method mlpmoe"),
        ({"branches": "8&unknown=1"}, "must be a number"),
        ({"branches": "x" * 100_000}, "branches must be a number"),
    ],
)
def test_a_broken_link_is_said_to_be_broken(opening, visitor, notices, query, reason):
    assert opened(opening, visitor, **query) == ("demo", AT_FIRST)
    ((kind, message),) = notices
    assert kind == "Warning"
    assert re.search(reason, message, re.IGNORECASE)
    assert "default settings are shown" in message
    assert len(message) < 300


def test_more_branches_than_the_page_offers(opening, visitor, notices, monkeypatch):
    """d_ff would allow them, the slider does not."""
    monkeypatch.setattr("mlpmoe.explorer.shell.settings.MAX_BRANCHES", 20)
    assert opened(opening, visitor, branches="24")[1] == AT_FIRST
    assert "at most 20" in notices[0][1]
    assert opened(opening, visitor, branches="20")[1] == controls(branches=20, keep=20)


@pytest.mark.parametrize(
    "name",
    [
        "model", "branches", "fade", "compensation", "method", "order", "fade_unit",
        "fade_projections", "fade_schedule", "fade_score", "allocation", "progressive", "spared",
    ],
)  # fmt: skip
def test_a_link_cannot_put_html_on_the_page(opening, visitor, notices, name):
    """Notices show HTML, and even a sanitised image tells its server who looks."""
    hostile = "<img src=//x.example/a.png onerror=alert(1)>"
    opened(opening, visitor, **{name: hostile})
    assert notices
    assert not any("<" in message for _, message in notices)
    assert any("&lt;img" in message for _, message in notices)


def test_a_link_may_name_a_model_to_load(opening, visitor, notices):
    found = opened(opening, visitor, model="owner/name", branches="8")
    assert found == ("owner/name", controls(branches=8, keep=8))
    ((kind, message),) = notices
    assert kind == "Info"
    assert "owner/name" in message
    assert len(message) < 200


# presets


@pytest.mark.parametrize("name", list(PRESETS))
def test_choose_preset(opening, name):
    spec = PRESETS[name]
    shown = opening.choose_preset("demo", name, *settings(branches=3, fade=0.1))
    assert chosen(shown) == controls(
        branches=spec.branches, fade=spec.fade, keep=spec.kept, compensation=spec.compensation,
        order=spec.order, fade_schedule=spec.fade_schedule, fade_score=spec.fade_score,
        fade_projections=list(spec.projections), progressive=spec.progressive,
        allocation=spec.allocation,
    )  # fmt: skip
    assert shown[-1].startswith(f"{spec.kept} {spec.branches} {spec.branches} ")


@pytest.mark.parametrize("name", [CUSTOM, "", None, "no such preset"])
def test_other_presets_change_nothing(opening, name):
    shown = opening.choose_preset("demo", name, *settings())
    assert shown == (SKIPPED,) * (len(CONTROLS) + 1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_that_is_shown_is_not_taken_again(opening, name):
    """As the focus leaves the dropdown: what is moved next would be set back."""
    shown = chosen(opening.choose_preset("demo", name, *settings(branches=3, fade=0.1)))
    again = opening.choose_preset("demo", name, *shown, "stories")
    assert again == (SKIPPED,) * (len(CONTROLS) + 1)


def test_a_preset_with_more_branches_than_neurons_is_refused(opening, tmp_path):
    folder = str(save_tiny_model(tmp_path / "narrow", intermediate_size=12))
    list(opening.workbench.load(folder))
    with pytest.raises(UserError, match="12 neurons"):
        opening.choose_preset(folder, "Fractal Fade (paper)", *settings(branches=3))


# the method


def after_choosing(opening, share=AS_THEY_ARE, budget=100, **change) -> tuple[dict, tuple]:
    """The values that are set as another method is chosen, and K and the active share."""
    *shown, keep, active = opening.choose_method("demo", *settings(**change), share, budget)
    names = ("experts", "shared", "own_share", "router")
    updates = zip(names, shown[-4:], strict=True)
    return {name: u["value"] for name, u in updates if "value" in u}, (keep, active)


@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_a_method_that_is_chosen_comes_as_its_authors_have_it(opening, method):
    """At the budget there is, and whatever was set for another one."""
    change = {"method": method, "experts": 5, "own_share": False, "router": "regression"}
    moved, (keep, active) = after_choosing(opening, budget=50, **change)
    assert keep == SKIPPED
    # where the gate is computed in full, a quarter of the neurons makes half of the compute
    assert active == (0.25 if method == "neurons" else 0.5)
    spec = read_spec(controls(**change | moved | {"active": active}))
    assert spec == ConversionSpec(method=method, active=active)
    assert moved["router"] == OWN


def test_without_a_budget_the_active_share_stays(opening):
    assert after_choosing(opening, method="random")[1] == (SKIPPED, SKIPPED)
    assert after_choosing(opening, budget=50, keep=16) == ({}, (8, SKIPPED))  # back to branches


def test_a_method_that_a_link_has_set_keeps_its_settings(opening, demo):
    spec = ConversionSpec(method="cmoe", experts=16, active=0.5, shared=0.25, router="oracle")
    *values, share = show_spec(spec, demo)
    change = dict(zip(CONTROLS, chosen((*values, share)), strict=True))
    moved, budgeted = after_choosing(opening, share, budget=75, **change)
    assert (moved, budgeted) == ({}, (SKIPPED, SKIPPED))


# loading


def test_load_reports_and_sets_the_limits(opening, gateless_folder):
    *steps, last = opening.load(str(gateless_folder), "demo", 64, 64, "stories", "stories")
    assert all(update[1:] == (SKIPPED,) * (LOADED - 1) for update in steps)
    assert "checking" in steps[0][0]
    status, key, note, branches, _, _, text, calibration = last
    assert note["visible"] is False
    assert text["value"] == calibration["value"] == "prose"  # of this model's kind
    assert "gateless" in status
    assert "GPT2" in status
    assert key == str(gateless_folder)
    assert (branches["maximum"], branches["value"]) == (48, 48)


def test_a_text_of_the_visitor_s_choice_stays(opening, gateless_folder):
    key = opening.use_text("The ferry left at nine, and nobody had told the gulls.")["value"]
    *_, last = opening.load(str(gateless_folder), "demo", 16, 16, "proxy", key)
    assert (last[-2]["value"], last[-1]["value"]) == ("proxy", key)
    assert key in [name for _, name in last[-1]["choices"]]
    *_, back = opening.load("demo", str(gateless_folder), 16, 16, "prose", "prose")
    assert (back[-2]["value"], back[-1]["value"]) == ("stories", "stories")


def test_the_demo_model_is_called_a_toy(opening, visitor):
    *_, last = opening.open_link(visitor())
    note = opened_link(last).note
    assert note["visible"] is True and "toy" in note["value"]


def test_where_there_is_room_the_sliders_stay(opening, one_layer_folder):
    loads = opening.load(str(one_layer_folder), "demo", 16, 16, "stories", "stories")
    *_, (_, _, _, branches, keep, share, _, _) = loads
    assert keep == share == SKIPPED
    assert branches == gr.update(maximum=40)


def test_in_a_smaller_model_k_is_the_same_share(opening, gateless_folder):
    *_, last = opening.load(str(gateless_folder), "demo", 64, 16, "stories", "stories")
    branches, keep, share = last[3:6]
    assert (branches["value"], keep["value"], keep["maximum"]) == (48, 12, 48)
    assert arriving(controls(branches=64, keep=16), share)
    assert not arriving(controls(branches=48, keep=12), share)


def test_a_failed_load_leaves_the_model_that_is_there(
    opening, demo, tiny_folder, tmp_path, visitor
):
    damaged = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    for name in (str(damaged), "owner/absent", "<img src=x>", "../..", "", None, 7, ["demo"]):
        with pytest.raises(gr.Error) as caught:
            list(readable(opening.load)(name, "demo", 16, 16, "stories", "stories"))
        assert "<" not in caught.value.message
        assert str(tmp_path) not in caught.value.message
    assert opening.workbench.loaded("demo") is demo
    name, status, share = opening.load_failed("demo")
    assert name == "demo"  # what the picker shows again
    assert "Demo" in status
    values = preview_values(share=share, keep=9)
    shown = Previewed(*Handlers(opening.workbench).preview(visitor(), *values))
    assert "keep=9" in shown.query  # the page is filled in with what stands there


def test_progress_of_a_hostile_name_is_escaped(opening):
    loads = opening.load("<script>alert(1)</script>" * 100, "demo", 16, 16, "stories", "stories")
    first = next(loads)
    assert "<script" not in first[0]
    assert len(first[0]) < 600
