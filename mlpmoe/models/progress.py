"""Tell a caller how far a load has come."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm.std import tqdm

from .errors import format_bytes

OnProgress = Callable[[str, "float | None"], None]
REPORT_INTERVAL = 0.1  # seconds; downloads report every few kilobytes


class Progress:
    """Calls `on_progress(message, fraction)`; the fraction, 0 to 1, is None where unknown.

    During a download the calls come from worker threads. An exception that the callback raises
    cancels the load: it is raised again at every later report, and at last out of `load`.
    """

    def __init__(self, on_progress: OnProgress | None):
        self.cancelled: BaseException | None = None
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def report(self, message: str, fraction: float | None = None) -> None:
        with self._lock:
            if self.cancelled is None and self._on_progress is not None:
                try:
                    self._on_progress(message, fraction)
                except BaseException as error:
                    self.cancelled = error
        if self.cancelled is not None:
            raise self.cancelled

    def bar_class(self, total: int) -> type[tqdm] | None:
        """Progress bars for the hub's client that report a download of `total` bytes.

        None, which is the client's own bars on the terminal, if nobody listens.
        """
        if self._on_progress is None:
            return None
        progress, message, last = self, f"downloading {format_bytes(total)}", [0.0]

        class ByteBar(tqdm):
            monitor_interval = 0  # no thread of its own

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "file": io.StringIO()})

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                # One bar counts files, one received bytes and one written bytes: the last two
                # differ where the hub sends compressed or known chunks.
                if self.unit == "B" and time.monotonic() - last[0] > REPORT_INTERVAL:
                    last[0] = time.monotonic()
                    progress.report(message, min(self.n / total, 1.0) if total else None)
                return shown

            def display(self, *args: Any, **kwargs: Any) -> bool:
                return True  # nothing to draw

        return ByteBar
