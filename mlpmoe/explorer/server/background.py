"""Work in a thread that says what it does, for handlers that stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from queue import Empty, Queue
from typing import TypeVar

from ...core.stopping import stoppable

T = TypeVar("T")

TICK = 0.25  # seconds after which what was said last is said again, so that its reader may stop


def in_thread(work: Callable[[Callable[[str, float | None], None]], T]) -> Generator[str, None, T]:
    """Run `work(report)` in a thread, yielding what it reports, and return its result.

    A report that says the same as the one before is passed over; when nothing new is said for a
    TICK, the last one comes again. Closing the generator ends the work at the next point at which
    it may stop, or at its next report, and waits for that.
    """
    reports: Queue[str | Future] = Queue()
    closed = threading.Event()
    said = ""

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

    def stoppably() -> T:
        with stoppable(check):
            return work(report)

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(stoppably)
        future.add_done_callback(reports.put)
        message: str | Future = "waiting"
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
