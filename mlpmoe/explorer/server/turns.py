"""Fair turns: what visitors have computed takes turns in small steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...core.stopping import may_stop
from .background import TICK


class Turns:
    """One at a time, in the order in which they ask.

    A measurement asks anew for each window, so that ten visitors who measure all go on, and
    whoever comes next waits for one step and not for a whole measurement. Who waits may stop.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def taken(self) -> bool:
        """Whether anybody has a turn, or waits for one."""
        return bool(self._waiting)

    @contextmanager
    def turn(self, waiting: Callable[[int], None] = lambda ahead: None) -> Iterator[None]:
        """waiting: told again and again how many are before."""
        mine = object()
        with self._free:
            self._waiting.append(mine)
            try:
                while not self._free.wait_for(lambda: self._waiting[0] is mine, TICK):
                    may_stop()
                    waiting(self._waiting.index(mine))
            except BaseException:
                self._waiting.remove(mine)
                self._free.notify_all()
                raise
        try:
            yield
        finally:
            with self._free:
                self._waiting.popleft()
                self._free.notify_all()
