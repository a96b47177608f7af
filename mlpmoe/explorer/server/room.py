"""Memory for conversions: who asks for more than there is waits, but not for long."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import monotonic, sleep

import torch

from ...core import memory
from ...core.errors import UserError
from ...core.stopping import may_stop
from ...models import format_bytes
from .turns import TICK

PATIENCE = 60.0  # seconds
RESERVE = 2**28  # bytes that stay free: what running a model takes in between


class Room:
    """Memory that several threads ask for. free: bytes that are left; None if nobody can tell."""

    def __init__(self, free: Callable[[], int | None]) -> None:
        self._free = free
        self._lock = threading.Lock()
        self._promised = 0  # to those who are making something

    @contextmanager
    def holding(
        self,
        needed: int,
        let_go: Callable[[], bool] = lambda: False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Over the making of something that takes `needed` bytes.

        let_go: gives up something that is held in case somebody asks for it again, and says whether
        there was anything. waiting: told again and again. Raises UserError if there is no room for
        PATIENCE seconds.
        """
        until = monotonic() + PATIENCE
        while (free := self._take(needed)) is not None:
            if let_go():
                gc.collect()  # a model refers to itself in circles
                memory.return_memory()
                continue
            if monotonic() >= until:
                raise UserError(
                    "there is no memory for another conversion at the moment: it takes "
                    f"{format_bytes(needed)}, and {format_bytes(free)} are free here. Try again in "
                    "a minute, or choose a smaller model."
                )
            may_stop()
            waiting()
            sleep(TICK)
        try:
            yield
        finally:
            with self._lock:
                self._promised -= needed

    def _take(self, needed: int) -> int | None:
        """Promise `needed` bytes; or, where there are too few, how many are free."""
        with self._lock:
            free = self._free()
            if free is not None and free - self._promised < needed + RESERVE:
                return max(0, free - self._promised)
            self._promised += needed
            return None


@cache
def room_on(device: torch.device) -> Room:
    """The memory of a device, for all models on it."""
    return Room(lambda: memory.available_memory(device))
