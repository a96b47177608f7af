"""Links: what is written is read again, and what cannot be followed is said and left out."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qs, urlencode

import gradio as gr
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlpmoe import ConversionSpec, UserError
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.routed.routers import ROUTERS
from mlpmoe.explorer.expert_settings import OWN, show_spec
from mlpmoe.explorer.expert_settings import check_shown as check_routed
from mlpmoe.explorer.expert_settings import read_spec as read_routed
from mlpmoe.explorer.links import LONGEST, TABS, Link, read_link
from mlpmoe.explorer.opening import LOADED
from mlpmoe.explorer.settings import EXPONENTS, MAX_BRANCHES, check_shown
from mlpmoe.models import CATALOGUE, default_calibration
from tests.core.specs import static_specs
from tests.explorer.controls import Opened, opened_link

HOSTILE = "<img src=//x.example/a.png onerror=alert(1)>"
BEFORE = 16, 16, "stories", "stories"  # B, K and the texts, when another model is loaded
texts = st.sampled_from(["stories", "prose", "proxy", "wikitext2", "c4", "own-0123456789ab"])
calibrations = st.sampled_from(["stories", "prose", "own-0123456789ab"])
models = st.sampled_from(["demo", "qwen2.5-0.5b", "owner/name", "/a folder/ü & <b>", "a=b&c#d+e"])
tabs = st.none() | st.sampled_from(sorted(TABS))


@st.composite
def shown_static(draw):
    """Any static spec that the page has controls for."""
    spec = replace(draw(static_specs(MAX_BRANCHES)), seed=0)
    if spec.fade_exponent is not None:
        spec = replace(spec, fade_exponent=min(max(spec.fade_exponent, EXPONENTS[0]), EXPONENTS[1]))
    return spec


@st.composite
def shown_routed(draw):
    """Any routed spec that the controls of the tab Experts make."""
    method = draw(st.sampled_from(sorted(ROUTED_METHODS)))
    routers = st.sampled_from([OWN, *sorted(ROUTERS)])
    active = draw(st.floats(0.05, 1))
    try:
        return read_routed(
            method, active, draw(st.integers(2, 128)), draw(st.floats(0, active)),
            draw(st.booleans()), draw(routers), draw(st.sampled_from(["topk", "threshold"])),
            draw(st.sampled_from(["none", "mean"])),
        )  # fmt: skip
    except UserError:
        assume(False)


@given(shown_static(), models, texts, tabs, calibrations)
def test_every_static_spec_that_the_page_can_show_comes_back(spec, model, text, tab, calibration):
    """With the calibration text, where one is looked at and another than the model's is chosen."""
    check_shown(spec)
    if not spec.needs_calibration or calibration == default_calibration(model):
        calibration = None
    link = Link(model, spec, text, tab, calibration)
    assert ("calibration=" in link.to_query()) == (calibration is not None)
    assert read_link(link.to_query()) == (link, [])
    once = {name: values[0] for name, values in parse_qs(link.to_query(), True).items()}
    assert read_link(once) == (link, [])  # as the server of the page has it


@given(shown_routed(), models, texts)
def test_every_routed_spec_that_the_page_can_show_comes_back(spec, model, text):
    assert read_link(Link(model, spec, text, "suggest").to_query()) == (
        Link(model, spec, text, "suggest"), [],
    )  # fmt: skip
    found, notices = read_link(Link(model, spec, text).to_query())
    assert (found, notices) == (Link(model, spec, text, "experts"), [])  # where it makes sense
    assert read_routed(*show_spec(found.spec)) == spec


