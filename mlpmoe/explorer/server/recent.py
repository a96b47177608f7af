"""A mapping of bounded size, shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar

from ...core.stopping import may_stop
from .turns import TICK

T = TypeVar("T")


class Recent(OrderedDict):
    """A mapping that forgets what was used longest ago.

    What is made for one key holds up only those who ask for the same key. size: of how many values
    it knows. most_bytes: of all of them, as bytes_of counts; the newest one stays in any case.
    """

    def __init__(
        self,
        size: int,
        most_bytes: float = inf,
        bytes_of: Callable[[Any], int] = lambda value: 0,
    ) -> None:
        super().__init__()
        self.size, self.most_bytes, self.bytes_of = size, most_bytes, bytes_of
        self._lock = threading.Lock()
        self._making: dict[object, threading.RLock] = {}

    def get_or_make(self, key: object, make: Callable[[], T]) -> T:
        """The value of the key, made now if there is none; only once, whoever asks meanwhile. Who
        waits for that may stop."""
        with self._lock:
            if key in self:
                self.move_to_end(key)
                return self[key]
            making = self._making.setdefault(key, threading.RLock())
        while not making.acquire(timeout=TICK):
            may_stop()
        try:
            with self._lock:
                if key in self:
                    return self[key]
            try:
                value = make()
                self.put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        finally:
            making.release()
        return value

    def put(self, key: object, value: object) -> None:
        with self._lock:
            self[key] = value
            self.move_to_end(key)
            while len(self) > self.size or (len(self) > 1 and self._bytes() > self.most_bytes):
                self.popitem(last=False)

    def forget_oldest(self) -> bool:
        """Forget what was used longest ago; whether there was anything."""
        with self._lock:
            return bool(self) and self.popitem(last=False) is not None

    def _bytes(self) -> int:
        return sum(map(self.bytes_of, self.values()))
