"""Turns whose order tests decide: without luck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep

from mlpmoe.explorer.server.turns import Turns

SOON = 30  # seconds after which a test that hangs fails


class AskedTurns(Turns):
    """Turns that one can watch."""

    _left = False

    def await_askers(self, count: int) -> None:
        """Until so many have a turn or wait for one, or somebody left."""
        until = monotonic() + SOON
        while not (self._left or self._count() >= count):
            assert monotonic() < until, "nobody asked for a turn"
            sleep(1e-3)

    def leave(self) -> None:
        """Nobody waits any more for one who asks no more."""
        self._left = True

    def _count(self) -> int:
        with self._lock:
            return sum(map(len, self._asked.values()))


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextmanager
def taken(turns: Turns) -> Iterator[None]:
    """Somebody else has the turn."""
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        with turns.turn():
            begun.set()
            over.wait(SOON)

    thread = started(work)
    assert begun.wait(SOON)
    try:
        yield
    finally:
        over.set()
        thread.join(SOON)
