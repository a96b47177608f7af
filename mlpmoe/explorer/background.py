"""Work in a thread that says what it does, for handlers that stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from queue import Queue
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[Callable[[str, float | None], None]], T]) -> Generator[str, None, T]:
    """Run `work(report)` in a thread, yielding what it reports, and return its result.

    Closing the generator makes the next report raise, which ends the work.
    """
    reports: Queue[str | Future] = Queue()
    closed = threading.Event()

    def report(message: str, fraction: float | None = None) -> None:
        if closed.is_set():
            raise CancelledError
        reports.put(message if fraction is None else f"{message} ({fraction:.0%})")

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work, report)
        future.add_done_callback(reports.put)
        try:
            while not isinstance(message := reports.get(), Future):
                yield message
        finally:
            closed.set()
    return future.result()
