"""The events of the page as plain calls: component values in, component updates out."""

from __future__ import annotations

import math
import re
import shutil

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import PRESETS, ConversionSpec, UserError, write_side_by_side
from mlpmoe.explorer.components import CUSTOM, MAX_BRANCHES, MAX_NEW_TOKENS, MAX_PROMPT
from mlpmoe.explorer.handlers import check_writing, readable, settle_keep, writing_report
from mlpmoe.measure.generation import Writing

SKIPPED = gr.skip()


@pytest.fixture
def notices(monkeypatch):
    """What was shown as a notice."""
    shown: list[tuple[str, str]] = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(gr, kind, lambda text, kind=kind, **_: shown.append((kind, text)))
    return shown


def preview_values(
    branches=16, fade=0.0, keep=16, compensation="sqrt", text="proxy", layer=0,
    projection="gate", quantity="nonzero", before=16, model="demo",
):  # fmt: skip
    return model, branches, fade, keep, compensation, text, layer, projection, quantity, before


def spec_values(branches=16, fade=0.0, keep=16, compensation="sqrt", text="proxy", model="demo"):
    return model, branches, fade, keep, compensation, text


# K follows B


@pytest.mark.parametrize(
    ("branches", "keep", "before", "settled"),
    [
        (32, 16, 16, 32),  # all stay all
        (8, 16, 16, 8),
        (8, 12, 16, 8),  # never more than B
        (32, 12, 16, 12),  # a chosen K stays
        (16, 12, 16, 12),
        (1, 1, 1, 1),
    ],
)
def test_settle_keep(branches, keep, before, settled):
    assert settle_keep(branches, keep, before) == settled


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_settled_keep_fits_and_settles_once(branches, keep, before):
    settled = settle_keep(branches, keep, before)
    assert 1 <= settled <= branches
    assert settle_keep(branches, settled, branches) == settled


# links


def opened(handlers, visitor, **query):
    """What a link sets: model, then B, fade, K, compensation as plain values."""
    is_open, model, status, branches, fade, keep, compensation, before = handlers.open_link(
        visitor(**query)
    )
    assert is_open is True
    assert "Demo" in status
    assert before == branches["value"] <= branches["maximum"] <= MAX_BRANCHES
    assert keep["value"] <= branches["value"] <= keep["maximum"]
    return model, branches["value"], fade, keep["value"], compensation


def test_no_link_gives_the_defaults(handlers, visitor, notices):
    assert opened(handlers, visitor) == ("demo", 16, 0.0, 16, "sqrt")
    assert notices == []


@pytest.mark.parametrize(
    "spec",
    [
        *PRESETS.values(),
        ConversionSpec(branches=1, fade=2.0),
        ConversionSpec(branches=48, fade=0.35, keep=1, compensation="none"),
    ],
    ids=ConversionSpec.to_query,
)
def test_a_link_restores_its_spec(handlers, visitor, notices, spec):
    query = dict(part.split("=") for part in spec.to_query().split("&"))
    found = opened(handlers, visitor, **query, utm_source="mail", theme="dark")
    assert found == ("demo", spec.branches, spec.fade, spec.kept, spec.compensation)
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
        ({"branches": "9" * 4000}, "thousands of digits|48 neurons"),
        ({"fade": "nan"}, "between 0 and 2"),
        ({"fade": "inf"}, "between 0 and 2"),
        ({"fade": "-0.1"}, "between 0 and 2"),
        ({"keep": "17"}, "must lie between 1 and"),
        ({"branches": "8", "keep": "0"}, "must lie between 1 and"),
        ({"compensation": "double"}, "must be one of"),
        ({"method": "other"}, "must be one of"),
        ({"method": "cmoe"}, "tab Experts"),
        ({"order": "fluctuation"}, "tab Experts"),
        ({"compensation": "mean"}, "tab Experts"),
        ({"branches": "8&unknown=1"}, "unknown field"),
        ({"branches": "x" * 100_000}, "branches must be a number"),
    ],
)
def test_a_broken_link_is_said_to_be_broken(handlers, visitor, notices, query, reason):
    assert opened(handlers, visitor, **query) == ("demo", 16, 0.0, 16, "sqrt")
    ((kind, message),) = notices
    assert kind == "Warning"
    assert re.search(reason, message, re.IGNORECASE)
    assert "defaults" in message
    assert len(message) < 300


def test_more_branches_than_the_page_offers(handlers, visitor, notices, monkeypatch):
    """d_ff would allow them, the slider does not."""
    monkeypatch.setattr("mlpmoe.explorer.handlers.MAX_BRANCHES", 20)
    assert opened(handlers, visitor, branches="24")[1] == 16
    assert "at most 20" in notices[0][1]
    assert opened(handlers, visitor, branches="20")[1] == 20


