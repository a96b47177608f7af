"""The events of the page as plain calls: component values in, component updates out."""

from __future__ import annotations

import math
import re
import shutil
import threading
from urllib.parse import unquote_plus

import gradio as gr
import pytest
import torch

from mlpmoe import PRESETS, ConversionSpec, UserError, convert, parameter_report, write_side_by_side
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.core.calibration import MAX_TOKENS, Calibration
from mlpmoe.explorer.components import MAX_NEW_TOKENS, MAX_PROMPT
from mlpmoe.explorer.convert_panel import CUSTOM
from mlpmoe.explorer.handlers import check_writing, readable, writing_report
from mlpmoe.explorer.loaded import TEXTS, calibration_stories
from mlpmoe.explorer.preview import preset_name
from mlpmoe.explorer.settings import CONTROLS, MAX_BRANCHES, read_spec
from mlpmoe.measure.generation import Writing
from mlpmoe.measure.notation import count, number
from mlpmoe.models import assets_folder
from tests.explorer.controls import chosen, controls, preview_values, shown_values

SKIPPED = gr.skip()


@pytest.fixture
def notices(monkeypatch):
    """What was shown as a notice."""
    shown: list[tuple[str, str]] = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(gr, kind, lambda text, kind=kind, **_: shown.append((kind, text)))
    return shown


# links


def opened(handlers, visitor, **query):
    """What a link sets: the model, and the values of the controls."""
    is_open, model, status, *shown = handlers.open_link(visitor(**query))
    branches, keep = (shown[CONTROLS.index(name)] for name in ("branches", "keep"))
    assert is_open is True
    assert "Demo" in status
    assert shown[-1] == branches["value"] <= branches["maximum"] <= MAX_BRANCHES
    assert keep["value"] <= branches["value"] <= keep["maximum"]
    return model, chosen(tuple(shown))


def test_no_link_gives_the_defaults(handlers, visitor, notices):
    assert opened(handlers, visitor) == ("demo", controls())
    assert notices == []


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
        ConversionSpec(keep=12, allocation="sensitivity"),
    ],
    ids=ConversionSpec.to_query,
)
def test_a_link_restores_its_spec(handlers, visitor, notices, spec):
    query = dict(part.split("=") for part in spec.to_query().split("&"))
    query = {name: unquote_plus(text) for name, text in query.items()}
    model, values = opened(handlers, visitor, **query, utm_source="mail", theme="dark")
    assert model == "demo"
    assert dict(zip(CONTROLS, values, strict=True)) == {
        **{name: getattr(spec, name) for name in CONTROLS},
        "keep": spec.kept,
        "fade_exponent": spec.fade_exponent or 2,
        "fade_projections": list(spec.projections),
    }
    assert read_spec(values) == spec
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
        ({"method": "cmoe"}, "tab Experts"),
        ({"method": "neurons", "progressive": "true"}, "tab Experts"),
        ({"order": "alphabetical"}, "must be one of"),
        ({"fade_unit": "4:2"}, "n must be at least 1 and less than m"),
        ({"fade_unit": "half"}, "weight, neuron, or n:m"),
        ({"fade_unit": "2:4", "fade": "0.5"}, "leave fade at 0"),
        ({"fade_projections": ""}, "must name gate, up or down"),
        ({"fade_projections": "gate-left"}, "must name gate, up or down"),
        ({"fade_schedule": "steep"}, "must be one of"),
        ({"fade_exponent": "2"}, "belongs to the schedule power"),
        ({"fade": "0.5", "fade_schedule": "power", "fade_exponent": "50"}, "from 0.25 to 8"),
        ({"order": "random", "seed": "5"}, "no other seed than 0"),
        ({"fade_score": "zodiac"}, "must be one of"),
        ({"allocation": "fair"}, "must be one of"),
        ({"progressive": "perhaps"}, "true or false"),
        ({"progressive": "true"}, "no stage of this spec looks at activations"),
        ({"experts": "8"}, "does not belong to the method mlpmoe"),
        ({"branches": "8&unknown=1"}, "unknown field"),
        ({"branches": "x" * 100_000}, "branches must be a number"),
    ],
)
def test_a_broken_link_is_said_to_be_broken(handlers, visitor, notices, query, reason):
    assert opened(handlers, visitor, **query) == ("demo", controls())
    ((kind, message),) = notices
    assert kind == "Warning"
    assert re.search(reason, message, re.IGNORECASE)
    assert "defaults" in message
    assert len(message) < 300


