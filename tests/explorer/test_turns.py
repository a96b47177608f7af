"""Fair turns: one at a time, in the order in which they were asked for."""

from __future__ import annotations

import pytest

from mlpmoe.core.stopping import stoppable
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