@pytest.mark.parametrize("name", ["model", "branches", "fade", "compensation", "method"])
def test_a_link_cannot_put_html_on_the_page(handlers, visitor, notices, name):
    """Notices show HTML, and even a sanitised image tells its server who looks."""
    hostile = "<img src=//x.example/a.png onerror=alert(1)>"
    opened(handlers, visitor, **{name: hostile})
    assert notices
    assert not any("<" in message for _, message in notices)
    assert any("&lt;img" in message for _, message in notices)


def test_a_link_may_name_a_model_to_load(handlers, visitor, notices):
    assert opened(handlers, visitor, model="owner/name", branches="8")[:2] == ("owner/name", 8)
    ((kind, message),) = notices
    assert kind == "Info"
    assert "owner/name" in message
    assert len(message) < 200


# presets


@pytest.mark.parametrize("name", list(PRESETS))
def test_choose_preset(handlers, name):
    spec = PRESETS[name]
    branches, fade, keep, compensation, before = handlers.choose_preset("demo", name)
    assert (branches["value"], fade, keep["value"]) == (spec.branches, spec.fade, spec.kept)
    assert (compensation, before) == (spec.compensation, spec.branches)


@pytest.mark.parametrize("name", [CUSTOM, "", None, "no such preset"])
def test_other_presets_change_nothing(handlers, name):
    assert handlers.choose_preset("demo", name) == (SKIPPED,) * 5


def test_a_preset_with_more_branches_than_neurons_is_refused(handlers, tmp_path):
    from tests.tiny import save_tiny_model

    folder = str(save_tiny_model(tmp_path / "narrow", intermediate_size=12))
    list(handlers.workbench.load(folder))
    with pytest.raises(UserError, match="12 neurons"):
        handlers.choose_preset(folder, "Fractal Fade (paper)")


# preview and measurement


def test_preview_settles_keep_and_names_the_preset(handlers, visitor):
    keep, before, preset, *_ = handlers.preview(*preview_values(), visitor())
    assert keep == before == SKIPPED
    assert preset == "All 16 branches"
    keep, before, preset, *_ = handlers.preview(*preview_values(branches=8), visitor())
    assert (keep["value"], keep["maximum"], before) == (8, 8, 8)
    assert preset == CUSTOM
    keep, *_ = handlers.preview(*preview_values(branches=1), visitor())
    assert (keep["value"], keep["maximum"]) == (1, 2)  # a slider needs two ends


def test_preview_leaves_keep_alone_while_it_is_moved(handlers, visitor):
    """It would jump back to where it was when the preview began."""
    for keep in (15, 14, 1):
        update, *_ = handlers.preview(*preview_values(keep=keep), visitor())
        assert update == SKIPPED


def test_preview_shows_what_was_measured_before(handlers, visitor):
    *_, perplexity, speed, _, _, _ = handlers.preview(*preview_values(), visitor())
    assert "measuring" in perplexity
    assert "measuring" in speed
    list(handlers.measure(*spec_values(), visitor()))
    *_, perplexity, speed, _, _, _ = handlers.preview(*preview_values(), visitor())
    assert "measuring" not in perplexity + speed
    assert "no measurable change" in perplexity


