"""The events of the page as plain calls: component values in, component updates out."""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import replace

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, named_text, parameter_report
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.core.calibration import MAX_TOKENS, Calibration
from mlpmoe.explorer.convert_panel import CUSTOM
from mlpmoe.explorer.events import readable
from mlpmoe.explorer.generations import GenerationHandlers
from mlpmoe.explorer.loaded import calibration_stories
from mlpmoe.explorer.preview import preset_name
from mlpmoe.explorer.records import Record
from mlpmoe.explorer.settings import read_spec
from mlpmoe.measure.notation import count, number
from mlpmoe.models import ModelError
from mlpmoe.models.texts import TEXTS
from tests.explorer.calibrated import CALIBRATED, at_the_end, direct
from tests.explorer.controls import controls, preview_values, shown_values

SKIPPED = gr.skip()
OUTPUTS = 7  # of a measurement: two cards, four of the structure, the new run


def test_preview_settles_keep_and_names_the_preset(handlers, visitor):
    keep, before, preset, *_ = handlers.preview(visitor(), *preview_values())
    assert keep == before == SKIPPED
    assert preset == "All 16 branches"
    keep, before, preset, *_ = handlers.preview(visitor(), *preview_values(branches=8))
    assert (keep["value"], keep["maximum"], before) == (8, 8, 8)
    assert preset == CUSTOM
    keep, *_ = handlers.preview(visitor(), *preview_values(branches=1))
    assert (keep["value"], keep["maximum"]) == (1, 2)  # a slider needs two ends


def test_preview_leaves_keep_alone_while_it_is_moved(handlers, visitor):
    """It would jump back to where it was when the preview began."""
    for keep in (15, 14, 1):
        update, *_ = handlers.preview(visitor(), *preview_values(keep=keep))
        assert update == SKIPPED


def test_preview_shows_what_was_measured_before(handlers, visitor):
    *_, perplexity, speed, _, _, _, _ = handlers.preview(visitor(), *preview_values())
    assert "measuring" in perplexity
    assert "measuring" in speed
    list(handlers.measure(visitor(), *shown_values()))
    *_, perplexity, speed, _, _, _, _ = handlers.preview(visitor(), *preview_values())
    assert "measuring" not in perplexity + speed
    assert "no measurable change" in perplexity


