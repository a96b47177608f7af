"""A mapping of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Recent(OrderedDict):
    """A mapping that forgets what was used longest ago."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_or_make(self, key: object, make: Callable[[], T]) -> T:
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = value = make()
        while len(self) > self.size:
            self.popitem(last=False)
        return value