@pytest.mark.parametrize(
    "spec",
    [
        ConversionSpec(method="cmoe", experts=129),
        ConversionSpec(method="moefication", seed=3),
        ConversionSpec(method="expertweaver", tau=0.5),
        ConversionSpec(method="expertweaver", profile="absolute"),
        ConversionSpec(method="cmoe", progressive=True),
    ],
    ids=ConversionSpec.to_query,
)
def test_routed_specs_without_a_control_are_refused(spec):
    with pytest.raises(UserError, match=r"at most 128 experts|no control"):
        check_routed(spec)
    link, notices = read_link(spec.to_query())
    assert link == Link()
    assert "default settings" in notices[0]


def test_a_person_can_read_a_link():
    spec = ConversionSpec(branches=32, fade=0.9, keep=24)
    assert Link("demo", spec, "proxy", "tokens").to_query() == (
        "model=demo&branches=32&fade=0.9&keep=24&text=proxy&tab=tokens"
    )


def test_an_empty_link_has_the_defaults():
    assert read_link("") == read_link({}) == (Link(), [])
    link, notices = read_link("model=&text=stories")
    assert (link.to_query(), notices) == (Link().to_query(), [])


@pytest.mark.parametrize(("model", "kind"), [("demo", "stories"), ("owner/name", "prose")])
def test_a_link_without_texts_means_those_of_the_model_s_kind(model, kind):
    spec = ConversionSpec(keep=12, order="activation")
    link = Link(model, spec)
    assert (link.measured_on, link.calibrated_on) == (kind, kind)
    query = link.to_query()
    assert f"text={kind}" in query and "calibration" not in query
    same = Link(model, spec, kind, calibration=kind)
    assert same.to_query() == query
    # what looks at nothing names no text that it looks at
    assert "calibration" not in Link(model, ConversionSpec(), calibration="own-1").to_query()


