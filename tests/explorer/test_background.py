"""Work in a thread: what it says comes through, again where it is silent, and it can be ended."""

from __future__ import annotations

import threading
from itertools import islice

import pytest

from mlpmoe.core.stopping import may_stop
from mlpmoe.explorer.server import background as module
from mlpmoe.explorer.server.background import in_thread
from tests.explorer.asking import SOON


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
