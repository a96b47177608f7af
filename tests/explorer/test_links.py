"""Links: what is written is read again, and what cannot be followed is said and left out."""

from __future__ import annotations

from urllib.parse import parse_qs, urlencode

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec, UserError
from mlpmoe.explorer.shell.links import FORMER_TABS, LONGEST, START, TABS, Link, read_link
from mlpmoe.explorer.shell.opening import LOADED
from mlpmoe.explorer.shell.settings import check_shown, read_spec
from mlpmoe.models import CATALOGUE, default_calibration
from tests.explorer.controls import Opened, chosen, controls, opened_link
from tests.explorer.drawn import specs

HOSTILE = "<img src=//x.example/a.png onerror=alert(1)>"
BEFORE = 16, 16, "stories", "stories"  # B, K and the texts, when another model is loaded
texts = st.sampled_from(["stories", "prose", "proxy", "wikitext2", "c4", "own-0123456789ab"])
calibrations = st.sampled_from(["stories", "prose", "own-0123456789ab"])
models = st.sampled_from(["demo", "qwen2.5-0.5b", "owner/name", "/a folder/ü & <b>", "a=b&c#d+e"])
tabs = st.none() | st.sampled_from(sorted(TABS))


@given(specs, models, texts, tabs, calibrations)
def test_every_spec_that_the_page_can_show_comes_back(spec, model, text, tab, calibration):
    """With the calibration text, where one is looked at and another than the model's is chosen."""
    check_shown(spec)
    if not spec.needs_calibration or calibration == default_calibration(model):
        calibration = None
    link = Link(model, spec, text, tab, calibration)
    assert ("calibration=" in link.to_query()) == (calibration is not None)
    assert read_link(link.to_query()) == (link, [])
    once = {name: values[0] for name, values in parse_qs(link.to_query(), True).items()}
    assert read_link(once) == (link, [])  # as the server of the page has it


@pytest.mark.parametrize(
    "spec",
    [
        ConversionSpec(method="cmoe", experts=129),
        ConversionSpec(method="moefication", seed=3),
        ConversionSpec(method="expertweaver", tau=0.5),
        ConversionSpec(method="expertweaver", profile="absolute"),
        ConversionSpec(method="neurons", active=0.01),
        ConversionSpec(method="inputs", active=0.01),
        ConversionSpec(order="random", seed=1),
    ],
    ids=ConversionSpec.to_query,
)
def test_specs_without_a_control_are_refused(spec):
    with pytest.raises(UserError, match=r"at most 128 experts|no control|at least 0.05"):
        check_shown(spec)
    link, notices = read_link(spec.to_query())
    assert link == Link()
    assert "default settings" in notices[0]


def test_a_person_can_read_a_link():
    spec = ConversionSpec(branches=32, fade=0.9, keep=24)
    assert Link("demo", spec, "proxy", "tokens").to_query() == (
        "model=demo&branches=32&fade=0.9&keep=24&text=proxy&tab=tokens"
    )


def test_what_is_said_nowhere_is_a_conversion():
    """A page without a link shows what it is about, and not a model as it was."""
    assert read_link("model=demo&tab=runs")[0].spec == START == PRESETS["Fractal Fade (paper)"]
    assert read_link("branches=16")[0].spec == ConversionSpec()  # said, so it is not faded


def test_a_link_may_name_the_share_of_zeros():
    link, notices = read_link("branches=1&fade_schedule=uniform&sparsity=0.5")
    assert link == Link(spec=ConversionSpec(branches=1, fade=1, fade_schedule="uniform"))
    assert notices == [] and "sparsity" not in link.to_query()


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
        ({"seed": "1", "order": "random"}, "no control for seed"),
        ({"branches": "65"}, "at most 64"),
        ({"experts": "8"}, "does not belong"),
        ({"sparsity": "0.9"}, "at most 0.71875 of the weights"),
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
    assert link == Link("owner/name", START, "proxy", "tokens")
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
    assert opened(opening, visitor).tab == gr.skip()
    assert notices == []
    assert opened(opening, visitor, tab="nowhere").tab == gr.skip()
    assert len(notices) == 1


@pytest.mark.parametrize("name", FORMER_TABS)
def test_links_of_before_open_where_that_is_now(name):
    link, notices = read_link(f"branches=8&tab={name}")
    assert notices == []
    assert link.tab in (None, *TABS)
    assert name not in TABS
    assert (link.tab is None) == (name == "generations")  # which is on the first screen


def test_a_routed_link_sets_the_controls(opening, visitor, notices):
    spec = ConversionSpec(method="cmoe", experts=8, active=0.5, shared=0.125)
    query = {name: values[0] for name, values in parse_qs(spec.to_query()).items()}
    found = opened(opening, visitor, **query)
    values = chosen((*found.controls.values(), found.share))
    assert read_spec(values) == spec
    # those of static branches stay as they are
    assert found.controls["branches"] == found.controls["fade"] == gr.skip()
    assert values == controls(
        method="cmoe", experts=8, active=0.5, own_share=False, shared=0.125
    )  # fmt: skip
    assert found.tab == gr.skip()
    assert notices == []


def test_a_result_that_is_none_is_said(opening, visitor, notices):
    for wrong in ("", "0123456789a", "0123456789aB", "<img src=x>"):
        notices.clear()
        assert opened(opening, visitor, branches="16", keep="8", result=wrong).linked is None
        ((kind, message),) = notices
        assert kind == "Warning" and "12 hexadecimal digits" in message


def test_a_link_to_another_model_of_the_list_is_loaded_first(opening, visitor, notices):
    found = opened(opening, visitor, model=CATALOGUE[1].key, branches="8", text="proxy")
    assert found.share == gr.skip()  # the page is filled in once the model is there
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
    name, text, calibration, *shown, tab, linked = opening.restore_taken(taken, key)
    assert (name, text["value"], tab, linked) == (key, "proxy", gr.skip(), None)
    assert calibration["value"] == "prose"  # of the model's kind
    assert read_spec(chosen(tuple(shown))) == spec
    assert notices == []
    (step,) = opening.load_taken(taken, key, *BEFORE)  # now it is there
    assert step == (gr.skip(),) * LOADED
