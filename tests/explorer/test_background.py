"""Work in a thread: what it says comes through, again where it is silent, and it can be ended."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from itertools import islice

import pytest

from mlpmoe.core.stopping import may_stop, stoppable
from mlpmoe.explorer.server import background as module
from mlpmoe.explorer.server import turns as turns_module
from mlpmoe.explorer.server.background import each_in_thread, in_thread
from mlpmoe.explorer.server.turns import Place
from tests.explorer.asking import SOON, AskedTurns, taken


def drained(steps) -> tuple[list[str], object]:
    """All that was said, and the result."""
    said = []
    while True:
        try:
            said.append(next(steps))
        except StopIteration as end:
            return said, end.value


def test_what_is_said_comes_once_and_then_the_result():
    def work(report):
        report("reading")
        for share in (0, 0.001, 0.5, 0.5):
            report("converting", share)
        return 7

    said, result = drained(in_thread(work))
    assert list(dict.fromkeys(said)) == ["reading", "converting (0%)", "converting (50%)"]
    assert result == 7


def test_silent_work_says_the_same_again(monkeypatch):
    """So that whoever reads it can end it meanwhile; before it says anything, too."""
    monkeypatch.setattr(module, "TICK", 1e-3)
    heard, go_on = threading.Event(), threading.Event()

    def work(report):
        assert heard.wait(SOON)
        report("reading")
        assert go_on.wait(SOON)

    steps = in_thread(work)
    assert set(islice(steps, 3)) == {"waiting"}
    heard.set()
    assert "reading" in islice(steps, 10**6)
    assert list(islice(steps, 3)) == ["reading"] * 3
    go_on.set()
    drained(steps)


@pytest.mark.parametrize("point", ["report", "may_stop"])
def test_closed_it_ends_at_the_next_point_and_leaves_no_thread(monkeypatch, point):
    monkeypatch.setattr(module, "TICK", 1e-3)
    threads, begun, after = threading.active_count(), threading.Event(), []

    def work(report):
        report("reading")
        begun.set()
        assert closing.wait(SOON)
        for _ in range(10**9):
            report("reading") if point == "report" else may_stop()
        after.append("not ended")

    closing = threading.Event()
    steps = in_thread(work)
    next(steps)
    assert begun.wait(SOON)
    closing.set()
    steps.close()
    assert after == []
    assert threading.active_count() == threads


def test_what_fails_comes_out():
    def work(report):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        drained(in_thread(work))


def test_work_that_waits_for_its_turn_says_its_place_and_then_what_it_said(monkeypatch):
    monkeypatch.setattr(turns_module, "TICK", 1e-3)
    monkeypatch.setattr(turns_module, "PATIENCE", 0.0)
    turns, go_on = AskedTurns(), threading.Event()

    def work(report):
        report("reading")
        with turns.turn():
            assert go_on.wait(SOON)
        return 7

    with taken(turns):
        steps = in_thread(work)
        while "before you" not in (said := next(steps)):
            assert said in ("waiting", "reading")
    while next(steps) != "reading":  # and no longer that it waits
        pass
    go_on.set()
    assert drained(steps)[1] == 7


def test_each_step_is_taken_in_a_thread_and_waiting_is_told_between(monkeypatch):
    monkeypatch.setattr(turns_module, "TICK", 1e-3)
    monkeypatch.setattr(turns_module, "PATIENCE", 0.0)
    turns, main = AskedTurns(), threading.get_ident()

    def work():
        for number in range(3):
            with turns.turn():
                assert threading.get_ident() != main
            yield number

    steps = each_in_thread(work())
    with taken(turns):
        place = next(steps)
        assert (place.ahead, place.seconds) == (1, None)
    assert [step for step in steps if not isinstance(step, Place)] == [0, 1, 2]


def test_what_may_stop_the_one_who_asks_stops_the_work(monkeypatch):
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise CancelledError

    def work(report):
        while True:
            may_stop()

    with pytest.raises(CancelledError), stoppable(check):
        drained(in_thread(work))