def test_a_slow_measurement_waits_for_the_button(handlers, demo, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.DEMO_KEY", "another")
    demo.__dict__["tokens_per_second"] = 0.5
    *_, perplexity, _, _, _, _ = handlers.preview(*preview_values(), visitor())
    seconds = demo.seconds_to_measure(ConversionSpec(), "proxy")
    assert f"press Measure, about {seconds:.0f} s" in perplexity
    assert list(handlers.measure_if_quick(*spec_values(), visitor())) == []
    assert "measuring" in next(handlers.measure(*spec_values(), visitor()))[0]


def test_measurement_ends_with_both_cards(handlers, demo, visitor):
    handlers.preview(*preview_values(fade=0.9), visitor())
    *steps, (perplexity, speed) = handlers.measure_if_quick(*spec_values(fade=0.9), visitor())
    shares = [int(share) for p, _ in steps for share in re.findall(r"measuring, (\d+)%", p)]
    assert shares == sorted(shares)
    assert shares[-1] == 100 or "…" not in steps[-1][0]
    assert "…" not in perplexity + speed
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy")


def test_an_overtaken_measurement_stops(handlers, demo, visitor):
    handlers.preview(*preview_values(fade=0.9), visitor())
    stale = handlers.measure_if_quick(*spec_values(fade=0.9), visitor())
    next(stale)
    handlers.preview(*preview_values(fade=0.5), visitor())
    assert list(stale) == []
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy") is None


def test_visitors_do_not_overtake_each_other(handlers, demo, visitor):
    handlers.preview(*preview_values(fade=0.9), visitor("a"))
    mine = handlers.measure_if_quick(*spec_values(fade=0.9), visitor("a"))
    next(mine)
    handlers.preview(*preview_values(fade=0.5), visitor("b"))
    list(handlers.measure_if_quick(*spec_values(fade=0.5), visitor("b")))
    perplexity, _ = list(mine)[-1]
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy")
    assert "…" not in perplexity


def test_stop(handlers, visitor):
    handlers.preview(*preview_values(fade=0.9), visitor())
    running = handlers.measure(*spec_values(fade=0.9), visitor())
    next(running)
    perplexity, speed = handlers.stop_measuring(*spec_values(fade=0.9), visitor())
    assert "stopped; press Measure" in perplexity
    assert "stopped; press Measure" in speed
    assert list(running) == []
    *_, (perplexity, _) = handlers.measure(*spec_values(fade=0.9), visitor())
    assert "…" not in perplexity


def test_stop_keeps_what_is_known(handlers, visitor):
    list(handlers.measure(*spec_values(), visitor()))
    perplexity, speed = handlers.stop_measuring(*spec_values(), visitor())
    assert "stopped" not in perplexity + speed


def test_keep_above_branches_is_all_of_them(handlers, visitor):
    """Between two previews the sliders may stand so; no event may fail then."""
    handlers.preview(*preview_values(branches=4, keep=4, before=4), visitor())
    values = spec_values(branches=4, keep=8)
    assert "…" not in list(handlers.measure(*values, visitor()))[-1][0]
    list(handlers.measure_if_quick(*values, visitor()))
    handlers.stop_measuring(*values, visitor())
    assert handlers.lesson(*values[:5], 0) == handlers.lesson("demo", 4, 0.0, 4, "sqrt", 0)
    *_, (_, _, report) = handlers.write(*values[:5], "Hello", 2, 0.0)
    assert "K 4" in report


def test_few_visitors_are_remembered(handlers, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.VISITORS_REMEMBERED", 3)
    for session in "abcdea":
        handlers.preview(*preview_values(), visitor(session))
    assert list(handlers._latest) == ["d", "e", "a"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "owner/absent"}, "Load it on the page"),
        ({"branches": 0, "keep": 0, "before": 0}, "at least 1"),
        ({"branches": 49, "keep": 49, "before": 49}, "48 neurons"),
        ({"branches": 8.5}, "whole number"),
        ({"keep": 0}, "between 1 and"),
        ({"fade": math.nan}, "between 0 and 2"),
        ({"fade": "0.5"}, "between 0 and 2"),
        ({"keep": 4, "compensation": "other"}, "must be one of"),
        ({"projection": "sideways"}, "not one of gate, up, down"),
        ({"quantity": ""}, "not one of"),
        ({"layer": -1}, "ayer must lie between"),
    ],
)
def test_odd_values_raise_what_can_be_read(handlers, visitor, change, reason):
    with pytest.raises(gr.Error, match=reason) as caught:
        readable(handlers.preview)(*preview_values(**change), visitor())
    assert len(str(caught.value.message)) < 250


# loading


def test_load_reports_and_sets_the_limits(handlers, gateless_folder):
    *steps, last = handlers.load(str(gateless_folder), 64)
    assert all(update[1:] == (SKIPPED,) * 4 for update in steps)
    assert "checking" in steps[0][0]
    status, key, branches, layer, projection = last
    assert "gateless" in status
    assert "GPT2" in status
    assert key == str(gateless_folder)
    assert (branches["maximum"], branches["value"]) == (48, 48)
    assert (layer["maximum"], layer["value"]) == (1, 0)
    assert projection["choices"] == ["up", "down"]
    assert projection["value"] == "up"


def test_a_model_of_one_layer_has_a_slider_with_two_ends(handlers, one_layer_folder, visitor):
    *_, (_, key, branches, layer, _) = handlers.load(str(one_layer_folder), 16)
    assert (branches["maximum"], branches["value"], layer["maximum"]) == (40, 16, 1)
    handlers.preview(*preview_values(model=key, layer=1), visitor())
    handlers.lesson(key, 16, 0.9, 12, "sqrt", 1)


def test_a_failed_load_leaves_the_model_that_is_there(handlers, demo, tiny_folder, tmp_path):
    damaged = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    for name in (str(damaged), "owner/absent", "<img src=x>", "../..", "", None, 7, ["demo"]):
        with pytest.raises(gr.Error) as caught:
            list(readable(handlers.load)(name, 16))
        assert "<" not in caught.value.message
        assert str(tmp_path) not in caught.value.message
    assert handlers.workbench.loaded("demo") is demo
    assert "Demo" in handlers.load_failed("demo")


