"""A limit of time makes a course of fewer steps, that of another spec; and it is kept. The clock is
the test's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, recovery_of, spec_of
from mlpmoe.core.errors import UserError
from mlpmoe.core.recovery import course as courses
from mlpmoe.core.spec import ConversionSpec
from tests.families import VOCABULARY, build

SPEC = ConversionSpec(branches=4, keep=2, recover="all", recover_steps=40)
STEP, LOOK = 2.0, 0.5  # seconds


class Clock:
    """Tells the time to a course, whose steps and looks take so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step = 1000.0, STEP
        divergence = courses.Course._divergence

        def timed(course, ids, step=None):
            self.now += self.step if torch.is_grad_enabled() else LOOK
            return divergence(course, ids, step)

        monkeypatch.setattr(courses.Course, "_divergence", timed)
        monkeypatch.setattr(courses, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    return Calibration(torch.randint(2, VOCABULARY, (40, 32), generator=generator))


@pytest.fixture(scope="module")
def dense():
    return build("llama")


def assert_same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_room_for_all_steps_changes_nothing(dense, text, clock):
    plain, limited = convert(dense, SPEC, text), convert(dense, SPEC, text, recover_seconds=200)
    assert_same(plain, limited)
    mine, theirs = recovery_of(plain), recovery_of(limited)
    assert replace(mine, seconds=0) == replace(theirs, seconds=0)
    assert not theirs.limited and spec_of(limited) == SPEC and "limit" not in str(theirs)


def test_the_result_is_that_of_a_spec_with_as_many_steps_as_fit(dense, text, clock):
    seconds = 50
    started = clock.now
    limited = convert(dense, SPEC, text, recover_seconds=seconds)
    report = recovery_of(limited)
    # nine tenths of it, without a first look, the step that is tried and eight more looks
    steps = int((0.9 * seconds - LOOK - STEP - 8 * LOOK) / STEP)
    assert (report.steps, report.planned, report.asked) == (steps, steps, 40)
    assert clock.now - started <= 0.9 * seconds and report.seconds == clock.now - started
    assert report.limited and report.stopped is None
    assert f"{steps} steps (of 40, what the time limit had room for)" in str(report)
    made = spec_of(limited)
    assert made == replace(SPEC, recover_steps=steps)
    again = convert(dense, made, text)
    assert_same(limited, again)
    assert report.looks == recovery_of(again).looks


def test_where_few_steps_fit_each_is_looked_at(dense, text, clock):
    started = clock.now
    report = recovery_of(convert(dense, SPEC, text, recover_seconds=14))
    assert report.planned == int((0.9 * 14 - LOOK - STEP) / (STEP + LOOK)) == 4
    assert [look.step for look in report.looks] == [0, 1, 2, 3, 4]
    assert clock.now - started <= 14


def test_steps_that_get_slower_are_cut_short(dense, text, clock, monkeypatch):
    train = courses.Course._train

    def slower(course):
        clock.step = 5 * STEP if course.step >= 7 else STEP
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", slower)
    started, seconds = clock.now, 50
    model = convert(dense, SPEC, text, recover_seconds=seconds)
    report = recovery_of(model)
    assert report.cut_short and report.stopped == (
        f"the time limit of 50 s ended it at step {report.steps}."
    )
    assert report.steps < report.planned == 19
    assert clock.now - started <= seconds + 5 * STEP  # the step that was under way
    assert report.looks[-1].step == report.steps  # what was trained last counts, too
    assert report.after == min(look.held_out for look in report.looks) < report.before
    assert report.stopped in str(report)


@pytest.mark.parametrize("seconds", [0, 1, 4])
def test_a_limit_without_room_for_a_step_is_refused(dense, text, clock, seconds):
    # a first look, the step that is tried, one that counts and its look, in nine tenths of it
    needed = round((2 * LOOK + 2 * STEP) / 0.9)
    with pytest.raises(UserError, match=f"of {seconds} s is too short.* about {needed} s here"):
        convert(dense, SPEC, text, recover_seconds=seconds)
    assert recovery_of(convert(dense, SPEC, text, recover_seconds=needed)).planned == 1


@pytest.mark.parametrize("seconds", [-1, float("nan"), True, "a minute"])
def test_a_limit_is_a_number_of_seconds(dense, text, seconds):
    with pytest.raises(UserError, match="time limit of training must be a number"):
        convert(dense, SPEC, text, recover_seconds=seconds)


class Stopped(Exception):
    pass


def test_who_goes_on_has_the_same_steps_and_what_is_left_of_the_time(dense, text, clock, tmp_path):
    def stop(message, share):
        if "step 11 of" in message:
            raise Stopped

    limited = {"recover_seconds": 50, "state": tmp_path}
    with pytest.raises(Stopped):
        convert(dense, SPEC, text, on_progress=stop, **limited)
    for other in (None, 49):  # their rates fall otherwise
        again = convert(dense, SPEC, text, state=tmp_path, recover_seconds=other)
        assert recovery_of(again).planned != 19
    clock.now += 1e6  # between the two
    model = convert(dense, SPEC, text, **limited)
    report = recovery_of(model)
    assert report.steps == report.planned == 19 and 40 < report.seconds <= 50
    assert_same(model, convert(dense, replace(SPEC, recover_steps=19), text))
