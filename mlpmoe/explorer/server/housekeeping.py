"""What a server does for itself, now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import sleep

import psutil

from ...core.memory import return_memory

EVERY = 5.0  # seconds between two looks
GROWTH = 2**26  # bytes since the last time, from which memory is returned

_begun = threading.Lock()  # taken for good by the one who does it


def begin_housekeeping() -> None:
    """Return freed memory to the system, in the background, for as long as the process lives."""
    if _begun.acquire(blocking=False):
        threading.Thread(target=_keep_house, name="housekeeping", daemon=True).start()


def _keep_house() -> None:
    least = memory_in_use()
    while True:
        sleep(EVERY)
        least = look_after_memory(least)


def look_after_memory(
    least: int,
    in_use: Callable[[], int] | None = None,
    give_back: Callable[[], None] = return_memory,
) -> int:
    """Return memory if the process has GROWTH more than `least` bytes; the least that it had
    since the last time, which is the next `least`."""
    in_use = in_use or memory_in_use
    now = in_use()
    if now - least > GROWTH:
        give_back()
        return in_use()
    return min(least, now)


def memory_in_use() -> int:
    """Bytes of main memory that this process takes."""
    return psutil.Process().memory_info().rss
