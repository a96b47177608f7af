"""A limit of time that work heeds while it runs, and that is asked before it begins."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic


class TimeUp(Exception):
    """The time is up: what was under way is left."""


class Deadline:
    """So many seconds from now. clock: gives seconds."""

    def __init__(self, seconds: float = inf, clock: Callable[[], float] = monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 or less when they are over."""
        return self.end - self.clock()

    def check(self) -> None:
        """Raise TimeUp if it is; for `stoppable`."""
        if self.left <= 0:
            raise TimeUp

    def share(self, parts: int) -> Deadline:
        """An equal part of what is left, from now on."""
        return Deadline(self.left / parts, self.clock)