def test_a_slow_measurement_waits_for_the_button(handlers, demo, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.DEMO_KEY", "another")
    demo.__dict__["tokens_per_second"] = 0.5
    *_, perplexity, _, _, _, _, _ = handlers.preview(visitor(), *preview_values())
    seconds = demo.seconds_to_measure(ConversionSpec(), "proxy")
    assert f"press Measure, about {seconds:.0f} s" in perplexity
    assert list(handlers.measure_if_quick(visitor(), *shown_values())) == []
    assert "measuring" in next(handlers.measure(visitor(), *shown_values()))[0]


def test_measurement_ends_with_both_cards(handlers, demo, visitor):
    handlers.preview(visitor(), *preview_values(fade=0.9))
    *steps, last = handlers.measure_if_quick(visitor(), *shown_values(fade=0.9))
    assert {len(step) for step in steps} == {7} == {len(last)}
    assert all(step[2:6] == (SKIPPED,) * 4 for step in steps)  # shown by the preview
    assert last[4:6] == (SKIPPED,) * 2
    structure = handlers.preview(visitor(), *preview_values(fade=0.9))[-4:-2]
    assert last[2:4] == structure  # once more, for a page that was busy
    assert all(step[6] == SKIPPED for step in steps)
    perplexity, speed, *_, new = last
    (record,) = json.loads(new)
    found = demo.known_evaluation(ConversionSpec(fade=0.9), "proxy")
    assert record["run"]["perplexity"] == found.converted.value
    assert record["run"]["spec"] == "branches=16&fade=0.9"
    assert (record["model"], record["text"], record["dense"]) == (
        "demo",
        "proxy",
        found.dense.value,
    )
    shares = [int(share) for p, *_ in steps for share in re.findall(r"measuring, (\d+)%", p)]
    assert shares == sorted(shares)
    assert shares[-1] == 100 or "…" not in steps[-1][0]
    assert "…" not in perplexity + speed
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy")


def test_an_overtaken_measurement_stops(handlers, demo, visitor):
    handlers.preview(visitor(), *preview_values(fade=0.9))
    stale = handlers.measure_if_quick(visitor(), *shown_values(fade=0.9))
    next(stale)
    handlers.preview(visitor(), *preview_values(fade=0.5))
    assert list(stale) == []
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy") is None


def test_visitors_do_not_overtake_each_other(handlers, demo, visitor):
    handlers.preview(visitor("a"), *preview_values(fade=0.9))
    mine = handlers.measure_if_quick(visitor("a"), *shown_values(fade=0.9))
    next(mine)
    handlers.preview(visitor("b"), *preview_values(fade=0.5))
    list(handlers.measure_if_quick(visitor("b"), *shown_values(fade=0.5)))
    perplexity, *_ = list(mine)[-1]
    assert demo.known_evaluation(ConversionSpec(fade=0.9), "proxy")
    assert "…" not in perplexity


def test_stop(handlers, visitor):
    handlers.preview(visitor(), *preview_values(fade=0.9))
    running = handlers.measure(visitor(), *shown_values(fade=0.9))
    next(running)
    perplexity, speed, *_ = handlers.stop_measuring(visitor(), *shown_values(fade=0.9))
    assert "stopped; press Measure" in perplexity
    assert "stopped; press Measure" in speed
    assert list(running) == []
    *_, (perplexity, *_) = handlers.measure(visitor(), *shown_values(fade=0.9))
    assert "…" not in perplexity


def test_stop_keeps_what_is_known(handlers, visitor):
    list(handlers.measure(visitor(), *shown_values()))
    perplexity, speed, *_ = handlers.stop_measuring(visitor(), *shown_values())
    assert "stopped" not in perplexity + speed


def test_keep_above_branches_is_all_of_them(handlers, visitor):
    """Between two previews the sliders may stand so; no event may fail then."""
    handlers.preview(visitor(), *preview_values(branches=4, keep=4, before=4))
    values = shown_values(branches=4, keep=8)
    assert "…" not in list(handlers.measure(visitor(), *values))[-1][0]
    list(handlers.measure_if_quick(visitor(), *values))
    handlers.stop_measuring(visitor(), *values)
    writer, settings = GenerationHandlers(handlers.workbench), controls(branches=4, keep=8)
    *_, (_, _, report) = writer.write("demo", *settings, "Hello", 2, 0.0)
    assert "K 4" in report


def test_few_visitors_are_remembered(handlers, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.VISITORS_REMEMBERED", 3)
    for session in "abcdea":
        handlers.preview(visitor(session), *preview_values())
    assert list(handlers._latest) == ["d", "e", "a"]


def test_a_public_text_is_read_on_the_button(handlers, demo, visitor, monkeypatch):
    """That may take a network and time, so it never starts by itself."""
    content = named_text("stories")
    entry = replace(TEXTS["c4"], read=lambda: content, most_windows=2)
    monkeypatch.setitem(TEXTS, "c4", entry)
    values = {"text": "c4", "keep": 8}
    card = handlers.preview(visitor(), *preview_values(**values))[7]
    assert "press Measure; reads the text first" in card
    assert list(handlers.measure_if_quick(visitor(), *shown_values(**values))) == []
    assert not demo.has_text("c4")
    steps = list(handlers.measure(visitor(), *shown_values(**values)))
    assert any("reading the text …" in step[0] for step in steps)
    assert "…" not in at_the_end(steps)[0]
    assert json.loads(steps[-1][6])[0]["text"] == "c4"
    again = list(handlers.measure_if_quick(visitor(), *shown_values(**values)))
    assert not any("reading" in step[0] for step in again)  # now it is there


def test_a_text_that_cannot_be_read_is_said(handlers, visitor, monkeypatch):
    def fails():
        raise ModelError("C4 cannot be fetched.")

    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], read=fails))
    values = shown_values(text="c4")
    with pytest.raises(gr.Error, match="C4 cannot be fetched"):
        list(readable(handlers.measure)(visitor(), *values))
    perplexity, speed, *structure, new = handlers.measuring_failed(visitor(), *values)
    assert "not measured; press Measure again" in perplexity
    assert "not measured; press Measure again" in speed
    assert "…" not in "".join(structure[:2])  # which needs no text
    assert new == SKIPPED


