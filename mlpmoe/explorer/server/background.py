"""Work in a thread that says what it does, for handlers that stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextvars import copy_context
from queue import Empty, Queue
from typing import TypeVar

from ...core.stopping import stoppable
from .turns import Place, telling

T = TypeVar("T")

TICK = 0.25  # seconds after which what was said last is said again, so that its reader may stop


def in_thread(work: Callable[[Callable[[str, float | None], None]], T]) -> Generator[str, None, T]:
    """Run `work(report)` in a thread, yielding what it reports, and return its result.

    A report that says the same as the one before is passed over; when nothing new is said for a
    TICK, the last one comes again. While the work waits for its turn, its `Place` is said instead.
    Closing the generator ends the work at the next point at which it may stop, or at its next
    report, and waits for that. The visitor, and what may stop the one who asks, are those of the
    work too.
    """
    reports: Queue[str | Future] = Queue()
    closed = threading.Event()
    said = "waiting"

    def check() -> None:
        if closed.is_set():
            raise CancelledError

    def report(message: str, fraction: float | None = None) -> None:
        nonlocal said
        check()
        message = message if fraction is None else f"{message} ({fraction:.0%})"
        if message != said:
            said = message
            reports.put(message)

    def place(where: Place | None) -> None:
        reports.put(said if where is None else where)

    def stoppably() -> T:
        with stoppable(check), telling(place):
            return work(report)

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(copy_context().run, stoppably)
        future.add_done_callback(reports.put)
        message: str | Future = said
        try:
            while True:
                try:
                    message = reports.get(timeout=TICK)
                except Empty:
                    pass
                if isinstance(message, Future):
                    break
                yield message
        finally:
            closed.set()
    return future.result()


def each_in_thread(steps: Iterator[T]) -> Iterator[T | Place]:
    """The steps, each taken in a thread; and, while one waits for its turn, again and again its
    place."""
    ended = object()
    while True:
        taking = in_thread(lambda report: next(steps, ended))
        step = yield from _places(taking)
        if step is ended:
            return
        yield step


def _places(work: Generator[str, None, T]) -> Generator[Place, None, T]:
    """What is said of places alone; closing it closes the work."""
    try:
        while True:
            said = next(work)
            if isinstance(said, Place):
                yield said
    except StopIteration as end:
        return end.value
    finally:
        work.close()
