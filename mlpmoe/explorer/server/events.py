"""What all listeners of the page share: how they are registered, and how errors are shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import LocalContext
from gradio.events import EventListener

from ...core.errors import UserError
from ...measure.words import capital
from ...models import ModelError
from .guests import Guests

PRIVATE = {"api_visibility": "private"}
QUIET = {**PRIVATE, "show_progress": "hidden"}
# What takes turns step by step (see `turns.Turns`) needs no queue of its own: in Gradio's, which
# knows of no visitors, one sweep would hold up everybody.
IN_TURNS = {"concurrency_limit": None}
# a plot that was redrawn while its tab was hidden had no width to fit into
RESIZE = "() => { setTimeout(() => window.dispatchEvent(new Event('resize')), 50) }"

GUESTS = Guests()
_ENDED = object()

logger = logging.getLogger(__name__)


def session() -> str | None:
    """Of the visitor, or the program, that is answered at this moment. A call without a session,
    which Gradio gives one of its own, is the machine's that it comes from."""
    request = LocalContext.request.get(None)
    found = getattr(request, "session_hash", None)
    if found is not None and found == LocalContext.event_id.get(None):
        return getattr(request.client, "host", found)
    return found


def readable(handler: Callable) -> Callable:
    """Turn what a user can mend into a message on the page; log anything else and say so. Turns
    that the handler asks for are the visitor's, who has so much under way at a time (see `Guests`).
    Where a generator has nothing to say the page is left as it is: Gradio would clear its outputs.
    """

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, UserError):  # toasts show HTML, and a link can name an image in it
            return gr.Error(sentence(error), title="Not possible", print_exception=False)
        logger.exception("%s failed", handler.__name__)
        return gr.Error(
            "Something went wrong on the server; nothing was changed. Please try again.",
            print_exception=False,
        )

    @wraps(handler)
    def call(*args: Any) -> Any:
        try:
            with GUESTS.work_of(session()) as visit, visit():
                return handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise shown(error) from error

    @wraps(handler)
    def stream(*args: Any) -> Iterator[Any]:
        try:
            with GUESTS.work_of(session()) as visit, closing(handler(*args)) as steps:
                with visit():
                    step = next(steps, gr.skip())  # one is enough for all outputs
                while step is not _ENDED:
                    yield step
                    with visit():  # not over a yield: it would hold for the one who asks
                        step = next(steps, _ENDED)
        except gr.Error:
            raise
        except Exception as error:
            raise shown(error) from error

    return stream if isgeneratorfunction(handler) else call


class Together:
    """Handlers of one trigger that run as one event, one after the other: what an event costs a
    page is more than most of them do."""

    def __init__(self) -> None:
        self._parts: list[tuple[Callable, list[Component], list[Component]]] = []

    def add(self, handler: Callable, inputs: list[Component], outputs: list[Component]) -> None:
        self._parts.append((handler, inputs, outputs))

    def on(self, trigger: EventListener) -> None:
        inputs = list({each._id: each for _, some, _ in self._parts for each in some}.values())
        outputs = [each for *_, some in self._parts for each in some]

        def together(*values: Any) -> tuple:
            given = dict(zip((each._id for each in inputs), values, strict=True))
            said: list[Any] = []
            for handler, some, shown in self._parts:
                result = handler(*(given[each._id] for each in some))
                said += result if len(shown) > 1 else [result]
            return tuple(said)

        trigger(readable(together), inputs, outputs, **QUIET)


def sentence(error: UserError) -> str:
    """The error's message as HTML, beginning with a capital; those of models, such as "my-model
    has no weights.", begin with one or with a name, which keeps its spelling."""
    message = str(error) if isinstance(error, ModelError) else capital(str(error))
    return escape(message, quote=False)


def status(text: str) -> str:
    """What is being done, or has been, as HTML; nothing where there is nothing to say."""
    return f"<p>{escape(capital(text))}</p>" if text else ""