def test_more_branches_than_the_page_offers(handlers, visitor, notices, monkeypatch):
    """d_ff would allow them, the slider does not."""
    monkeypatch.setattr("mlpmoe.explorer.settings.MAX_BRANCHES", 20)
    assert opened(handlers, visitor, branches="24")[1] == controls()
    assert "at most 20" in notices[0][1]
    assert opened(handlers, visitor, branches="20")[1] == controls(branches=20, keep=20)


@pytest.mark.parametrize(
    "name",
    [
        "model", "branches", "fade", "compensation", "method", "order", "fade_unit",
        "fade_projections", "fade_schedule", "fade_score", "allocation", "progressive",
    ],
)  # fmt: skip
def test_a_link_cannot_put_html_on_the_page(handlers, visitor, notices, name):
    """Notices show HTML, and even a sanitised image tells its server who looks."""
    hostile = "<img src=//x.example/a.png onerror=alert(1)>"
    opened(handlers, visitor, **{name: hostile})
    assert notices
    assert not any("<" in message for _, message in notices)
    assert any("&lt;img" in message for _, message in notices)


def test_a_link_may_name_a_model_to_load(handlers, visitor, notices):
    found = opened(handlers, visitor, model="owner/name", branches="8")
    assert found == ("owner/name", controls(branches=8, keep=8))
    ((kind, message),) = notices
    assert kind == "Info"
    assert "owner/name" in message
    assert len(message) < 200


# presets


@pytest.mark.parametrize("name", list(PRESETS))
def test_choose_preset(handlers, name):
    spec = PRESETS[name]
    shown = handlers.choose_preset("demo", name)
    assert chosen(shown) == controls(
        branches=spec.branches, fade=spec.fade, keep=spec.kept, compensation=spec.compensation,
        order=spec.order, fade_schedule=spec.fade_schedule, fade_score=spec.fade_score,
        fade_projections=list(spec.projections), progressive=spec.progressive,
    )  # fmt: skip
    assert shown[-1] == spec.branches


@pytest.mark.parametrize("name", [CUSTOM, "", None, "no such preset"])
def test_other_presets_change_nothing(handlers, name):
    assert handlers.choose_preset("demo", name) == (SKIPPED,) * (len(CONTROLS) + 1)


def test_a_preset_with_more_branches_than_neurons_is_refused(handlers, tmp_path):
    from tests.tiny import save_tiny_model

    folder = str(save_tiny_model(tmp_path / "narrow", intermediate_size=12))
    list(handlers.workbench.load(folder))
    with pytest.raises(UserError, match="12 neurons"):
        handlers.choose_preset(folder, "Fractal Fade (paper)")


# preview and measurement


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
    assert {len(step) for step in steps} == {6} == {len(last)}
    assert all(step[2:] == (SKIPPED,) * 4 for step in [*steps, last])  # shown by the preview
    perplexity, speed, *_ = last
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
    settings = controls(branches=4, keep=8)
    expected = handlers.lesson("demo", *controls(branches=4, keep=4), 0)
    assert handlers.lesson("demo", *settings, 0) == expected
    *_, (_, _, report) = handlers.write("demo", *settings, "Hello", 2, 0.0)
    assert "K 4" in report


