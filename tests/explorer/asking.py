"""Turns whose order tests decide: without sleeping, and without luck."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mlpmoe.explorer.server.turns import Turns

SOON = 30  # seconds after which a test that hangs fails


class AskedTurns(Turns):
    """Turns that one can watch."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = _Queue()

    def await_askers(self, count: int) -> None:
        """Until so many have a turn or wait for one, or somebody left."""
        self._waiting.await_length(count)

    def leave(self) -> None:
        """Nobody waits any more for one who asks no more."""
        self._waiting.leave()


class _Queue(list):
    """A list whose length one can wait for, with what a deque is used for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._left = False

    def append(self, item: object) -> None:
        with self._changed:
            super().append(item)
            self._changed.notify_all()

    def popleft(self) -> object:
        return self.pop(0)

    def leave(self) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def await_length(self, count: int) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: len(self) >= count or self._left, SOON)
        assert found, "nobody asked for a turn"


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
