"""Interrupts for processes that tests start."""

import signal


def take_interrupts() -> None:
    """For `preexec_fn`: what a shell began in the background has been told to ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
