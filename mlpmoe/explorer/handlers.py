"""What happens as the controls move and a conversion is measured: values in, updates out.

Nothing of a visitor is kept here but the number of their latest change, so that a measurement
that has been overtaken stops by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ..models.catalogue import DEMO_KEY
from .background import in_thread
from .cards import (
    pending_perplexity_card,
    pending_speed_card,
    pending_structure_cards,
    perplexity_card,
    speed_card,
)
from .convert_panel import CUSTOM
from .links import Link
from .loaded import Calibrated, Conversion, Evaluation, LoadedModel
from .preview import preset_name, preview, snippet
from .records import measured_record, write_records
from .settings import (
    parted,
    read_spec,
    settle_keep,
)
from .texts import SHIPPED
from .workbench import Workbench

STRUCTURE = 4  # outputs of `_structure`
QUICK_SECONDS = 4.0  # a measurement predicted to be shorter starts by itself
VISITORS_REMEMBERED = 10_000


class Handlers:
    """The events of the page over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._latest: OrderedDict[str, tuple] = OrderedDict()  # session -> what it looks at

    def preview(self, request: gr.Request, model: str, *values: Any) -> tuple:
        """All that needs no forward pass, at once; what was measured before, if it was. A
        calibrated conversion is shown once it is made (`measure`)."""
        settings, (text, *views, branches_before) = parted(values)
        loaded = self.workbench.loaded(model)
        branches, chosen = settings[0], settings[2]
        keep = settle_keep(branches, chosen, branches_before)
        # K is left alone where it may stay: the visitor may have moved it further meanwhile.
        settled = keep == chosen and branches == branches_before
        spec = read_spec([*settings[:2], keep, *settings[3:]])
        spec.check_fits(loaded.d_ff)
        asked = loaded.asked(spec)
        self._look_at(request, (loaded.key, asked, text))
        invitation = self._invitation(loaded, asked, text)
        return (
            gr.skip() if settled else gr.update(value=keep, maximum=max(2, branches)),
            gr.skip() if branches == branches_before else branches,
            preset_name(spec) or CUSTOM,
            Link(loaded.key, spec, text).to_query(),
            snippet(loaded.key, spec, text),
            gr.update(interactive=spec.pattern is None),
            gr.update(visible=spec.fade_schedule == "power"),
            *self._measured_cards(loaded, asked, text, invitation),
            *_structure(loaded, asked, views, invitation),
        )

    def measure_if_quick(
        self, request: gr.Request, model: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        loaded, asked, text, views = self._chosen(model, values)
        if self._is_quick(loaded, asked, text):
            yield from self._measure(request, loaded, asked, text, views)

    def measure(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The cards of perplexity and speed, the structure, then the new run."""
        loaded, asked, text, views = self._chosen(model, values)
        self._look_at(request, (loaded.key, asked, text))
        yield from self._measure(request, loaded, asked, text, views, speed_again=True)

    def stop_measuring(self, request: gr.Request, model: str, *values: Any) -> tuple[Any, ...]:
        return self._not_measured(request, model, values, "stopped; press Measure")

    def measuring_failed(self, request: gr.Request, model: str, *values: Any) -> tuple[Any, ...]:
        return self._not_measured(request, model, values, "not measured; press Measure again")

    def _not_measured(
        self, request: gr.Request, model: str, values: Sequence[Any], message: str
    ) -> tuple[Any, ...]:
        """The cards with what is known, and the message where nothing is."""
        self._look_at(request, ())
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
        return loaded, loaded.asked(read_spec(settings)), text, views

    def _measure(
        self,
        request: gr.Request,
        loaded: LoadedModel,
        asked: Conversion,
        text: str,
        views: list[Any],
        speed_again: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Cards and plots, as the measurement goes on."""
        look = (loaded.key, asked, text)
        nothing = (gr.skip(),) * (STRUCTURE + 1)

        def cards(message: str) -> tuple[Any, ...]:
            return *self._measured_cards(loaded, asked, text, message), *nothing

        if not loaded.is_converted(asked):
            for message in loaded.convert(asked):
                if self._latest.get(request.session_hash) != look:
                    return  # overtaken by a later change
                message = f"{message} …"
                yield (
                    *self._measured_cards(loaded, asked, text, message),
                    *_structure(loaded, asked, views, message),
                    gr.skip(),
                )
        if isinstance(asked, Calibrated):
            shown = self._measured_cards(loaded, asked, text, "measuring …")
            yield *shown, *_structure(loaded, asked, views, ""), gr.skip()
        elif loaded.known_evaluation(asked, text) is None:
            yield cards("measuring …")
        if not loaded.has_text(text):
            yield cards("reading the text …")
            for message in in_thread(lambda report: loaded.text(text)):
                yield cards(f"{message} …")
        for step in loaded.evaluate(asked, text):
            if self._latest.get(request.session_hash) != look:
                return
            if not isinstance(step, Evaluation):
                yield cards(f"measuring, {step.done / step.total:.0%}")
        if speed_again or loaded.known_speed(asked) is None:
            perplexity, _ = self._measured_cards(loaded, asked, text, "")
            yield perplexity, pending_speed_card("measuring …").html(), *nothing
            loaded.speed(asked, again=speed_again)
        if self._latest.get(request.session_hash) == look:
            # the structure's cards once more: a page that was busy may have passed over them
            perplexity, speed, *_ = cards("")
            nonzero, compute, *_ = _structure(loaded, asked, views, "")
            record = measured_record(loaded, asked, text)
            yield perplexity, speed, nonzero, compute, *(gr.skip(),) * 2, write_records([record])

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

    def _invitation(self, loaded: LoadedModel, asked: Conversion, text: str) -> str:
        if self._is_quick(loaded, asked, text):
            return "measuring …"
        if not loaded.is_converted(asked):
            return "press Measure; calibrates first"
        if not loaded.has_text(text):
            return "press Measure; reads the text first"
        return f"press Measure, about {loaded.seconds_to_measure(asked, text):.0f} s"

    def _is_quick(self, loaded: LoadedModel, asked: Conversion, text: str) -> bool:
        if not loaded.has_text(text):
            return False
        if loaded.key == DEMO_KEY and text in SHIPPED:
            return True
        converted = loaded.is_converted(asked)
        return converted and loaded.seconds_to_measure(asked, text) < QUICK_SECONDS

    def _look_at(self, request: gr.Request, look: tuple) -> None:
        self._latest[request.session_hash] = look
        self._latest.move_to_end(request.session_hash)
        while len(self._latest) > VISITORS_REMEMBERED:
            self._latest.popitem(last=False)


def _structure(
    loaded: LoadedModel, asked: Conversion, views: Sequence[Any], message: str
) -> tuple[Any, ...]:
    """Cards of non-zero parameters and compute, histograms and heat map."""
    if not loaded.is_converted(asked):
        cards = pending_structure_cards(loaded, message)
        return *(card.html() for card in cards), gr.skip(), gr.skip()
    shown = preview(loaded, asked, *views)
    return shown.nonzero.html(), shown.compute.html(), shown.histograms, shown.heat
