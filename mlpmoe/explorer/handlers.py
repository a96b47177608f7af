"""What happens as the controls move and a conversion is measured: values in, updates out.

Nothing of a visitor is kept here but what they look at, so that a measurement that has been
overtaken stops by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.stopping import stoppable
from .asked import Calibrated, Conversion, spec_of
from .background import in_thread
from .cards import (
    pending_perplexity_card,
    pending_speed_card,
    pending_structure_cards,
    perplexity_card,
    speed_card,
)
from .convert_panel import CUSTOM
from .events import sentence
from .links import Link
from .loaded import LoadedModel, ends_here
from .preview import preset_name, preview, snippet
from .records import measured_record, write_records
from .settings import arriving, parted, read_asked, settle
from .workbench import Workbench

STRUCTURE = 4  # outputs of `_structure`
PREVIEW = 7 + 2 + STRUCTURE  # outputs of `preview`
WINDOWS_PER_ROUND = 2  # of perplexity to one of speed: neither waits for the other to end
NOT_MEASURED = "not measured; press Measure again"
BETWEEN_ESTIMATES = 0.25  # seconds, at least: a page is busy with each for a while
VISITORS_REMEMBERED = 10_000


@dataclass(eq=False)
class _Look:
    """What a visitor looks at, since the last change of it."""

    at: tuple  # key of the model, conversion, key of the text
    whole: bool = False  # to be measured to the end of the text
    begun: bool = False  # to be measured, by an event of this page
    failed: bool = False


class Handlers:
    """The events of the page over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._latest: OrderedDict[str, _Look] = OrderedDict()  # of each session

    def preview(self, request: gr.Request, model: str, *values: Any) -> tuple:
        """All that needs no forward pass, at once; what was measured before, if it was. A
        calibrated conversion is shown once it is made (`measure`)."""
        settings, (text, *views, share) = parted(values)
        loaded = self.workbench.loaded(model)
        loaded.texts.check(text)
        if arriving(settings, share):
            return (gr.skip(),) * PREVIEW
        settings, used, said = settle(loaded, settings, share)
        for notice in said:
            gr.Info(notice)
        asked = read_asked(loaded, settings)
        spec = spec_of(asked)
        at = loaded.key, asked, text
        # the page may ask again for what it shows: what is being measured goes on
        if self._looks_at(request) != at:
            self._look_at(request, at)
        message = NOT_MEASURED if self._latest[request.session_hash].failed else "measuring …"
        calibration = asked.key if isinstance(asked, Calibrated) else None
        return (
            *used,
            preset_name(spec) or CUSTOM,
            Link(loaded.key, spec, text, calibration=calibration).to_query(),
            snippet(loaded.key, spec, text, calibration),
            *self._measured_cards(loaded, asked, text, message),
            *_structure(loaded, asked, views, message),
        )

    def measure_live(
        self, request: gr.Request, model: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Cards, plots and the new run, as an estimate sharpens by itself."""
        yield from self._measure(request, model, values, whole=False)

    def measure(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same to the end of the text, and speed anew."""
        yield from self._measure(request, model, values, whole=True)

    def stop_measuring(self, request: gr.Request, model: str, *values: Any) -> tuple[Any, ...]:
        self._look_at(request, ())
        return self._not_measured(model, values, "stopped; Measure goes on")

    def measuring_failed(self, model: str, *values: Any) -> tuple[Any, ...]:
        return self._not_measured(model, values, NOT_MEASURED)

    def _not_measured(self, model: str, values: Sequence[Any], message: str) -> tuple[Any, ...]:
        """The cards with what is known, and the message where nothing is."""
        loaded, asked, text, views = self._chosen(model, values)
        return (
            *self._measured_cards(loaded, asked, text, message),
            *_structure(loaded, asked, views, message),
            gr.skip(),
        )

    def _chosen(
        self, model: str, values: Sequence[Any]
    ) -> tuple[LoadedModel, Conversion, str, list[Any]]:
        """Model, conversion, text, and what is looked at: layer, projection, quantity."""
        settings, (text, *views) = parted(values)
        loaded = self.workbench.loaded(model)
        return loaded, read_asked(loaded, settings), text, views

    def _measure(
        self, request: gr.Request, model: str, values: Sequence[Any], whole: bool
    ) -> Iterator[tuple[Any, ...]]:
        """Whatever is yielded last stays on the page. What a visitor looks at is measured by itself
        once; the button begins anew."""
        session = request.session_hash
        loaded, asked, text, views = self._chosen(model, values)
        at = (loaded.key, asked, text)
        if not whole and (self._looks_at(request) != at or self._latest[session].begun):
            return
        mine = self._look_at(request, at, whole)
        mine.begun = True

        def check() -> None:
            if self._latest.get(session) is not mine:
                raise CancelledError  # also in the middle of a window

        try:
            with closing(self._steps(loaded, asked, text, views, mine.whole, whole)) as steps:
                while True:
                    try:
                        with stoppable(check):
                            step = next(steps)
                        check()
                    except (CancelledError, StopIteration):
                        break
                    yield step
        except GeneratorExit:  # nobody is there to see the rest
            mine.begun = False
            raise
        except Exception:
            mine.failed = True
            raise

    def _steps(
        self, loaded: LoadedModel, asked: Conversion, text: str, views: list[Any], whole: bool,
        speed_anew: bool,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        nothing = (gr.skip(),) * (STRUCTURE + 1)

        def cards(message: str) -> tuple[Any, ...]:
            return *self._measured_cards(loaded, asked, text, message), *nothing

        def run() -> str:
            return write_records([measured_record(loaded, asked, text)])

        if not loaded.is_converted(asked):
            for message in loaded.convert(asked):
                message = f"{message} …"
                yield (
                    *self._measured_cards(loaded, asked, text, message),
                    *_structure(loaded, asked, views, message),
                    gr.skip(),
                )
            if said := loaded.few_tokens(asked):
                gr.Warning(sentence(UserError(said)), title="Few calibration tokens")
            shown = self._measured_cards(loaded, asked, text, "measuring …")
            yield *shown, *_structure(loaded, asked, views, ""), gr.skip()
        if not loaded.has_text(text):
            yield cards("reading the text …")
            for message in in_thread(lambda report: loaded.text(text)):
                yield cards(f"{message} …")
        untimed = speed_anew or loaded.known_speed(asked) is None
        timing = loaded.speed(asked) if untimed else iter(())
        shown = -inf

        def due() -> bool:
            nonlocal shown
            late = monotonic() - shown > BETWEEN_ESTIMATES
            shown = monotonic() if late else shown
            return late

        for number, found in enumerate(loaded.evaluate(asked, text, whole)):
            ended = ends_here(found, whole)
            if due() or ended:
                # the run together with its figures: who sees them may go on at once
                yield *cards("measuring …")[:-1], run() if ended else gr.skip()
            if number and number % WINDOWS_PER_ROUND == 0 and next(timing, None) and due():
                yield cards("measuring …")
        for report in timing:
            if report and due():
                yield cards("measuring …")
        # the structure's cards once more: a page that was busy may have passed over them
        perplexity, speed, *_ = cards("")
        nonzero, compute, *_ = _structure(loaded, asked, views, "")
        yield perplexity, speed, nonzero, compute, *(gr.skip(),) * 2, run()
        if not spec_of(asked).routed:
            loaded.structure.get_ready_to_fade(asked)

    def _measured_cards(
        self, loaded: LoadedModel, asked: Conversion, text: str, message: str
    ) -> tuple[str, str]:
        evaluation, speed = loaded.known_evaluation(asked, text), loaded.known_speed(asked)
        perplexity = (
            perplexity_card(evaluation, text, loaded.text(text).window)
            if evaluation
            else pending_perplexity_card(loaded.known_dense(text), text, message)
        )
        return perplexity.html(), (
            speed_card(speed, loaded) if speed else pending_speed_card(message)
        ).html()

    def _looks_at(self, request: gr.Request) -> tuple | None:
        look = self._latest.get(request.session_hash)
        return look and look.at

    def _look_at(self, request: gr.Request, at: tuple, whole: bool = False) -> _Look:
        """Overtakes what is being measured for this visitor. What was to be measured to the end
        still is."""
        before = self._latest.pop(request.session_hash, None)
        whole = whole or (before is not None and before.at == at and before.whole)
        look = self._latest[request.session_hash] = _Look(at, whole)
        while len(self._latest) > VISITORS_REMEMBERED:
            self._latest.popitem(last=False)
        return look


def _structure(
    loaded: LoadedModel, asked: Conversion, views: Sequence[Any], message: str
) -> tuple[Any, ...]:
    """Cards of non-zero parameters and compute, histograms and heat map."""
    if not loaded.is_converted(asked):
        cards = pending_structure_cards(loaded, message)
        return *(card.html() for card in cards), gr.skip(), gr.skip()
    shown = preview(loaded, asked, *views)
    return shown.nonzero.html(), shown.compute.html(), shown.histograms, shown.heat