@pytest.mark.parametrize("text", ["nothing", None, 5, "own-0123456789ab", "<img src=x>"])
def test_an_unknown_text_is_said(handlers, visitor, text):
    with pytest.raises(gr.Error, match=r"text is called|not on the server") as caught:
        readable(handlers.preview)(visitor(), *preview_values(text=text))
    assert "<" not in caught.value.message
    with pytest.raises(gr.Error, match=r"text is called|not on the server"):
        list(readable(handlers.measure_if_quick)(visitor(), *shown_values(text=text)))


def test_a_text_that_the_server_has_forgotten_leaves_the_cards_in_order(handlers, visitor):
    values = shown_values(text="own-0123456789ab")
    perplexity, _, *structure, _ = handlers.measuring_failed(visitor(), *values)
    assert "not measured" in perplexity
    assert "own text 012345" in perplexity
    assert "…" not in "".join(structure[:2])


# conversions that look at a calibration text


def test_the_tiny_model_s_calibration_is_of_full_length(demo):
    samples = Calibration.from_text(demo.tokenizer, calibration_stories()).samples
    assert samples.numel() == MAX_TOKENS


@pytest.mark.parametrize("change", CALIBRATED.values(), ids=CALIBRATED)
def test_a_calibrated_conversion_is_pending_and_then_measured(handlers, demo, visitor, change):
    spec = read_spec(controls(**change))
    preset, link, code, *_, perplexity, speed, nonzero, compute, histograms, heat = (
        handlers.preview(visitor(), *preview_values(**change))[2:]
    )
    assert "Calibration.from_text" in code
    assert link == f"model=demo&{spec.to_query()}&text=proxy"
    assert preset == (preset_name(spec) or CUSTOM)
    for card in (perplexity, speed, nonzero, compute):
        assert "measuring …" in card
    assert count(demo.report.nonzero) in nonzero
    assert count(demo.report.macs_per_token) in compute
    assert histograms == heat == SKIPPED  # those of before stay meanwhile

    steps = list(handlers.measure_if_quick(visitor(), *shown_values(**change)))
    expected = direct(demo, spec)
    assert any("calibrating" in step[2] for step in steps)
    perplexity, speed, nonzero, compute, histograms, heat, new = at_the_end(steps)
    assert "…" not in perplexity + speed + nonzero + compute
    report = parameter_report(expected)
    assert f">{count(report.nonzero)}<" in nonzero
    assert f">{count(report.macs_per_token)}<" in compute
    assert count(report.total) == count(demo.converted_report(demo.asked(spec)).total)
    text = named_text("proxy")
    found = demo.known_evaluation(demo.asked(spec), "proxy").converted
    measured = measure_perplexity(expected, demo.tokenizer, text)
    assert found.value == pytest.approx(measured.value, rel=1e-4)
    assert f">{number(measured.value)}<" in perplexity
    (record,) = map(Record.from_dict, json.loads(new))
    assert (record.model, record.text, record.run.spec) == ("demo", "proxy", spec)
    assert (record.run.perplexity, record.source) == (found.value, "measured")
    weights, made = expected.state_dict(), demo.converted(demo.asked(spec)).state_dict()
    assert weights.keys() == made.keys()
    assert all(torch.allclose(made[name], weights[name], atol=1e-5) for name in weights)
    assert len(heat.data[0].z[0]) == 16
    assert sum(trace.name == "stays" for trace in histograms.data) == 1

    again = handlers.preview(visitor(), *preview_values(**change))[7:]
    assert again[:4] == (perplexity, speed, nonzero, compute)
    assert again[4:] == (histograms, heat)
    assert [step for step in handlers.measure_if_quick(visitor(), *shown_values(**change))
            if "…" in "".join(step[:2])] == []  # fmt: skip


