"""Who has how much under way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from ...core.errors import UserError
from .turns import visiting

MOST_AT_ONCE = 16  # of one visitor: a page needs a few, a program that asks for more is told so


class Guests:
    """The visitors of a server, by session, as long as something is done for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doing: Counter[str] = Counter()

    @contextmanager
    def work_of(self, visitor: str | None) -> Iterator[Callable[[], AbstractContextManager]]:
        """Over something that is done for a visitor: what to enter around each step of it, so that
        its turns are theirs. None: of nobody in particular. Raises UserError if they have
        MOST_AT_ONCE under way."""
        if visitor is None:
            yield nullcontext
            return
        with self._lock:
            if self._doing[visitor] >= MOST_AT_ONCE:
                raise UserError(
                    f"{MOST_AT_ONCE} of your requests are under way here, which is the most at a "
                    "time. Wait until one of them is answered."
                )
            self._doing[visitor] += 1
        try:
            yield partial(visiting, visitor)
        finally:
            with self._lock:
                self._doing[visitor] -= 1
                if not self._doing[visitor]:
                    del self._doing[visitor]