def test_progress_of_a_hostile_name_is_escaped(handlers):
    first = next(handlers.load("<script>alert(1)</script>" * 100, 16))
    assert "<script" not in first[0]
    assert len(first[0]) < 600


# writing


def test_write_gives_the_library_s_text(handlers, demo):
    *_, (dense, converted, report) = handlers.write("demo", 6, 0.9, 4, "sqrt", "Hello", 40, 0.0)
    pair = (demo.model, demo.converted(ConversionSpec(branches=6, fade=0.9, keep=4)))
    *_, writings = write_side_by_side(pair, demo.tokenizer, "Hello", 40)
    assert (dense, converted) == tuple(writing.text.lstrip() for writing in writings)
    assert "B 6 · fade 0.90 · K 4, × √(B/K)" in report


def test_writing_streams_and_stops_by_the_clock(handlers, notices, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.UPDATES_PER_SECOND", math.inf)
    monkeypatch.setattr("mlpmoe.explorer.handlers.WRITING_SECONDS", 0.0)
    steps = list(handlers.write("demo", 16, 0.0, 16, "sqrt", "Hello", 100, 0.0))
    assert len(steps) == 2
    assert "1 tokens" in steps[-1][2]
    assert notices[0][1].startswith("Stopped after")


def test_a_stopped_writer_leaves_the_weights(handlers, demo, weights_hash, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.UPDATES_PER_SECOND", math.inf)
    before = weights_hash(demo.model)
    writer = handlers.write("demo", 16, 0.9, 8, "sqrt", "Hello", 100, 0.0)
    next(writer)
    writer.close()
    assert weights_hash(demo.model) == before


def test_writing_report(demo):
    spec = ConversionSpec(keep=12)
    same = Writing([5, 6], "ab", 0.5)
    assert "same text, token for token" in writing_report(demo, spec, (same, same))
    other = Writing([5, *demo.tokenizer("<b>").input_ids[1:]], "a<b>", 0.5, finished=True)
    report = writing_report(demo, spec, (same, other))
    assert "part at token 2" in report
    assert "&lt;" in report
    assert "<b>" not in report
    assert "ended by itself" in report
    assert "K 12" in report


@pytest.mark.parametrize("tokens", [1, 64, MAX_NEW_TOKENS])
@pytest.mark.parametrize("temperature", [0, 0.7, 2, 2.0])
def test_check_writing_lets_good_values_pass(tokens, temperature):
    check_writing("x" * MAX_PROMPT, tokens, temperature)


ODD = [True, False, None, "64", "", math.nan, math.inf, -math.inf, -1, 10**400, [], [8], {}, 1j]


@pytest.mark.parametrize("value", [*ODD, 0, 2.5, 64.0, MAX_NEW_TOKENS + 1])
def test_check_writing_refuses_odd_token_counts(value):
    with pytest.raises(UserError, match="tokens must be a whole number between 1 and"):
        check_writing("Hello", value, 0.0)


@pytest.mark.parametrize("value", [*ODD, 2.01])
def test_check_writing_refuses_odd_temperatures(value):
    with pytest.raises(UserError, match="temperature must be a number between 0 and 2"):
        check_writing("Hello", 8, value)


@pytest.mark.parametrize("value", [None, 3, True, math.nan, ["Hello"], b"Hello", "x" * 10**6])
def test_check_writing_refuses_odd_prompts(value):
    with pytest.raises(UserError, match="must be a text of at most 2,000 characters"):
        check_writing(value, 8, 0.0)


@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_an_empty_prompt_is_refused(handlers, prompt):
    with pytest.raises(UserError, match="prompt is empty"):
        next(handlers.write("demo", 16, 0.0, 16, "sqrt", prompt, 8, 0.0))


# errors


def test_readable_passes_on_what_a_user_can_mend():
    @readable
    def handler():
        raise UserError("Choose <less>.")

    with pytest.raises(gr.Error, match="Choose &lt;less&gt;") as caught:
        handler()
    assert not caught.value.print_exception


@pytest.mark.parametrize("streams", [False, True])
def test_readable_hides_what_nobody_can_mend(caplog, streams):
    def fails():
        raise RuntimeError("secret /home/someone/file.py")

    def stream():
        yield 1
        raise RuntimeError("secret /home/someone/file.py")

    with pytest.raises(gr.Error, match="Something went wrong") as caught:
        list(readable(stream)()) if streams else readable(fails)()
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text  # for whoever runs the server


def test_readable_lets_a_stream_be_closed():
    closed = []

    @readable
    def stream():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    running = stream()
    next(running)
    running.close()
    assert closed == [True]
