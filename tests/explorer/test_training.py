"""The section "Train a little": asked for by the controls, begun by the button, and its curve."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from urllib.parse import parse_qsl

import gradio as gr
import pytest

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, recovery_of
from mlpmoe.core.errors import UserError
from mlpmoe.core.recovery import course as courses
from mlpmoe.core.recovery import recover as recovering
from mlpmoe.core.recovery import student as students
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.explorer.api import add_endpoints
from mlpmoe.explorer.plots.training_plot import training_plot
from mlpmoe.explorer.server import loaded as loading
from mlpmoe.explorer.server.events import readable
from mlpmoe.explorer.server.workbench import Workbench
from mlpmoe.explorer.shell.handlers import TO_TRAIN, Handlers
from mlpmoe.explorer.shell.links import Link
from mlpmoe.explorer.shell.opening import OpeningHandlers
from mlpmoe.explorer.shell.settings import check_shown, read_asked, read_spec, show_spec
from mlpmoe.explorer.shell.training import Linked, TrainingHandlers
from tests.explorer.controls import (
    Measured,
    Previewed,
    chosen,
    controls,
    opened_link,
    preview_values,
    settings,
    shown_values,
)

ASKED = {"keep": 8, "recover": "lora", "recover_steps": 4}
SPEC = ConversionSpec(keep=8, recover="lora", recover_steps=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recovery"


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
    note, says, curve = training.show("demo", *settings(**ASKED), None)
    assert "4 steps take about " in note and note in says and curve == gr.update(visible=False)
    *steps, last = handlers.measure(somebody, *shown_values(**ASKED))
    assert any("training lora, step" in Measured(*step).perplexity for step in steps)
    assert json.loads(last[-1])[0]["run"]["spec"].endswith("recover=lora&recover_steps=4")
    report = demo.recovery(read_asked(demo, settings(**ASKED)))
    assert report.steps == 4
    _, note, curve = training.show("demo", *settings(**ASKED), None)
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
    assert training.show("demo", *settings(keep=8), None) == ("", "", gr.update(visible=False))
    note, *_ = training.show("demo", *settings(recover="all"), None)
    assert "Nothing is lost yet" in note


def test_a_link_to_a_result_says_whether_it_is_the_same(handlers, training, visitor, demo):
    list(handlers.measure(visitor(), *shown_values(**ASKED)))
    asked = read_asked(demo, settings(**ASKED))
    result = demo.recovery(asked).result
    query = Link("demo", SPEC, result=result).to_query()
    opening = OpeningHandlers(training.workbench)
    *_, last = opening.open_link(visitor(**dict(parse_qsl(query))))
    linked = opened_link(last).linked
    assert linked == Linked(asked, result)
    _, says, _ = training.show("demo", *settings(**ASKED), linked)
    assert f'data-result="{result}"' in says and "the same as in the link" in says
    other = replace(linked, result="0123456789ab")
    _, says, _ = training.show("demo", *settings(**ASKED), other)
    assert "in the link it is 0123456789ab" in says
    # what the visitor asks for instead is not what the link was about
    changed = ASKED | {"recover": "down"}
    list(handlers.measure(visitor("b"), *shown_values(**changed)))
    _, says, _ = training.show("demo", *settings(**changed), other)
    assert "data-result" in says and "link" not in says


def traces(figure):
    return {trace.name: trace for trace in figure.data}


def test_the_curve_stands_between_untrained_and_dense(demo):
    text = Calibration.from_text(demo.tokenizer, demo.texts.read_calibration("stories"))
    report = recovery_of(convert(demo.model, SPEC, text))
    found = traces(training_plot(report))
    assert found["held out"].x == (0, 1, 2, 3, 4)
    assert found["held out"].y == tuple(look.held_out for look in report.looks)
    assert found["untrained"].y == (report.before,) * 2 and found["dense"].y == (0, 0)
    assert (found["best"].x, found["best"].y) == ((report.best,), (report.after,))
    assert found["trained on"].x == (0.5, 1.5, 2.5, 3.5)  # the mean between two looks
    assert found["trained on"].y == tuple(look.train for look in report.looks[1:])
    words = [note.text for note in training_plot(report).layout.annotations]
    assert words == ["before training", "0: as the dense model"]


def test_the_curve_grows_on_axes_that_stay(handlers, visitor, demo):
    steps = [
        Measured(*step)
        for step in handlers.measure(visitor(), *shown_values(**ASKED | {"recover_steps": 16}))
    ]
    told = [s for s in steps if s.training_curve != gr.skip()]
    figures = [s.training_curve["value"] for s in told]
    lengths = [len(traces(figure)["held out"].x) for figure in figures]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] == 9
    assert lengths.count(9) <= 2  # at the last look, and when it was done
    assert len(lengths) < len(steps)  # nothing is drawn again for nothing
    axes = [(f.layout.xaxis.range, f.layout.yaxis.range) for f in figures]
    assert len(set(axes)) == 1 and axes[0][0][1] >= 16
    assert any("last looked at after step " in s.training_says for s in told[:-1])
    assert "before, " in told[-1].training_says and " after 16 steps" in told[-1].training_says
    report = demo.recovery(read_asked(demo, settings(**ASKED | {"recover_steps": 16})))
    assert figures[-1] == training_plot(report)
    assert all(s.training_says == gr.skip() for s in steps if s.training_curve == gr.skip())


def test_the_sentence_says_that_it_was_trained(handlers, visitor, monkeypatch):
    somebody = visitor()
    shown = Previewed(*handlers.preview(somebody, *preview_values(**ASKED)))
    assert "then trained for 4 steps: not measured yet" in shown.sentence
    *_, last = handlers.measure(somebody, *shown_values(**ASKED))
    assert ", then trained for 4 steps on " in Measured(*last).sentence
    assert (
        "trained"
        not in Previewed(*handlers.preview(somebody, *preview_values(keep=8))).sentence.split(
            "Best"
        )[0]
    )


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
    begun, go_on, train = threading.Event(), threading.Event(), courses.Course._train

    def slowly(course):
        begun.set()
        assert go_on.wait(30)
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", slowly)
    worker = threading.Thread(target=lambda: list(demo.convert(first)))
    worker.start()
    assert begun.wait(30)
    waiting = demo.convert(second)
    assert any("waiting, 1 before you" in next(waiting) for _ in range(20))
    go_on.set()
    messages = list(waiting)
    assert any("training all" in message for message in messages)
    worker.join(30)
    assert demo.recovery(first).what == "lora" and demo.recovery(second).what == "all"
    assert not loading._training.taken


def test_a_visitor_who_goes_ends_it(demo):
    asked = read_asked(demo, settings(**ASKED | {"recover_steps": 1000}))
    steps = demo.convert(asked)
    while "training lora, step" not in next(steps):
        pass
    steps.close()
    assert demo.is_to_train(asked) and demo.recovery(asked) is None
    assert not loading._training.taken


def stopped_at(handlers, request, step, **change):
    """Measure until training is at this step, then press Stop; what the page shows at last."""
    going = handlers.measure(request, *shown_values(**change))
    while f"step {step} of" not in Measured(*next(going)).perplexity:
        pass
    handlers.stop_measuring(request, *shown_values(**change))
    assert list(going) == []
    return Measured(*handlers.stop_measuring(request, *shown_values(**change)))


def slowly(monkeypatch):
    """Each step waits until the page has said so; the list gets the numbers of the steps."""
    taken, train = [], courses.Course._train

    def step(course):
        taken.append(course.step)
        time.sleep(0.05)
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", step)
    return taken


@pytest.mark.parametrize("restarted", [False, True])
def test_after_a_stop_it_goes_on(handlers, visitor, demo, training, cache, monkeypatch, restarted):
    """What a visitor stops is kept, also over a restart of the server, and for whoever asks for
    the same."""
    change = ASKED | {"recover_steps": 30}
    asked = read_asked(demo, settings(**change))
    taken = slowly(monkeypatch)
    stopped = stopped_at(handlers, visitor(), 9, **change)
    assert "Stopped, last looked at after step 8 of 30." in stopped.training_says
    assert len(traces(stopped.training_curve["value"])["held out"].x) == 3
    assert training.show("demo", *settings(**change), None)[1] == stopped.training_says
    done = max(taken)
    assert done >= 9 and len(list(cache.glob("*"))) == 1
    taken.clear()
    if restarted:
        bench = Workbench()
        handlers, demo = Handlers(bench), bench.loaded("demo")
    *steps, _ = handlers.measure(visitor("b"), *shown_values(**change))
    assert taken[0] in (done, done + 1) and taken == list(range(taken[0], 30))
    first = next(s for s in map(Measured._make, steps) if s.training_curve != gr.skip())
    assert len(traces(first.training_curve["value"])["held out"].x) >= 3  # those of before, too
    text = Calibration.from_text(demo.tokenizer, demo.texts.read_calibration("stories"))
    whole = recovery_of(convert(demo.model, replace(SPEC, recover_steps=30), text))
    assert demo.recovery(asked).looks == whole.looks
    assert not list(cache.glob("*"))


def test_a_host_has_a_limit(handlers, visitor, demo, training, monkeypatch):
    monkeypatch.setenv("MLPMOE_TRAINING_MINUTES", "2")
    change = ASKED | {"recover_steps": 40}
    monkeypatch.setattr(type(demo), "tokens_per_second", property(lambda self: 4 * 512 * 40 / 300))
    note, *_ = training.show("demo", *settings(**change), None)
    assert "This server trains for 2 min at most: about " in note
    assert int(note.split("about ")[-1].split()[0]) in range(8, 15)  # 108 of 300 s and more
    asked, seconds = read_asked(demo, settings(**change)), []
    monkeypatch.setattr(
        courses.Course, "_plan", lambda c: seconds.append(c.seconds) or setattr(c, "steps", 3)
    )
    *_, last = handlers.measure(visitor(), *shown_values(**change))
    assert seconds == [120.0]
    last = Measured(*last)
    # the run is that of what was done, and so whoever restores it gets it again
    assert json.loads(last.new)[0]["run"]["spec"].endswith("recover=lora&recover_steps=3")
    assert "then trained for 3 steps" in last.sentence
    _, note, _ = training.show("demo", *settings(**change), None)
    assert "after 3 of 40 steps, what this server has time for," in note
    fewer = read_asked(demo, settings(**change | {"recover_steps": 3}))
    assert demo.is_converted(fewer) and demo.converted(fewer) is demo.converted(asked)
    monkeypatch.undo()


def test_what_the_limit_cut_short_is_shown_and_not_kept(handlers, visitor, training, monkeypatch):
    monkeypatch.setenv("MLPMOE_TRAINING_MINUTES", "2")
    monkeypatch.setattr(courses.Course, "_plan", lambda course: None)
    monkeypatch.setattr(courses.Course, "_is_late", lambda course: course.step == 2)
    *_, last = handlers.measure(visitor(), *shown_values(**ASKED))
    assert Measured(*last).new == gr.skip() and "…" not in Measured(*last).perplexity
    _, note, curve = training.show("demo", *settings(**ASKED), None)
    assert "Stopped: the time limit of 120 s ended it at step 2. No settings give such" in note
    assert curve["visible"]


# what goes wrong is a sentence on the page


def refusal(handlers, visitor, **change) -> str:
    with pytest.raises(gr.Error) as caught:
        list(readable(handlers.measure)(visitor(), *shown_values(**ASKED | change)))
    return caught.value.message


def test_a_calibration_text_is_needed_and_a_long_one(handlers, visitor, workbench):
    with pytest.raises(UserError, match="there is no text: paste some"):
        workbench.texts.add("  ")
    gone = "own-0123456789ab"
    assert "not on the server (any more)" in refusal(handlers, visitor, calibration=gone)
    short = workbench.texts.add("A heron stood in the reeds, and nobody had told the frogs. " * 8)
    said = refusal(handlers, visitor, calibration=short)
    assert said.startswith("The calibration text has ") and "at least 1,024 are needed" in said


def test_too_little_memory_is_said_with_both_numbers(handlers, visitor, monkeypatch):
    began = slowly(monkeypatch)
    monkeypatch.setattr(recovering, "available_memory", lambda device: 60_000_000)
    said = refusal(handlers, visitor)
    assert said.startswith("Training gate, up and down by LoRA needs about 0.1 GB beside the")
    assert "0.1 GB are free" in said and not began
    shown = Measured(*handlers.measuring_failed(*shown_values(**ASKED)))
    assert "press Measure again" in shown.perplexity
    assert not loading._training.taken


def test_a_limit_without_room_for_a_step_is_said(handlers, visitor, monkeypatch):
    monkeypatch.setenv("MLPMOE_TRAINING_MINUTES", "0.0001")
    assert "is too short for a step of training" in refusal(handlers, visitor)


def test_a_loss_that_is_not_finite_is_said(handlers, visitor, demo, training, monkeypatch):
    forward, train = students.Student.forward, courses.Course._train

    def poisoned(course):
        if course.step == 2:
            monkeypatch.setattr(
                students.Student, "forward", lambda *given: forward(*given) * float("nan")
            )
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", poisoned)
    *_, last = handlers.measure(visitor(), *shown_values(**ASKED))
    _, note, curve = training.show("demo", *settings(**ASKED), None)
    assert "The weights of step " in note or " after 2 steps " in note
    assert "Stopped: the loss is not finite at step 3." in note
    assert all(y == y for y in traces(curve["value"])["held out"].y)
    assert "then trained for 2 steps" in Measured(*last).sentence


def test_what_won_nothing_is_said(handlers, visitor, monkeypatch):
    """At a rate that ruins the model, it is what it was."""
    train = courses.Course._train

    def ruining(course):
        course.rate = 30.0
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", ruining)
    *_, last = handlers.measure(visitor(), *shown_values(**ASKED))
    assert ", trained for 4 steps on calibration stories in vain: " in Measured(*last).sentence
