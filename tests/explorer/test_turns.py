"""Fair turns: one at a time, in the order in which they were asked for, and a place for each."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from contextvars import copy_context
from threading import Thread
from time import sleep

import pytest

from mlpmoe.core.stopping import may_stop, stoppable
from mlpmoe.explorer.server import turns as module
from mlpmoe.explorer.server.turns import telling, visiting
from tests.explorer.asking import SOON, AskedTurns, started


@pytest.fixture
def turns() -> AskedTurns:
    return AskedTurns()


def test_turns_come_in_the_order_in_which_they_are_asked_for(turns):
    seen, threads = [], []
    with turns.turn():
        for number in range(5):

            def work(number=number):
                with turns.turn():
                    seen.append(number)

            threads.append(started(work))
            turns.await_askers(number + 2)
        assert seen == []
    for thread in threads:
        thread.join(SOON)
    assert seen == list(range(5))


def test_two_who_ask_again_and_again_alternate(turns):
    seen = []

    def work(name: str) -> None:
        for _ in range(4):
            with turns.turn():
                turns.await_askers(2)
                seen.append(name)
        turns.leave()

    first = started(lambda: work("a"))
    turns.await_askers(1)
    second = started(lambda: work("b"))
    first.join(SOON)
    second.join(SOON)
    assert "".join(seen) == "abababab"


def test_a_turn_that_fails_is_over(turns):
    with pytest.raises(ValueError), turns.turn():
        raise ValueError
    with turns.turn():
        pass


def test_who_waits_may_stop_and_the_others_go_on(turns):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    ended = []

    def wait() -> None:
        with pytest.raises(Stopped), stoppable(stop), turns.turn():
            ended.append("had a turn")
        ended.append("stopped")

    with turns.turn():
        started(wait).join(SOON)
        assert ended == ["stopped"]
    with turns.turn():
        pass


def asked_by(turns: AskedTurns, visitor: str, seen: list, waiting: int) -> Thread:
    """A thread that has one turn of a visitor; it waits once this returns."""

    def work() -> None:
        with visiting(visitor), turns.turn():
            seen.append(visitor)

    thread = started(work)
    turns.await_askers(waiting)
    return thread


def test_a_visitor_has_one_place_however_much_they_ask_for(turns):
    seen, threads = [], []
    with turns.turn():
        for number, visitor in enumerate("aaaabac", 2):
            threads.append(asked_by(turns, visitor, seen, number))
    for thread in threads:
        thread.join(SOON)
    assert "".join(seen) == "abcaaaa"
    assert not turns.taken


def test_who_stops_waiting_leaves_the_place_to_the_next_wish_of_the_same_visitor(turns):
    seen, stopped = [], threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise CancelledError

    def give_up() -> None:
        with suppress(CancelledError), visiting("a"), stoppable(check), turns.turn():
            seen.append("gave up")

    with turns.turn():
        first = started(give_up)
        turns.await_askers(2)
        others = [asked_by(turns, "b", seen, 3), asked_by(turns, "a", seen, 4)]
        stopped.set()
        first.join(SOON)
    for thread in others:
        thread.join(SOON)
    assert seen == ["a", "b"]


def test_long_work_lets_others_in_between_where_it_may_stop(turns, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 0.0)
    seen = []
    with visiting("long"), turns.turn(long=True):
        may_stop()  # nobody waits, so it goes on
        threads = [asked_by(turns, "a", seen, 2), asked_by(turns, "b", seen, 3)]
        assert seen == []
        may_stop()
        assert seen == ["a", "b"]
    for thread in threads:
        thread.join(SOON)
    assert not turns.taken


def test_short_work_is_never_interrupted_nor_a_thread_beside_long_work(turns, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 0.0)
    seen = []
    with turns.turn():
        thread = asked_by(turns, "a", seen, 2)
        may_stop()
        assert seen == []
    thread.join(SOON)
    with turns.turn(long=True):
        thread = asked_by(turns, "a", seen, 2)
        beside = threading.Thread(target=copy_context().run, args=(may_stop,))
        beside.start()
        beside.join(SOON)
        assert seen == ["a"]
    thread.join(SOON)
    assert seen == ["a", "a"]


def test_long_work_that_is_stopped_while_it_gives_way_is_over(turns, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 0.0)
    monkeypatch.setattr(module, "TICK", 1e-3)
    stopped, go_on = threading.Event(), threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise CancelledError

    def other() -> None:
        with turns.turn():
            stopped.set()
            assert go_on.wait(SOON)

    with pytest.raises(CancelledError), stoppable(check), turns.turn(long=True):
        thread = started(other)
        turns.await_askers(2)
        may_stop()
        raise AssertionError("not stopped")
    assert turns.taken  # by the other one
    go_on.set()
    thread.join(SOON)
    assert not turns.taken


def test_a_turn_within_a_turn_is_the_same(turns):
    with turns.turn(), turns.turn(long=True):
        assert turns.taken
    assert not turns.taken


def test_who_waits_is_told_their_place_and_about_how_long(monkeypatch):
    monkeypatch.setattr(module, "TICK", 1e-3)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    now = [0.0]
    turns, told, heard = AskedTurns(lambda: now[0]), [], threading.Event()
    with turns.turn():
        now[0] += 3.0  # so long takes a turn

    def tell(place) -> None:
        told.append(place)
        heard.set()

    def wait() -> None:
        with telling(tell), visiting("last"), turns.turn():
            pass

    with turns.turn():
        thread = asked_by(turns, "a", [], 2)
        last = started(wait)
        turns.await_askers(3)
        now[0] += 1.0
        assert heard.wait(SOON)
    thread.join(SOON)
    last.join(SOON)
    assert (told[0].ahead, told[0].seconds) == (2, 6.0)
    assert told[0] == "waiting, 2 before you, about 6 s"
    assert told[-1] is None  # it has its turn


def test_twenty_threads_of_five_visitors_share_alike_and_one_at_a_time(turns):
    """Whoever asks for four things at once gets no more than who asks for one."""
    inside, most, order = [], [], []
    enough = threading.Event()

    def work(visitor: int) -> None:
        with visiting(visitor):
            while not enough.is_set():
                with turns.turn():
                    inside.append(1)
                    most.append(len(inside))
                    order.append(visitor)
                    sleep(1e-3)
                    inside.pop()

    wishes = [0] * 16 + [1, 2, 3, 4]
    with turns.turn():
        threads = [started(lambda visitor=visitor: work(visitor)) for visitor in wishes]
        turns.await_askers(1 + len(wishes))
    sleep(0.3)
    enough.set()
    for thread in threads:
        thread.join(SOON)
    assert max(most) == 1
    counted = order[: len(order) - 20]
    share = counted.count(0) / len(counted)  # a fifth
    assert 0.15 < share < 0.3, share