def test_few_visitors_are_remembered(handlers, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.VISITORS_REMEMBERED", 3)
    for session in "abcdea":
        handlers.preview(visitor(session), *preview_values())
    assert list(handlers._latest) == ["d", "e", "a"]


# conversions that look at a calibration text

CALIBRATED = {
    "refitted": {"keep": 12, "order": "least-squares", "compensation": "refit"},
    "faded": {"fade": 0.6, "fade_schedule": "uniform", "fade_score": "sparsegpt"},
    "by neurons": {"fade": 0.9, "fade_unit": "neuron", "fade_score": "wanda"},
    "shared out": {"keep": 9, "allocation": "sensitivity"},
    "layer by layer": {"keep": 6, "compensation": "mean", "progressive": True},
}


def direct(demo, spec):
    """The conversion as the library makes it."""
    return convert(demo.model, spec, Calibration.from_text(demo.tokenizer, calibration_stories()))


def at_the_end(steps) -> list:
    """What the page shows in the end: the last of each output that was not skipped."""
    shown = [SKIPPED] * 6
    for step in steps:
        shown = [old if new == SKIPPED else new for old, new in zip(shown, step, strict=True)]
    return shown


def test_the_tiny_model_s_calibration_is_of_full_length(demo):
    samples = Calibration.from_text(demo.tokenizer, calibration_stories()).samples
    assert samples.numel() == MAX_TOKENS


@pytest.mark.parametrize("change", CALIBRATED.values(), ids=CALIBRATED)
def test_a_calibrated_conversion_is_pending_and_then_measured(handlers, demo, visitor, change):
    spec = read_spec(controls(**change))
    preset, code, *_, perplexity, speed, nonzero, compute, histograms, heat = handlers.preview(
        visitor(), *preview_values(**change)
    )[2:]
    assert "Calibration.from_text" in code
    assert preset == (preset_name(spec) or CUSTOM)
    for card in (perplexity, speed, nonzero, compute):
        assert "measuring …" in card
    assert count(demo.report.nonzero) in nonzero
    assert count(demo.report.macs_per_token) in compute
    assert histograms == heat == SKIPPED  # those of before stay meanwhile

    steps = list(handlers.measure_if_quick(visitor(), *shown_values(**change)))
    expected = direct(demo, spec)
    assert any("calibrating" in step[2] for step in steps)
    perplexity, speed, nonzero, compute, histograms, heat = at_the_end(steps)
    assert "…" not in perplexity + speed + nonzero + compute
    report = parameter_report(expected)
    assert f">{count(report.nonzero)}<" in nonzero
    assert f">{count(report.macs_per_token)}<" in compute
    assert count(report.total) == count(demo.converted_report(demo.asked(spec)).total)
    text = (assets_folder() / "texts" / TEXTS["proxy"]).read_text(encoding="utf-8")
    found = demo.known_evaluation(demo.asked(spec), "proxy").converted
    measured = measure_perplexity(expected, demo.tokenizer, text)
    assert found.value == pytest.approx(measured.value, rel=1e-4)
    assert f">{number(measured.value)}<" in perplexity
    weights, made = expected.state_dict(), demo.converted(demo.asked(spec)).state_dict()
    assert weights.keys() == made.keys()
    assert all(torch.allclose(made[name], weights[name], atol=1e-5) for name in weights)
    assert len(heat.data[0].z[0]) == 16
    assert sum(trace.name == "stays" for trace in histograms.data) == 1

    again = handlers.preview(visitor(), *preview_values(**change))[6:]
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
    assert shown[4:] == (SKIPPED, SKIPPED)
    assert list(running) == []
    shown = at_the_end(handlers.measure(visitor(), *shown_values(**change)))
    assert "…" not in "".join(shown[:4])


def test_a_guest_model_calibrates_on_the_button(handlers, tiny_folder, visitor):
    """For all that is known it takes long."""
    list(handlers.load(str(tiny_folder), 16))
    change = CALIBRATED["faded"] | {"model": str(tiny_folder)}
    perplexity, speed, nonzero, compute, *plots = handlers.preview(
        visitor(), *preview_values(**change)
    )[6:]
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


def test_a_calibrated_model_writes(handlers, demo):
    change = CALIBRATED["refitted"]
    steps = list(handlers.write("demo", *controls(**change), "Hello", 24, 0.0))
    assert steps[0][:2] == (SKIPPED, SKIPPED)
    assert "calibrating" in steps[0][2]
    pair = (demo.model, direct(demo, read_spec(controls(**change))))
    *_, writings = write_side_by_side(pair, demo.tokenizer, "Hello", 24)
    assert steps[-1][:2] == tuple(writing.text.lstrip() for writing in writings)
    assert "down refitted · least-squares order" in steps[-1][2]


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
    fade, power = handlers.preview(visitor(), *preview_values(**change))[4:6]
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
    handlers.preview(visitor(), *preview_values(model=key, layer=1))
    handlers.lesson(key, *controls(fade=0.9, keep=12), 1)


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
    *_, (dense, converted, report) = handlers.write(
        "demo", *controls(branches=6, fade=0.9, keep=4), "Hello", 40, 0.0
    )
    pair = (demo.model, demo.converted(ConversionSpec(branches=6, fade=0.9, keep=4)))
    *_, writings = write_side_by_side(pair, demo.tokenizer, "Hello", 40)
    assert (dense, converted) == tuple(writing.text.lstrip() for writing in writings)
    assert "B 6 · fade 0.90 · K 4, × √(B/K)" in report


def test_writing_streams_and_stops_by_the_clock(handlers, notices, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.UPDATES_PER_SECOND", math.inf)
    monkeypatch.setattr("mlpmoe.explorer.handlers.WRITING_SECONDS", 0.0)
    steps = list(handlers.write("demo", *controls(), "Hello", 100, 0.0))
    assert len(steps) == 2
    assert "1 tokens" in steps[-1][2]
    assert notices[0][1].startswith("Stopped after")


def test_a_stopped_writer_leaves_the_weights(handlers, demo, weights_hash, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.handlers.UPDATES_PER_SECOND", math.inf)
    before = weights_hash(demo.model)
    writer = handlers.write("demo", *controls(fade=0.9, keep=8), "Hello", 100, 0.0)
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
        next(handlers.write("demo", *controls(), prompt, 8, 0.0))


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
