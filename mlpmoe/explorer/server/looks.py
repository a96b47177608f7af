"""What each visitor looks at, so that work for what they have left stops by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import gradio as gr

VISITORS_REMEMBERED = 10_000


@dataclass(eq=False)
class Stay:
    """At what a visitor looks at, however often it is measured anew."""

    written: bool = False  # with, by itself


@dataclass(eq=False)
class Look:
    """What a visitor looks at, since the last change of it, or the last press of the button."""

    at: tuple  # key of the model, conversion, key of the text
    whole: bool = False  # to be measured to the end of the text
    begun: bool = False  # to be measured, by an event of this page
    failed: bool = False
    stay: Stay = field(default_factory=Stay)


class Looks:
    """Of all visitors of a server. Nothing else of them is kept."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, Look] = OrderedDict()  # of each session

    def of(self, request: gr.Request) -> Look | None:
        return self._latest.get(request.session_hash)

    def is_at(self, request: gr.Request, at: tuple) -> bool:
        look = self.of(request)
        return look is not None and look.at == at

    def is_of(self, request: gr.Request, model: str) -> bool:
        """Whether the visitor looked at this model already."""
        look = self.of(request)
        return look is not None and look.at[0] == model

    def move(self, request: gr.Request, at: tuple, whole: bool = False) -> Look:
        """Overtakes what is being measured for this visitor. What was to be measured to the end
        still is."""
        before = self.of(request)
        look = Look(at, whole)
        if before is not None and before.at == at:
            look.whole, look.stay = whole or before.whole, before.stay
        self._latest[request.session_hash] = look
        self._latest.move_to_end(request.session_hash)
        while len(self._latest) > VISITORS_REMEMBERED:
            self._latest.popitem(last=False)
        return look

    def check(self, request: gr.Request, look: Look) -> Callable[[], None]:
        """Raises CancelledError once the visitor has gone on; also in the middle of a window."""

        def check() -> None:
            if self.of(request) is not look:
                raise CancelledError

        return check

    def check_stay(self, request: gr.Request, stay: Stay) -> Callable[[], None]:
        """The same, but a measurement that begins anew is no reason to go."""

        def check() -> None:
            look = self.of(request)
            if look is None or look.stay is not stay:
                raise CancelledError

        return check
