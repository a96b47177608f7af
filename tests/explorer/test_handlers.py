"""The events of the page as plain calls: component values in, component updates out."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, convert, named_text, parameter_report
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.core.calibration import MAX_TOKENS, Calibration
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.explorer.server.events import readable
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.shell import handlers as module
from mlpmoe.explorer.shell.convert_panel import CUSTOM
from mlpmoe.explorer.shell.front import FRONT
from mlpmoe.explorer.shell.preview import preset_name
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.shell.settings import USED, read_spec, within_reach
from mlpmoe.measure.notation import count, number
from mlpmoe.measure.quality.routing import routing
from mlpmoe.models import ModelError, named_calibration
from mlpmoe.models.texts import TEXTS
from tests.explorer.calibrated import CALIBRATED, at_the_end, direct
from tests.explorer.controls import (
    Measured,
    Previewed,
    controls,
    preview_values,
    settings,
    shown_values,
)
from tests.tiny import D_FF

SKIPPED = gr.skip()
OUTPUTS = len(Measured._fields)
FADED = ConversionSpec(fade=0.9)


def previewed(handlers, visitor, **change) -> Previewed:
    return Previewed(*handlers.preview(visitor, *preview_values(**change)))


def live(handlers, visitor, **change) -> Iterable[Measured]:
    """What a measurement gives that starts by itself, after the preview."""
    steps = readable(handlers.measure_live)(visitor, *shown_values(**change))
    return (Measured(*step) if isinstance(step, tuple) else step for step in steps)


def tokens_of(card: str) -> int | None:
    """How many tokens a card says that its figures stand on; None where there are none yet."""
    found = re.search(r"([\d,]+) (?:of [\d,]+ )?tokens", card)
    return int(found[1].replace(",", "")) if found and "first look" not in card else None


def test_preview_settles_keep_and_names_the_preset(handlers, visitor):
    shown = previewed(handlers, visitor())
    assert shown[:USED] == (SKIPPED,) * USED  # the controls stand as they are
    assert shown.preset == "All 16 branches"
    shown = previewed(handlers, visitor(), branches=8)
    assert (shown.keep["value"], shown.keep["maximum"]) == (8, 8)
    assert shown.share == "16 16 8 0 -"
    assert shown.preset == CUSTOM
    shown = previewed(handlers, visitor(), branches=1)
    assert (shown.keep["value"], shown.keep["maximum"]) == (1, 2)  # a slider needs two ends


def test_preview_leaves_keep_alone_while_it_is_moved(handlers, visitor):
    """It would jump back to where it was when the preview began."""
    for keep in (15, 14, 1):
        assert previewed(handlers, visitor(), keep=keep).keep == SKIPPED


def test_what_is_out_of_range_is_shown_as_it_is_used(handlers, visitor, notices):
    """And the structure and the measurement are of what is shown."""
    change = {"branches": 2.5, "fade": 5, "keep": 0}
    somebody = visitor()
    previewed(handlers, somebody)
    shown = previewed(handlers, somebody, **change, share="2 2 3 0 -")
    assert (shown.branches, shown.fade, shown.keep["value"]) == (3, 2.0, 1)
    # the first branch of a ramp loses nothing, however strong it is
    assert "branches=3&keep=1" in shown.query
    assert [kind for kind, _ in notices] == ["Info"] * 3
    *_, last = live(handlers, visitor(), **change)
    assert json.loads(last.new)[0]["run"]["spec"] == "branches=3&keep=1"
    assert (last.nonzero, last.compute) == (shown.nonzero, shown.compute)


def test_what_another_model_left_behind_is_shown_as_it_is_used_without_a_word(
    handlers, visitor, notices
):
    assert previewed(handlers, visitor(), branches=400, keep=400).branches == D_FF
    assert not notices


def test_preview_shows_what_was_measured_before(handlers, visitor):
    shown = previewed(handlers, visitor())
    assert "measuring" in shown.perplexity and "measuring" in shown.speed
    list(handlers.measure(visitor(), *shown_values()))
    shown = previewed(handlers, visitor())
    assert "measuring" not in shown.perplexity + shown.speed
    assert "no measurable change" in shown.perplexity


# a measurement, as it sharpens


@pytest.fixture(autouse=True)
def every_estimate(monkeypatch):
    """Is shown, however fast the machine is."""
    monkeypatch.setattr(module, "BETWEEN_ESTIMATES", 0)


def test_a_page_is_not_flooded_with_estimates(handlers, demo, visitor, monkeypatch):
    monkeypatch.setattr(module, "BETWEEN_ESTIMATES", 1e9)
    previewed(handlers, visitor(), fade=0.9)
    first, run, last = live(handlers, visitor(), fade=0.9)
    assert "first look" in first.perplexity
    assert [step.new == SKIPPED for step in (first, run, last)] == [True, False, False]
    assert tokens_of(run.perplexity) == tokens_of(last.perplexity)
    assert "…" not in last.perplexity + last.speed


def test_a_measurement_sharpens_by_itself_and_ends_with_a_run(handlers, demo, visitor):
    shown = previewed(handlers, visitor(), fade=0.9)
    *steps, last = live(handlers, visitor(), fade=0.9)
    for step in steps:  # shown by the preview
        assert step.nonzero == step.compute == step.network == SKIPPED
    (early_run,) = (step.new for step in steps if step.new != SKIPPED)
    early_run, whole_run = (json.loads(new)[0] for new in (early_run, last.new))
    assert early_run["run"] == whole_run["run"]  # before speed ends
    assert early_run["when"] == whole_run["when"]  # one measurement
    # once more, for a page that was busy
    structure = last.nonzero, last.compute, last.network
    assert structure == (shown.nonzero, shown.compute, shown.network)
    assert "first look" in steps[0].perplexity
    tokens = [tokens_of(step.perplexity) for step in steps]
    tokens = [number for number in tokens if number]
    assert tokens == sorted(tokens) and len(set(tokens)) > 3
    early = [step.perplexity for step in steps if tokens_of(step.perplexity) != tokens[-1]]
    assert early and all("±" in card for card in early)
    # speed does not wait for the end of the text
    first = next(i for i, step in enumerate(steps) if "…" not in step.speed)
    assert tokens_of(steps[first].perplexity) < tokens[-1]
    (record,) = json.loads(last.new)
    found = demo.known_evaluation(FADED, "proxy")
    assert record["run"]["perplexity"] == found.converted.value
    assert record["run"]["spec"] == "branches=16&fade=0.9"
    where = record["model"], record["text"], record["dense"], record["tokens"]
    assert where == ("demo", "proxy", found.dense.value, found.dense.tokens)
    assert "…" not in last.perplexity + last.speed


def test_a_measurement_ends_by_itself_and_goes_on_to_the_end_on_the_button(
    handlers, demo, visitor, monkeypatch
):
    monkeypatch.setattr("mlpmoe.explorer.server.loaded.LIVE_TOKENS", 600)
    previewed(handlers, visitor(), fade=0.9)
    *_, last = live(handlers, visitor(), fade=0.9)
    some = demo.known_evaluation(FADED, "proxy")
    assert not some.complete and 600 <= some.dense.tokens < 900
    assert f"{some.dense.tokens:,} of {some.total:,} tokens" in last.perplexity
    assert json.loads(last.new)[0]["tokens"] == some.dense.tokens
    *_, last = handlers.measure(visitor(), *shown_values(fade=0.9))
    whole = demo.known_evaluation(FADED, "proxy")
    assert whole.complete
    assert json.loads(last[-1])[0]["tokens"] == whole.total


def test_another_view_goes_on_with_what_is_measured(handlers, demo, visitor, monkeypatch):
    """One measurement per visitor, with what is looked at now; on the button still to the end."""
    monkeypatch.setattr("mlpmoe.explorer.server.loaded.LIVE_TOKENS", 1)
    previewed(handlers, visitor(), fade=0.9)
    going = handlers.measure(visitor(), *shown_values(fade=0.9))
    next(going)
    previewed(handlers, visitor(), fade=0.9, layer=1)
    assert list(live(handlers, visitor(), fade=0.9, layer=1)) == [SKIPPED]
    *_, last = going
    assert "…" not in Measured(*last).speed
    assert demo.known_evaluation(FADED, "proxy").complete
    anew = handlers.measure(visitor(), *shown_values(fade=0.9))
    next(anew)
    again = handlers.measure(visitor(), *shown_values(fade=0.9))
    next(again)
    assert list(anew) == []  # the button begins anew
    again.close()
    *_, last = live(handlers, visitor(), fade=0.9)  # closed, it is in nobody's way
    assert "…" not in last.speed
    previewed(handlers, visitor(), fade=0.5)
    list(live(handlers, visitor(), fade=0.5))
    assert not demo.known_evaluation(ConversionSpec(fade=0.5), "proxy").complete


def test_what_fails_is_not_tried_again_by_itself(handlers, visitor, monkeypatch):
    """The page may ask for a preview again: one notice is enough."""
    monkeypatch.setattr(LoadedModel, "evaluate", lambda *_: iter(1 / 0 for _ in "x"))
    previewed(handlers, visitor(), fade=0.9)
    with pytest.raises(gr.Error):
        list(live(handlers, visitor(), fade=0.9))
    assert "press Measure" in previewed(handlers, visitor(), fade=0.9).perplexity
    assert list(live(handlers, visitor(), fade=0.9)) == [SKIPPED]
    monkeypatch.undo()
    assert "…" not in list(handlers.measure(visitor(), *shown_values(fade=0.9)))[-1][0]


def test_an_overtaken_measurement_stops(handlers, demo, visitor):
    previewed(handlers, visitor(), fade=0.9)
    stale = live(handlers, visitor(), fade=0.9)
    next(stale)
    previewed(handlers, visitor(), fade=0.5)
    assert list(stale) == []
    assert not demo.known_evaluation(FADED, "proxy").complete


def test_a_measurement_that_is_overtaken_before_it_starts_leaves_the_page(handlers, demo, visitor):
    previewed(handlers, visitor(), fade=0.9)
    previewed(handlers, visitor(), fade=0.5)
    assert list(live(handlers, visitor(), fade=0.9)) == [SKIPPED]
    assert demo.known_evaluation(FADED, "proxy") is None


def test_visitors_do_not_overtake_each_other(handlers, demo, visitor):
    previewed(handlers, visitor("a"), fade=0.9)
    mine = live(handlers, visitor("a"), fade=0.9)
    next(mine)
    previewed(handlers, visitor("b"), fade=0.5)
    list(live(handlers, visitor("b"), fade=0.5))
    *_, last = mine
    assert "…" not in last.perplexity
    assert demo.known_evaluation(FADED, "proxy").complete


def test_what_fails_late_does_not_stop_what_came_after_it(handlers, demo, visitor):
    previewed(handlers, visitor(), fade=0.9)
    going = live(handlers, visitor(), fade=0.9)
    next(going)
    handlers.measuring_failed(*shown_values(fade=0.9))
    *_, last = going
    assert json.loads(last.new)


def test_stop(handlers, visitor):
    previewed(handlers, visitor(), fade=0.9)
    stopped = Measured(*handlers.stop_measuring(visitor(), *shown_values(fade=0.9)))
    assert "stopped" in stopped.perplexity and "stopped" in stopped.speed  # nothing is known yet
    assert list(live(handlers, visitor(), fade=0.9)) == [SKIPPED]
    running = handlers.measure(visitor(), *shown_values(fade=0.9))
    shown = [Measured(*next(running)) for _ in range(3)][-1]
    stopped = Measured(*handlers.stop_measuring(visitor(), *shown_values(fade=0.9)))
    assert stopped.perplexity == shown.perplexity and tokens_of(shown.perplexity)
    assert stopped.new == SKIPPED
    assert list(running) == []
    *_, last = handlers.measure(visitor(), *shown_values(fade=0.9))
    assert "…" not in Measured(*last).perplexity


def test_keep_above_branches_is_all_of_them(handlers, visitor):
    """Between two previews the sliders may stand so; no event may fail then."""
    previewed(handlers, visitor(), branches=4, keep=4, share="4 4 4 0 -")
    values = shown_values(branches=4, keep=8)
    assert "…" not in list(handlers.measure(visitor(), *values))[-1][0]
    list(live(handlers, visitor(), branches=4, keep=8))
    handlers.stop_measuring(visitor(), *values)


def test_few_visitors_are_remembered(handlers, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.server.looks.VISITORS_REMEMBERED", 3)
    for session in "abcdea":
        previewed(handlers, visitor(session))
    assert list(handlers.looks._latest) == ["d", "e", "a"]


def test_a_public_text_is_read_while_the_page_says_so(handlers, demo, visitor, monkeypatch):
    content = named_text("stories")
    entry = replace(TEXTS["c4"], read=lambda: content, most_windows=2)
    monkeypatch.setitem(TEXTS, "c4", entry)
    assert "measuring …" in previewed(handlers, visitor(), text="c4", keep=8).perplexity
    assert not demo.has_text("c4")
    first, *_, last = live(handlers, visitor(), text="c4", keep=8)
    assert "reading the text …" in first.perplexity
    assert "…" not in last.perplexity
    assert json.loads(last.new)[0]["text"] == "c4"
    previewed(handlers, visitor(), text="c4", keep=7)
    other = list(live(handlers, visitor(), text="c4", keep=7))
    assert not any("reading" in step.perplexity for step in other)  # now it is there


def test_a_text_that_cannot_be_read_is_said(handlers, visitor, monkeypatch):
    def fails():
        raise ModelError("C4 cannot be fetched.")

    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], read=fails))
    previewed(handlers, visitor(), text="c4")
    with pytest.raises(gr.Error, match="C4 cannot be fetched"):
        list(live(handlers, visitor(), text="c4"))
    shown = Measured(*handlers.measuring_failed(*shown_values(text="c4")))
    assert "not measured; press Measure again" in shown.perplexity
    assert "not measured; press Measure again" in shown.speed
    assert "…" not in shown.nonzero + shown.compute  # which need no text
    assert shown.new == SKIPPED


@pytest.mark.parametrize("text", ["nothing", None, 5, "own-0123456789ab", "<img src=x>"])
def test_an_unknown_text_is_said(handlers, visitor, text):
    with pytest.raises(gr.Error, match=r"text is called|not on the server") as caught:
        readable(handlers.preview)(visitor(), *preview_values(text=text))
    assert "<" not in caught.value.message
    with pytest.raises(gr.Error, match=r"text is called|not on the server"):
        list(readable(handlers.measure)(visitor(), *shown_values(text=text)))


def test_a_text_that_the_server_has_forgotten_leaves_the_cards_in_order(handlers, visitor):
    values = shown_values(text="own-0123456789ab")
    shown = Measured(*handlers.measuring_failed(*values))
    assert "not measured" in shown.perplexity
    assert "own text 012345" in shown.perplexity
    assert "…" not in shown.nonzero + shown.compute


# conversions that look at a calibration text


def test_the_tiny_model_s_calibration_is_of_full_length(demo):
    samples = Calibration.from_text(demo.tokenizer, named_calibration("stories")).samples
    assert samples.numel() == MAX_TOKENS


@pytest.mark.parametrize("change", CALIBRATED.values(), ids=CALIBRATED)
def test_a_calibrated_conversion_is_pending_and_then_measured(handlers, demo, visitor, change):
    spec = read_spec(controls(**change))
    shown = previewed(handlers, visitor(), **change)
    assert "Calibration.from_text" in shown.code
    assert shown.query == f"model=demo&{spec.to_query()}&text=proxy"
    assert shown.preset == (preset_name(spec) or CUSTOM)
    for card in (shown.perplexity, shown.speed, shown.nonzero, shown.compute):
        assert "measuring …" in card
    assert count(demo.report.nonzero) in shown.nonzero
    assert count(demo.report.macs_per_token) in shown.compute
    assert shown.network == SKIPPED  # that of before stays meanwhile

    change = change | ({} if shown.axis == SKIPPED else {"axis": shown.axis})
    steps = list(live(handlers, visitor(), **change))
    expected = direct(demo, spec)
    assert any("calibrating" in step.nonzero for step in steps)
    last = Measured(*at_the_end(steps))
    assert "…" not in last.perplexity + last.speed + last.nonzero + last.compute
    report = parameter_report(expected)
    assert f">{count(report.nonzero)}<" in last.nonzero
    assert f">{count(report.macs_per_token)}<" in last.compute
    assert count(report.total) == count(demo.structure.report(demo.asked(spec)).total)
    text = named_text("proxy")
    found = demo.known_evaluation(demo.asked(spec), "proxy").converted
    measured = measure_perplexity(expected, demo.tokenizer, text)
    assert found.value == pytest.approx(measured.value, rel=1e-4)
    assert f">{number(measured.value)}<" in last.perplexity
    (record,) = map(Record.from_dict, json.loads(last.new))
    assert (record.model, record.text, record.run.spec) == ("demo", "proxy", spec)
    assert (record.run.perplexity, record.source) == (found.value, "measured")
    assert record.calibration == "stories"
    weights, made = expected.state_dict(), demo.converted(demo.asked(spec)).state_dict()
    assert weights.keys() == made.keys()
    assert all(torch.allclose(made[name], weights[name], atol=1e-5) for name in weights)
    columns = json.loads(last.network["columns"])
    assert [len(column["left"]) for column in columns] == [16, 16]

    again = previewed(handlers, visitor(), **change)
    assert again[-FRONT:] == last[:FRONT]
    assert list(live(handlers, visitor(), **change)) == [SKIPPED]  # nothing is left to measure


@pytest.mark.parametrize(
    "change", [CALIBRATED["refitted"], {"method": "cmoe", "experts": 8, "active": 0.5}], ids=str
)
def test_a_conversion_is_calibrated_on_the_text_that_was_chosen(
    handlers, demo, visitor, opening, change
):
    """Link, code, figures and run are of it."""
    key = opening.use_calibration("A lamp stood there and a moth flew round it. " * 90)["value"]
    spec = read_spec(controls(**change))
    found = {}
    for name in ("prose", key):
        shown = previewed(handlers, visitor(), **change, calibration=name)
        assert f"&calibration={name}" in shown.query
        *_, last = live(handlers, visitor(), **change, calibration=name)
        (record,) = map(Record.from_dict, json.loads(last.new))
        assert record.calibration == name and record.query == shown.query
        text = demo.texts.read(key) if name == key else named_calibration(name)
        samples = Calibration.from_text(demo.tokenizer, text)
        expected = convert(demo.model, spec, samples)
        measured = measure_perplexity(expected, demo.tokenizer, named_text("proxy"))
        assert record.run.perplexity == pytest.approx(measured.value, rel=1e-4)
        found[name] = record.run.perplexity
    assert len(set(found.values())) == 2


def test_an_overtaken_calibration_stops(handlers, demo, visitor, weights_hash):
    before = weights_hash(demo.model)
    change = CALIBRATED["refitted"]
    previewed(handlers, visitor(), **change)
    stale = live(handlers, visitor(), **change)
    while "calibrating" not in next(stale).perplexity:
        pass
    previewed(handlers, visitor(), fade=0.5)
    threads = threading.active_count()
    assert list(stale) == []
    assert threading.active_count() < threads  # nothing goes on behind the scenes
    asked = demo.asked(read_spec(controls(**change)))
    assert not demo.is_converted(asked)
    assert demo.known_evaluation(asked, "proxy") is None
    assert weights_hash(demo.model) == before


def test_a_calibrated_measurement_is_overtaken_by_another_calibrated_one(handlers, demo, visitor):
    first, second = CALIBRATED["refitted"], CALIBRATED["faded"]
    previewed(handlers, visitor(), **first)
    stale = live(handlers, visitor(), **first)
    while "calibrating" in next(stale).perplexity:  # until it is converted
        pass
    previewed(handlers, visitor(), **second)
    assert list(stale) == []
    asked = demo.asked(read_spec(controls(**first)))
    known = demo.known_evaluation(asked, "proxy")
    assert known is None or not known.complete
    last = Measured(*at_the_end(live(handlers, visitor(), **second)))
    assert "…" not in "".join(last[:4])


def test_a_calibration_is_stopped(handlers, visitor):
    change = CALIBRATED["refitted"]
    previewed(handlers, visitor(), **change)
    running = handlers.measure(visitor(), *shown_values(**change))
    next(running)
    shown = handlers.stop_measuring(visitor(), *shown_values(**change))
    for card in shown[:4]:
        assert "stopped; Measure goes on" in card
    assert shown[-2:] == (SKIPPED, SKIPPED)  # network and run
    assert list(running) == []
    shown = at_the_end(handlers.measure(visitor(), *shown_values(**change)))
    assert "…" not in "".join(shown[:4])


def test_a_guest_model_is_measured_by_itself_too(handlers, tiny_folder, visitor):
    """On the text of its kind, whatever its size."""
    list(handlers.workbench.load(str(tiny_folder)))
    change = CALIBRATED["faded"] | {"model": str(tiny_folder), "calibration": None}
    shown = previewed(handlers, visitor(), **change)
    assert "measuring …" in shown.perplexity
    last = Measured(*at_the_end(live(handlers, visitor(), **change)))
    assert "…" not in "".join(last[:4])
    assert json.loads(last.new)[0]["calibration"] == "prose"


# routed methods


@pytest.mark.parametrize("method", ROUTED_METHODS)
def test_every_routed_method_is_shown_and_measured(handlers, demo, visitor, method):
    change = {"method": method, "experts": 8, "active": 0.5, "layer": 1}
    spec = read_spec(controls(method=method, experts=8, active=0.5))
    shown = previewed(handlers, visitor(), **change)
    assert (shown.preset, shown.query) == (CUSTOM, f"model=demo&{spec.to_query()}&text=proxy")
    assert f"method={method!r}" in shown.code
    assert shown.network == SKIPPED  # it is not known yet which experts run
    last = Measured(*at_the_end(live(handlers, visitor(), **change)))
    expected = direct(demo, spec)
    report = parameter_report(expected)
    assert f">{count(report.nonzero)}<" in last.nonzero
    assert f">{count(report.macs_per_token)}<" in last.compute
    assert "…" not in last.perplexity + last.speed + last.nonzero + last.compute
    perplexity = measure_perplexity(expected, demo.tokenizer, named_text("proxy"))
    assert f">{number(perplexity.value)}<" in last.perplexity
    (record,) = map(Record.from_dict, json.loads(last.new))
    assert (record.run.spec, record.query) == (spec, shown.query)
    assert record.run.perplexity == pytest.approx(perplexity.value, rel=1e-4)
    shares = report.mlp_macs_per_token / parameter_report(demo.model).mlp_macs_per_token
    assert record.run.mlp_macs_share == pytest.approx(shares)
    # the picture: how many tokens run each expert
    assert last.network["kind"] == "experts"  # also of few single neurons
    assert last.network["looked"] == 1
    found = routing(expected, demo.routing_ids)
    for column, layer in zip(json.loads(last.network["columns"]), found, strict=True):
        assert column["always"] == layer.shared and not column["spared"]
        assert column["left"][: layer.shared] == [1] * layer.shared
        load = layer.chosen.float().mean(0).tolist()
        assert column["left"][layer.shared :] == pytest.approx(load, abs=1e-3)
    again = previewed(handlers, visitor(), **change)
    assert again[-FRONT:] == last[:FRONT]


def test_a_routed_conversion_is_kept_off_the_text_that_it_looks_at(handlers, demo, visitor):
    key = demo.texts.add("Something else first. " * 90 + named_text("proxy")[:3000])
    change = {"method": "cmoe", "calibration": key}
    previewed(handlers, visitor(), **change)
    with pytest.raises(gr.Error, match="share a passage"):
        list(live(handlers, visitor(), **change))
    uncalibrated = {"method": "neurons", "calibration": key}
    previewed(handlers, visitor(), **uncalibrated)
    *_, last = live(handlers, visitor(), **uncalibrated)  # which looks at no text
    assert json.loads(last.new)


# the pictures


def test_another_look_at_what_is_known(handlers, demo):
    """Another axis, another layer: no model runs."""
    values = shown_values(branches=8, keep=6, axis="nonzero", layer=1)
    curve, network = handlers.look(*values)
    assert "non-zero" in curve.layout.xaxis.title.text
    assert network["looked"] == 1
    columns = json.loads(network["columns"])
    assert [column["left"] for column in columns] == [[1] * 6 + [0] * 2] * 2
    assert demo.known_evaluation(ConversionSpec(branches=8, keep=6), "proxy") is None


def test_a_model_is_shown_dense_at_first(handlers, one_layer_folder):
    *_, guest = handlers.workbench.load(str(one_layer_folder))
    for key, layers in (("demo", 2), (guest.key, 1)):
        columns = json.loads(handlers.another_model(key)["columns"])
        assert columns == [{"left": [], "always": 0, "spared": False}] * layers


def test_spared_layers_are_left_as_they_are(handlers, demo):
    values = shown_values(branches=4, keep=3, spared="1")
    thinned, whole = json.loads(handlers.look(*values)[1]["columns"])
    assert (thinned["left"], thinned["spared"]) == ([1, 1, 1, 0], False)
    assert (whole["left"], whole["spared"]) == ([1] * 4, True)


def click(**data) -> gr.EventData:
    return gr.EventData(None, data)


def test_a_click_in_the_network_looks_at_a_layer(handlers):
    layer, spared, tab = handlers.picked("0", click(action="look", layer=11, cell=3))
    assert (layer, spared) == (11, SKIPPED)
    assert tab == gr.update(selected="weights")


@pytest.mark.parametrize(
    ("typed", "layer", "after"),
    [
        ("", 3, {3}), ("3", 3, set()), ("0, 11", 3, {0, 3, 11}), ("0, 11", 11, {0}),
        ("11 0", 11, {0}), ("none", 0, {0}), ("0+11", 3, {0, 3, 11}),
    ],
)  # fmt: skip
def test_a_click_spares_a_layer_or_does_no_more(handlers, typed, layer, after):
    """Whichever way those of before were typed; and twice is as if never."""
    looked, spared, tab = handlers.picked(typed, click(action="spare", layer=layer))
    assert (looked, tab) == (SKIPPED, SKIPPED)
    assert {*ConversionSpec(keep=12, spared=spared).spared_layers} == after
    again = handlers.picked(spared, click(action="spare", layer=layer))[1]
    before = ConversionSpec(keep=12, spared=typed).spared_layers
    assert ConversionSpec(keep=12, spared=again).spared_layers == before


@pytest.mark.parametrize(
    "data",
    [None, [], "spare", {}, {"action": "spare"}, {"action": "spare", "layer": "1"},
     {"action": "spare", "layer": True}, {"layer": -1}, {"layer": 1.0}, {"layer": 10**9},
     {"action": "look", "layer": None}],
    ids=str,
)  # fmt: skip
def test_an_odd_click_does_nothing(handlers, data):
    assert handlers.picked("0", SimpleNamespace(_data=data)) == (SKIPPED,) * 3


# the budget


def test_a_budget_moves_what_the_method_has(handlers):
    assert handlers.budget("demo", *settings(), "75 1764100000000") == (12, SKIPPED)
    keep, active = handlers.budget("demo", *settings(method="random"), "50.4 1764100000000")
    assert (keep, active) == (SKIPPED, 0.5)
    assert handlers.budget("demo", *settings(keep=12), "75 1") == (SKIPPED, SKIPPED)


@pytest.mark.parametrize("asked", ["", " ", "much", "nan 1", "inf", "1e999 2", None, 5])
def test_an_odd_budget_is_said(handlers, asked):
    with pytest.raises(gr.Error, match="number of per cent"):
        readable(handlers.budget)("demo", *settings(), asked)


@pytest.mark.parametrize(("asked", "keep"), [("0", 1), ("-70", 1), ("1e300", 16), ("100", 16)])
def test_a_budget_out_of_range_is_the_nearest(handlers, asked, keep):
    found, _ = handlers.budget("demo", *settings(keep=8), asked)
    assert found == keep


def test_a_text_too_short_to_calibrate_on_is_said(handlers, demo, visitor):
    change = CALIBRATED["faded"] | {"calibration": demo.texts.add("Once upon a time.")}
    previewed(handlers, visitor(), **change)
    with pytest.raises(gr.Error, match="at least 1,024 are needed"):
        list(live(handlers, visitor(), **change))


@pytest.mark.parametrize(
    ("unit", "schedule", "strength", "exponent"),
    [
        ("weight", "linear", True, False),
        ("weight", "power", True, True),
        ("2:4", "linear", False, False),
        ("neuron", "uniform", True, False),
    ],
)
def test_controls_that_count_no_more_are_out_of_reach(unit, schedule, strength, exponent):
    fade, power = within_reach(unit, schedule)
    assert (fade["interactive"], power["visible"]) == (strength, exponent)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "owner/absent"}, "Load it on the page"),
        ({"keep": 4, "compensation": "other"}, "must be one of"),
        ({"order": None}, "must be one of"),
        ({"fade": 0.5, "fade_schedule": "steep"}, "must be one of"),
        ({"fade": 0.5, "fade_schedule": "power", "fade_exponent": math.inf}, "between 0 and"),
        ({"fade_projections": []}, "at least one matrix"),
        ({"fade_projections": None}, "at least one matrix"),
        ({"fade": 0.5, "fade_projections": ["left"]}, "must name gate, up or down"),
        ({"fade": 0.5, "fade_score": "zodiac"}, "must be one of"),
        ({"fade_unit": "4:2"}, "n must be at least 1 and less than m"),
        ({"fade_unit": "1:5"}, "need a multiple of 5 inputs"),
        ({"fade_unit": None}, "weight, neuron, or n:m"),
        ({"keep": 4, "allocation": "fair"}, "must be one of"),
        ({"method": "magic"}, "not a method; choose one of the list"),
        ({"method": None}, "not a method"),
        ({"method": "cmoe", "experts": 1}, "xperts must be at least 2"),
        ({"method": "random", "active": 0}, "ctive must be more than 0"),
        ({"method": "random", "selection": "all"}, "must be one of"),
        ({"method": "random", "fill": "alpha"}, "must be one of"),
        ({"method": "cmoe", "calibration": "nothing"}, "o calibration text is called"),
        ({"fade": 0.9, "spared": "2"}, "layers 0 to 1"),
    ],
)
def test_odd_values_raise_what_can_be_read(handlers, visitor, change, reason):
    with pytest.raises(gr.Error, match=reason) as caught:
        readable(handlers.preview)(visitor(), *preview_values(**change))
    assert len(str(caught.value.message)) < 250
