"""How a process ends that is asked to: soon, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from .scratch import remove_scratch

GRACE = 2.0  # seconds that what is being done has to end by itself
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # of which a system may lack some

_asked = False


class Terminated(KeyboardInterrupt):
    """Somebody ended the process: to what is being done the same as an interrupt."""


def end_when_asked() -> None:
    """From now on an interrupt raises KeyboardInterrupt in the main thread, and other requests to
    end raise Terminated; whatever has not ended GRACE seconds later, in any thread, is cut off.
    A second request cuts it off at once.

    What the process ignores it goes on to ignore, such as the end of a terminal under nohup. To be
    called in the main thread.
    """
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked:
        _cut_off(number)
    _asked = True
    threading.Thread(target=_cut_off, args=(number, GRACE), daemon=True).start()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _cut_off(number: int, after: float = 0.0) -> None:
    time.sleep(after)
    remove_scratch()
    os._exit(128 + number)
