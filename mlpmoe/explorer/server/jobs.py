"""Work that a visitor starts, and may stop: a run of a sweep, a search, a text that is written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

import gradio as gr

from .events import status

SOON = 0.5  # seconds in which most work has stopped


@dataclass(eq=False)
class Job:
    """What one visitor has started."""

    about: str = ""  # key of the model
    begun: bool = False  # else it waits for its turn
    stopped: bool = False
    left: bool = False  # the page shows another model since
    over: Event = field(default_factory=Event)

    def check(self) -> None:
        """Raises CancelledError once it is stopped; see `core.stopping`."""
        if self.stopped:
            raise CancelledError


class Jobs:
    """Of one kind, of all visitors: each has one at a time, and a new one stops the one before.

    They are stopped here and not by Gradio's `cancels`: the page sends those without the event's
    number while it does not know it yet, and then nothing is stopped.
    """

    def __init__(self) -> None:
        self._of: dict[str, Job] = {}  # by session

    def of(self, request: gr.Request) -> Job | None:
        """What this visitor has started last, until it ends."""
        return self._of.get(request.session_hash)

    def put(self, request: gr.Request, about: str = "") -> Job:
        """A new one, which has not begun."""
        self.stop(request)
        self._of[request.session_hash] = job = Job(about)
        return job

    def stop(self, request: gr.Request) -> Job | None:
        """The job that was told to stop, if there is one. It is over if it has not begun."""
        job = self.of(request)
        if job is not None:
            job.stopped = True
            if not job.begun:
                del self._of[request.session_hash]
        return job

    def press_stop(self, request: gr.Request) -> str | dict:
        """The button: what to show where the work says how it goes. Nothing where the work ends
        meanwhile: what it says last must not be overtaken."""
        job = self.stop(request)
        if job is None or not job.begun:
            return status("Stopped." if job else "")
        return gr.skip() if job.over.wait(SOON) else status("stopping …")

    @contextmanager
    def doing(self, request: gr.Request, about: str = "") -> Iterator[Job]:
        """Over the work of a job: of the one that waits, or of a new one."""
        job = self.of(request)
        if job is None or job.begun:
            job = self.put(request, about)
        job.begun = True
        try:
            yield job
        finally:
            job.over.set()
            if self.of(request) is job:
                del self._of[request.session_hash]
