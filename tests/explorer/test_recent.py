"""What is shared by threads: made once, and nobody waits who asks for something else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlpmoe.explorer.server.recent import Recent
from tests.explorer.asking import SOON


def test_what_was_used_longest_ago_makes_room():
    recent = Recent(2)
    made = []

    def get(key):
        return recent.get_or_make(key, lambda: made.append(key) or key)

    for key in "abacab":
        assert get(key) == key
    assert made == ["a", "b", "c", "b"]
    assert len(recent) == 2


def test_two_who_ask_for_one_key_get_what_was_made_once():
    recent, made = Recent(4), []
    begun, go_on = threading.Event(), threading.Event()

    def make():
        begun.set()
        assert go_on.wait(SOON)
        made.append(object())
        return made[-1]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(recent.get_or_make, "key", make)
        assert begun.wait(SOON)
        second = pool.submit(recent.get_or_make, "key", make)
        go_on.set()
        assert first.result(SOON) is second.result(SOON) is made[0]
    assert len(made) == 1


def test_making_one_key_holds_up_no_other():
    recent = Recent(4)
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(SOON)
        return "slow"

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(recent.get_or_make, "slow", slow)
        assert begun.wait(SOON)
        assert recent.get_or_make("quick", lambda: "quick") == "quick"
        recent.put("known", 1)
        assert recent.get_or_make("known", pytest.fail) == 1
        assert not waiting.done()
        go_on.set()
        assert waiting.result(SOON) == "slow"


def test_what_fails_is_tried_again():
    recent = Recent(4)

    def fails():
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):
            recent.get_or_make("key", fails)
    assert recent.get_or_make("key", lambda: 5) == 5


def test_making_may_ask_for_what_is_made():
    recent = Recent(4)
    assert recent.get_or_make("a", lambda: recent.get_or_make("b", lambda: 1) + 1) == 2


def test_what_takes_too_many_bytes_makes_room():
    recent = Recent(100, most_bytes=10, bytes_of=len)
    for name in ("aaaa", "bbbb", "cc"):
        recent.put(name, name)
    assert list(recent) == ["aaaa", "bbbb", "cc"]
    recent.get_or_make("aaaa", lambda: "")  # used again
    recent.put("d", "d")
    assert list(recent) == ["cc", "aaaa", "d"]
    recent.put("large", "x" * 50)  # the newest stays in any case
    assert list(recent) == ["large"]
