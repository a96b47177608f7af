"""Fair turns: what visitors have computed takes turns in small steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic

from ...core.stopping import may_stop, stoppable
from ...measure.runs.pace import about

TICK = 0.25  # seconds after which who waits may stop, and is told anew where they stand
SLICE = 0.5  # seconds of long work after which others have a turn
PATIENCE = 1.0  # seconds of waiting that are not worth a word
MEMORY = 16  # turns, about, whose length is what a turn usually takes

_visitor: ContextVar[Hashable] = ContextVar("visitor", default=None)
_tell: ContextVar[Callable[[Place | None], None] | None] = ContextVar("tell", default=None)
_held: ContextVar[tuple[_Turn, ...]] = ContextVar("held", default=())


class Place(str):
    """Where somebody stands who waits, as words. ahead: turns before theirs. seconds: until then,
    about; None while no turn has ended."""

    ahead: int
    seconds: float | None

    def __new__(cls, ahead: int, seconds: float | None) -> Place:
        long = "" if seconds is None else f", {about(seconds)}"
        place = super().__new__(cls, f"waiting, {ahead} before you{long}")
        place.ahead, place.seconds = ahead, seconds
        return place


@contextmanager
def visiting(visitor: Hashable) -> Iterator[None]:
    """Turns that are asked for inside are this visitor's; outside of it, each is somebody's own."""
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)


@contextmanager
def telling(tell: Callable[[Place | None], None]) -> Iterator[None]:
    """Whoever waits for a turn inside is told their place, again and again, and None when they
    have it."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


class Turns:
    """One at a time. Each visitor has one place in the line, however much they ask for, and goes
    to its end after a turn.

    A measurement asks anew for each window, so that ten visitors who measure all go on, and
    whoever comes next waits for one step and not for a whole measurement, nor for one of two
    hundred runs of a sweep. Who waits may stop.

    Inside a turn nobody may wait for what others make in turns: they could not go on.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._line: deque[Hashable] = deque()  # the first visitor has the turn
        self._asked: dict[Hashable, deque[_Turn]] = {}  # by each of them, the oldest first
        self._usual = 0.0  # seconds of a turn

    @property
    def taken(self) -> bool:
        """Whether anybody has a turn, or waits for one."""
        return bool(self._line)

    @contextmanager
    def turn(self, long: bool = False) -> Iterator[None]:
        """long: let others have their turns in between, at points where the work may stop."""
        if any(turn.of is self for turn in _held.get()):
            yield
            return
        visitor = _visitor.get()
        mine = _Turn(self, object() if visitor is None else visitor)
        self._take(mine)
        token = _held.set((*_held.get(), mine))
        try:
            if long:
                with stoppable(mine.give_way):
                    yield
            else:
                yield
        finally:
            _held.reset(token)
            self._leave(mine)

    def _take(self, mine: _Turn) -> None:
        with self._lock:
            if mine.visitor not in self._asked:
                self._asked[mine.visitor] = deque()
                self._line.append(mine.visitor)
            self._asked[mine.visitor].append(mine)
        try:
            self._wait(mine)
        except BaseException:
            self._leave(mine)
            raise
        mine.since = self.clock()

    def _wait(self, mine: _Turn) -> None:
        began, tell = self.clock(), _tell.get()
        told = False
        while True:
            with self._lock:
                if mine.ready.wait_for(lambda: self._has(mine), TICK):
                    break
                place = self._place(mine)
            may_stop()
            if tell and self.clock() - began > PATIENCE:
                told = True
                tell(place)
        if told:
            tell(None)

    def _leave(self, mine: _Turn) -> None:
        """At the end of a turn, or without having had one."""
        with self._lock:
            asked = self._asked.get(mine.visitor, ())
            if mine not in asked:
                return
            asked.remove(mine)
            if mine.since is not None:
                took = self.clock() - mine.since
                self._usual += (took - self._usual) / MEMORY if self._usual else took
                self._line.rotate(-1)
            if not asked:
                self._line.remove(mine.visitor)
                del self._asked[mine.visitor]
            mine.since = None
            if self._line:  # nobody else is woken: they would be in the way of who asks anew
                self._asked[self._line[0]][0].ready.notify()

    def _has(self, mine: _Turn) -> bool:
        return self._line[0] == mine.visitor and self._asked[mine.visitor][0] is mine

    def _place(self, mine: _Turn) -> Place:
        rounds = self._asked[mine.visitor].index(mine)
        ahead = self._line.index(mine.visitor) + rounds * len(self._line)
        return Place(ahead, ahead * self._usual if self._usual else None)

    def _is_wanted(self) -> bool:
        """Whether anybody waits."""
        with self._lock:
            return sum(map(len, self._asked.values())) > 1


class _Turn:
    """One that is waited for, or had."""

    def __init__(self, of: Turns, visitor: Hashable) -> None:
        self.of, self.visitor = of, visitor
        self.ready = threading.Condition(of._lock)  # told once it is the first
        self.thread = threading.get_ident()
        self.since: float | None = None  # when it began; None while it is waited for

    def give_way(self) -> None:
        """Let those who wait have their turns, if this one has lasted long enough."""
        if self.since is None or self.thread != threading.get_ident():
            return  # it waits already; or this is a part of the work, in a thread beside it
        if self.of.clock() - self.since > SLICE and self.of._is_wanted():
            self.of._leave(self)
            self.of._take(self)