def test_an_overtaken_calibration_stops(handlers, demo, visitor, weights_hash):
    before = weights_hash(demo.model)
    change = CALIBRATED["refitted"]
    handlers.preview(visitor(), *preview_values(**change))
    stale = handlers.measure_if_quick(visitor(), *shown_values(**change))
    assert "calibrating" in next(stale)[0]
    handlers.preview(visitor(), *preview_values(fade=0.5))
    threads = threading.active_count()
    assert list(stale) == []
    assert threading.active_count() < threads  # nothing goes on behind the scenes
    asked = demo.asked(read_spec(controls(**change)))
    assert not demo.is_converted(asked)
    assert demo.known_evaluation(asked, "proxy") is None
    assert weights_hash(demo.model) == before


def test_a_calibrated_measurement_is_overtaken_by_another_calibrated_one(handlers, demo, visitor):
    first, second = CALIBRATED["refitted"], CALIBRATED["faded"]
    handlers.preview(visitor(), *preview_values(**first))
    stale = handlers.measure_if_quick(visitor(), *shown_values(**first))
    while "calibrating" in next(stale)[0]:  # until it is converted
        pass
    handlers.preview(visitor(), *preview_values(**second))
    assert list(stale) == []
    assert demo.known_evaluation(demo.asked(read_spec(controls(**first))), "proxy") is None
    shown = at_the_end(handlers.measure_if_quick(visitor(), *shown_values(**second)))
    assert "…" not in "".join(shown[:4])


def test_a_calibration_is_stopped(handlers, demo, visitor):
    change = CALIBRATED["refitted"]
    handlers.preview(visitor(), *preview_values(**change))
    running = handlers.measure(visitor(), *shown_values(**change))
    next(running)
    shown = handlers.stop_measuring(visitor(), *shown_values(**change))
    for card in shown[:4]:
        assert "stopped; press Measure" in card
    assert shown[4:] == (SKIPPED, SKIPPED, SKIPPED)
    assert list(running) == []
    shown = at_the_end(handlers.measure(visitor(), *shown_values(**change)))
    assert "…" not in "".join(shown[:4])


def test_a_guest_model_calibrates_on_the_button(handlers, tiny_folder, visitor):
    """For all that is known it takes long."""
    list(handlers.workbench.load(str(tiny_folder)))
    change = CALIBRATED["faded"] | {"model": str(tiny_folder)}
    perplexity, speed, nonzero, compute, *plots = handlers.preview(
        visitor(), *preview_values(**change)
    )[7:]
    for card in (perplexity, speed, nonzero, compute):
        assert "press Measure; calibrates first" in card
    assert plots == [SKIPPED, SKIPPED]
    assert list(handlers.measure_if_quick(visitor(), *shown_values(**change))) == []
    shown = at_the_end(handlers.measure(visitor(), *shown_values(**change)))
    assert "…" not in "".join(shown[:4])


def test_a_text_too_short_to_calibrate_on_is_said(handlers, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.loaded.calibration_stories", lambda: "Once upon a time.")
    values = CALIBRATED["faded"]
    handlers.preview(visitor(), *preview_values(**values))
    with pytest.raises(gr.Error, match="at least 1,024 are needed"):
        list(readable(handlers.measure_if_quick)(visitor(), *shown_values(**values)))


@pytest.mark.parametrize(
    ("change", "strength", "exponent"),
    [
        ({}, True, False),
        ({"fade": 0.5, "fade_schedule": "power"}, True, True),
        ({"fade_schedule": "power"}, True, False),  # without fade it says nothing
        ({"fade_unit": "2:4"}, False, False),
        ({"fade_unit": "neuron", "fade": 0.5}, True, False),
    ],
    ids=str,
)
def test_controls_that_count_no_more_are_out_of_reach(
    handlers, visitor, change, strength, exponent
):
    fade, power = handlers.preview(visitor(), *preview_values(**change))[5:7]
    assert fade["interactive"] is strength
    assert power["visible"] is exponent


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
        ({"projection": "sideways"}, "not one of gate, up, down"),
        ({"quantity": ""}, "not one of"),
        ({"layer": -1}, "ayer must lie between"),
    ],
)
def test_odd_values_raise_what_can_be_read(handlers, visitor, change, reason):
    with pytest.raises(gr.Error, match=reason) as caught:
        readable(handlers.preview)(visitor(), *preview_values(**change))
    assert len(str(caught.value.message)) < 250