def test_names_of_hosts_are_passed_over():
    query = "__theme=dark&utm_source=mail&branches=8&logs=container&__sign=x.y"
    assert read_link(query) == (Link(spec=ConversionSpec(branches=8)), [])


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"tab": "settings"}, "there is no tab 'settings'"),
        ({"tab": ""}, "there is no tab ''"),
        ({"tab": HOSTILE}, "there is no tab"),
        ({"branches": "nan"}, "branches must be a number"),
        ({"fade": "nan"}, "fade"),
        ({"fade": "1e999"}, "fade"),
        ({"active": "nan", "method": "cmoe"}, "active"),
        ({"method": HOSTILE}, "method must be one of"),
        ({"branches": HOSTILE}, "branches must be a number"),
        ({"seed": "1"}, "no other seed"),
        ({"branches": "65"}, "at most 64"),
        ({"experts": "8"}, "does not belong"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_said_once_and_left_at_its_default(query, said):
    for form in (query, urlencode(query)):
        link, (notice,) = read_link(form)
        assert link == Link()
        assert said in notice
        assert len(notice) < 400


def test_the_rest_of_a_broken_link_is_followed():
    link, notices = read_link("model=owner/name&fade=much&text=proxy&tab=tokens")
    assert link == Link("owner/name", ConversionSpec(), "proxy", "tokens")
    assert len(notices) == 1
    link, notices = read_link("branches=8&tab=nowhere")
    assert link == Link(spec=ConversionSpec(branches=8))
    assert len(notices) == 1


@pytest.mark.parametrize(
    "query",
    ["x" * 10**6, "branches=" + "9" * 10**6, "&" * 10**6, "model=" + "m" * 10**6, "%" * 10**5,
     "branches=8&" * 10**4, "\0", "model=%FF%FE", "=", "branches", "tab=%00"],
    ids=lambda query: query[:12],
)  # fmt: skip
def test_hostile_queries_are_read_in_part_or_not_at_all(query):
    link, notices = read_link(query)
    assert len(link.model) <= LONGEST
    assert all(len(notice) < 400 for notice in notices)
    read_link(link.to_query())


@given(st.text(max_size=200))
def test_any_text_is_read(query):
    link, _ = read_link(query)
    again, notices = read_link(link.to_query())
    assert notices == []
    assert again.spec == link.spec


# as the page opens it


def opened(opening, visitor, **query) -> Opened:
    *_, last = opening.open_link(visitor(**query))
    return opened_link(last)


@pytest.mark.parametrize("what", ["text", "calibration"])
def test_an_unknown_text_is_said_and_the_stories_are_used(opening, visitor, notices, what):
    for text in (HOSTILE, "own-0123456789ab", "", "../../etc/passwd"):
        notices.clear()
        shown = getattr(opened(opening, visitor, **{what: text}), what)
        assert shown["value"] == "stories"
        ((kind, message),) = notices
        assert kind == "Warning"
        assert f"The {what} of the model's kind is used" in message
        assert "<img" not in message


def test_texts_that_the_server_has_are_chosen(opening, visitor, notices):
    key = opening.use_text("A short text of a visitor.")["value"]
    for text, calibration in ((key, "prose"), ("prose", key), ("proxy", None)):
        asked = {"text": text} | ({"calibration": calibration} if calibration else {})
        found = opened(opening, visitor, **asked)
        for shown, value in ((found.text, text), (found.calibration, calibration or "stories")):
            assert shown["value"] == value
            listed = [name for _, name in shown.get("choices", [])]
            assert (key in listed) == (value == key)  # what ships is in the list from the start
    assert notices == []


def test_a_link_opens_its_tab(opening, visitor, notices):
    for tab in TABS:
        assert opened(opening, visitor, tab=tab).tab == gr.update(selected=tab)
    assert opened(opening, visitor, tab="branches", branches="8").tab == gr.update(
        selected="branches"
    )
    assert opened(opening, visitor).tab == gr.skip()
    assert notices == []
    assert opened(opening, visitor, tab="nowhere").tab == gr.skip()
    assert len(notices) == 1


def test_a_routed_link_sets_the_controls_of_the_experts(opening, visitor, notices):
    spec = ConversionSpec(method="cmoe", experts=8, active=0.5, shared=0.125)
    query = {name: values[0] for name, values in parse_qs(spec.to_query()).items()}
    found = opened(opening, visitor, **query)
    assert set(map(str, found.static[:-1])) == {str(gr.skip())}
    assert read_routed(*found.routed) == spec
    assert found.tab == gr.update(selected="experts")
    assert notices == []


def test_a_link_to_another_model_of_the_list_is_loaded_first(opening, visitor, notices):
    found = opened(opening, visitor, model=CATALOGUE[1].key, branches="8", text="proxy")
    assert found.static[-1] == gr.skip()  # the page is filled in once the model is there
    expected = Link(CATALOGUE[1].key, ConversionSpec(branches=8), "proxy")
    assert read_link(found.taken) == (expected, [])
    assert found.model == found.name == gr.skip()
    assert notices == []


@pytest.mark.parametrize("taken", ["", None])
def test_nothing_taken_restores_nothing(opening, taken):
    assert set(map(str, opening.restore_taken(taken or "", "demo"))) == {str(gr.skip())}
    (step,) = opening.load_taken(taken or "", "demo", *BEFORE)
    assert step == (gr.skip(),) * LOADED


def test_a_taken_run_of_another_model_is_loaded_and_then_restored(
    opening, gateless_folder, notices
):
    spec = ConversionSpec(branches=6, keep=3)
    taken = f"{Link(str(gateless_folder), spec, 'proxy').to_query()} 1764100000000"
    *_, (status, key, *_) = opening.load_taken(taken, "demo", *BEFORE)
    assert "gateless" in status
    assert key == str(gateless_folder)
    name, text, calibration, *shown = opening.restore_taken(taken, key)
    assert (name, text["value"]) == (key, "proxy")
    assert calibration["value"] == "prose"  # of the model's kind
    assert (shown[0]["value"], shown[2]["value"]) == (6, 3)
    assert notices == []
    (step,) = opening.load_taken(taken, key, *BEFORE)  # now it is there
    assert step == (gr.skip(),) * LOADED
