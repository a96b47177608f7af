"""How a process ends that is asked to: soon, and with nothing left behind."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import FrameType

from .scratch import remove_scratch

GRACE = 2.0  # seconds that what is being done has to end by itself
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # of which a system may lack some


_asked: list[int] = []  # the requests so far


class Terminated(KeyboardInterrupt):
    """Somebody ended the process: to what is being done the same as an interrupt."""


def end_when_asked() -> None:
    """From now on an interrupt raises KeyboardInterrupt in the main thread, and other requests to
    end raise Terminated; whatever has not ended GRACE seconds later, in any thread, is cut off.
    A second request cuts it off at once.

    What the process ignores it goes on to ignore, such as the end of a terminal under nohup. To be
    called in the main thread.
    """
    numbers = []
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
            numbers.append(number)
    # Handlers run once the main thread is back from a library, the byte is written at once.
    heard, written = socket.socketpair()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _forget(numbers))
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
    atexit.register(_leave)  # first, so that it runs last
    threading.Thread(target=_listen, args=(heard, numbers), daemon=True).start()


def _forget(numbers: list[int]) -> None:
    """In a forked process, whose end is not that of this one."""
    atexit.unregister(_leave)
    signal.set_wakeup_fd(-1)
    for number in numbers:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)


def _end(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _listen(heard: socket.socket, numbers: list[int]) -> None:
    """Wait for the first request, and then for the second, but not long."""
    while (number := heard.recv(1)[0]) not in numbers:
        pass
    heard.settimeout(GRACE)
    try:
        while heard.recv(1)[0] not in numbers:
            pass
    except TimeoutError:
        pass
    _cut_off(number)


def _leave() -> None:
    """Once all has ended by itself: taking apart what is in memory would take seconds."""
    if _asked:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        _cut_off(_asked[0])


def _cut_off(number: int) -> None:
    remove_scratch()
    os._exit(128 + number)
