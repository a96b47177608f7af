"""The section "Train a little": asked for by the controls, begun by the button, shown when done."""

from __future__ import annotations

import json
import threading

import gradio as gr
import pytest

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, recovery_of
from mlpmoe.core.errors import UserError
from mlpmoe.core.recovery import recover as recovering
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.explorer.api import add_endpoints
from mlpmoe.explorer.plots.training_plot import training_plot
from mlpmoe.explorer.server import loaded as loading
from mlpmoe.explorer.shell.handlers import TO_TRAIN
from mlpmoe.explorer.shell.settings import check_shown, read_asked, read_spec, show_spec
from mlpmoe.explorer.shell.training import TrainingHandlers
from tests.explorer.controls import (
    Measured,
    Previewed,
    chosen,
    controls,
    preview_values,
    settings,
    shown_values,
)

ASKED = {"keep": 8, "recover": "lora", "recover_steps": 4}
SPEC = ConversionSpec(keep=8, recover="lora", recover_steps=4)


@pytest.fixture
def training(workbench):
    return TrainingHandlers(workbench)


def test_the_controls_make_the_spec_and_show_it_again(tiny):
    assert read_spec(controls(**ASKED)) == SPEC
    assert read_spec(chosen(show_spec(SPEC, tiny))) == SPEC
    routed = ConversionSpec(method="random", active=0.5, recover="router", recover_steps=7)
    assert read_spec(chosen(show_spec(routed, tiny))) == routed
    masks = ConversionSpec(method="tokenclusters", active=0.5, experts=4, recover="masks")
    assert read_spec(chosen(show_spec(masks, tiny))) == masks
    assert read_spec(controls(recover="all")) == ConversionSpec()  # nothing is lost
    with pytest.raises(UserError, match="at most 1,000 steps"):
        check_shown(ConversionSpec(keep=8, recover="all", recover_steps=1001))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "cmoe", "recover": "alpha"}, "Only branches have an α"),
        ({"keep": 8, "recover": "router"}, "has no router"),
        ({"method": "cmoe", "recover": "masks"}, "Only experts that overlap have masks"),
        ({"method": "cmoe", "selection": "threshold", "recover": "router"}, "more experts"),
    ],
)
def test_what_does_not_fit_the_method_is_left_out_and_said(
    handlers, visitor, notices, change, words
):
    somebody = visitor()
    handlers.preview(somebody, *preview_values())
    shown = Previewed(*handlers.preview(somebody, *preview_values(**change)))
    assert shown.recover == "none" and "recover" not in shown.query
    assert any(words in notice and "Nothing is trained." in notice for _, notice in notices)


def test_only_the_button_begins_it(handlers, visitor, demo, training):
    """What moves by itself trains nothing; the address and the snippet say it all the same."""
    somebody = visitor()
    shown = Previewed(*handlers.preview(somebody, *preview_values(**ASKED)))
    assert TO_TRAIN in shown.perplexity
    assert "recover=lora&recover_steps=4" in shown.query and "recover='lora'" in shown.code
    assert list(handlers.measure_live(somebody, *shown_values(**ASKED))) == []
    note, curve = training.show("demo", *settings(**ASKED))
    assert "4 steps take about " in note and curve == gr.update(visible=False)
    *steps, last = handlers.measure(somebody, *shown_values(**ASKED))
    assert any("training lora, step" in Measured(*step).perplexity for step in steps)
    assert json.loads(last[-1])[0]["run"]["spec"].endswith("recover=lora&recover_steps=4")
    report = demo.recovery(read_asked(demo, settings(**ASKED)))
    assert report.steps == 4
    note, curve = training.show("demo", *settings(**ASKED))
    assert f"{report.before:.3g} before, {report.after:.3g} after 4 steps" in note
    assert curve["visible"] and curve["value"] == training_plot(report)
    # once trained, it is measured by itself like any other
    other = visitor("b")
    handlers.preview(other, *preview_values(**ASKED))
    assert list(handlers.measure_live(other, *shown_values(**ASKED)))


def test_the_result_is_that_of_the_library(handlers, visitor, demo):
    list(handlers.measure(visitor(), *shown_values(**ASKED)))
    asked = read_asked(demo, settings(**ASKED))
    text = Calibration.from_text(demo.tokenizer, demo.texts.read_calibration("stories"))
    expected = recovery_of(convert(demo.model, SPEC, text))
    assert demo.recovery(asked).looks == expected.looks


def test_without_a_choice_nothing_is_said(training):
    assert training.show("demo", *settings(keep=8)) == ("", gr.update(visible=False))
    note, _ = training.show("demo", *settings(recover="all"))
    assert "Nothing is lost yet" in note


def test_the_curve_stands_between_untrained_and_dense(demo):
    text = Calibration.from_text(demo.tokenizer, demo.texts.read_calibration("stories"))
    report = recovery_of(convert(demo.model, SPEC, text))
    trained, untrained, dense = training_plot(report).data
    assert trained.x == (0, 1, 2, 3, 4) or trained.x == tuple(look.step for look in report.looks)
    assert trained.y[0] == report.before and untrained.y == (report.before,) * 2
    assert dense.y == (0, 0)


def test_programs_get_what_was_trained_and_begin_nothing(workbench, demo):
    with gr.Blocks() as page:
        add_endpoints(workbench)
    preview = next(fn.fn for fn in page.fns.values() if fn.api_name == "preview")
    more = {"recover": "lora", "recover_steps": 4}
    with pytest.raises(gr.Error, match="begin no training"):
        preview("demo", 16, 0.0, 8, "sqrt", more)
    list(demo.convert(read_asked(demo, settings(**ASKED))))
    assert preview("demo", 16, 0.0, 8, "sqrt", more)


def test_a_second_visitor_waits_and_sees_the_place(demo, monkeypatch):
    first, second = (
        read_asked(demo, settings(**ASKED | {"recover": what})) for what in ("lora", "all")
    )
    begun, go_on, train = threading.Event(), threading.Event(), recovering._Course._train

    def slowly(course):
        begun.set()
        assert go_on.wait(30)
        return train(course)

    monkeypatch.setattr(recovering._Course, "_train", slowly)
    worker = threading.Thread(target=lambda: list(demo.convert(first)))
    worker.start()
    assert begun.wait(30)
    waiting = demo.convert(second)
    assert any("1 to be trained before" in next(waiting) for _ in range(20))
    go_on.set()
    messages = list(waiting)
    assert any("training all" in message for message in messages)
    worker.join(30)
    assert demo.recovery(first).what == "lora" and demo.recovery(second).what == "all"
    assert not loading._training._waiting


def test_a_visitor_who_goes_ends_it(demo):
    asked = read_asked(demo, settings(**ASKED | {"recover_steps": 1000}))
    steps = demo.convert(asked)
    while "training lora, step" not in next(steps):
        pass
    steps.close()
    assert demo.is_to_train(asked) and demo.recovery(asked) is None
    assert not loading._training._waiting
