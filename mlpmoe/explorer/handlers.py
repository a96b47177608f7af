"""What happens on each event of the page: component values in, component updates out.

Nothing of a visitor is kept here but the number of their latest change, so that a measurement
that has been overtaken stops by itself.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from numbers import Integral, Real
from time import monotonic
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.presets import PRESETS
from ..core.spec import ConversionSpec
from ..measure.generation import Writing, parted_at, write_side_by_side
from ..models.catalogue import DEMO_KEY
from .cards import (
    describe,
    pending_perplexity_card,
    pending_speed_card,
    pending_structure_cards,
    perplexity_card,
    speed_card,
    status_line,
)
from .components import MAX_NEW_TOKENS, MAX_PROMPT
from .convert_panel import CUSTOM
from .lesson import lesson
from .loaded import Calibrated, Conversion, Evaluation, LoadedModel
from .preview import preset_name, preview, snippet
from .settings import (
    CONTROLS,
    check_shown,
    most_branches,
    read_spec,
    settle_keep,
    show_spec,
)
from .workbench import Workbench

STRUCTURE = 4  # outputs of `_structure`
QUICK_SECONDS = 4.0  # a measurement predicted to be shorter starts by itself
WRITING_SECONDS = 120.0  # after that, writing stops
UPDATES_PER_SECOND = 20  # of streamed text
VISITORS_REMEMBERED = 10_000

logger = logging.getLogger(__name__)


def readable(handler: Callable) -> Callable:
    """Turn what a user can mend into a message on the page; log anything else and say so."""

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, UserError):  # toasts show HTML, and a link can name an image in it
            return gr.Error(_sentence(error), title="Not possible", print_exception=False)
        logger.exception("%s failed", handler.__name__)
        return gr.Error(
            "Something went wrong on the server; nothing was changed. Please try again.",
            print_exception=False,
        )

    @wraps(handler)
    def call(*args: Any) -> Any:
        try:
            return handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise shown(error) from error

    @wraps(handler)
    def stream(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise shown(error) from error

    return stream if isgeneratorfunction(handler) else call


class Handlers:
    """The events of the page over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._latest: OrderedDict[str, tuple] = OrderedDict()  # session -> what it looks at

    def open_link(self, request: gr.Request) -> tuple:
        """The page is open; model, status line and controls, from the link's query string."""
        query = dict(request.query_params)
        model, spec = query.pop("model", DEMO_KEY), ConversionSpec()
        known = {name: text for name, text in query.items() if name in spec.to_dict()}
        try:
            if known:
                spec = ConversionSpec.from_query("&".join(f"{k}={v}" for k, v in known.items()))
                check_shown(spec)
                spec.check_fits(self.workbench.loaded(DEMO_KEY).d_ff)
        except UserError as error:
            gr.Warning(f"{_sentence(error)} The page opens with its defaults.", title="Broken link")
            spec = ConversionSpec()
        if model != DEMO_KEY:
            gr.Info(f"This link is about {escape(model[:80])}. Press Load to load it.")
        demo = self.workbench.loaded(DEMO_KEY)
        return True, model, status_line(demo), *show_spec(spec, demo)

    def choose_preset(self, model: str, name: str) -> tuple:
        loaded = self.workbench.loaded(model)
        if name not in PRESETS:
            return (gr.skip(),) * (len(CONTROLS) + 1)
        PRESETS[name].check_fits(loaded.d_ff)
        return show_spec(PRESETS[name], loaded)

    def load(self, name: str, branches: int) -> Iterator[tuple]:
        """Status line, model key, then the limits of B, layer and projection."""
        unchanged = (gr.skip(),) * 4
        for step in self.workbench.load(name):
            if isinstance(step, str):
                yield f"<p>{escape(str(name)[:80])}: {escape(step)} …</p>", *unchanged
        loaded = step
        yield (
            status_line(loaded),
            loaded.key,
            gr.update(maximum=most_branches(loaded), value=min(branches, most_branches(loaded))),
            gr.update(maximum=max(1, len(loaded.mlps) - 1), value=0),
            gr.update(choices=loaded.projections, value=loaded.projections[0]),
        )

    def load_failed(self, model: str) -> str:
        """The status line of the model that is still there."""
        return status_line(self.workbench.loaded(model))

    def preview(self, request: gr.Request, model: str, *values: Any) -> tuple:
        """All that needs no forward pass, at once; what was measured before, if it was. A
        calibrated conversion is shown once it is made (`measure`)."""
        settings, (text, *views, branches_before) = _parted(values)
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
            snippet(loaded.key, spec),
            gr.update(interactive=spec.pattern is None),
            gr.update(visible=spec.fade_schedule == "power"),
            *self._measured_cards(loaded, asked, text, invitation),
            *_structure(loaded, asked, views, invitation),
        )

    def lesson(self, model: str, *values: Any) -> tuple[str, str, str, str]:
        settings, (layer,) = _parted(values)
        loaded = self.workbench.loaded(model)
        return lesson(loaded, read_spec(settings), layer)

    def measure_if_quick(
        self, request: gr.Request, model: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        loaded, asked, text, views = self._chosen(model, values)
        if self._is_quick(loaded, asked, text):
            yield from self._measure(request, loaded, asked, text, views)

    def measure(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The cards of perplexity and speed, then the structure."""
        loaded, asked, text, views = self._chosen(model, values)
        self._look_at(request, (loaded.key, asked, text))
        yield from self._measure(request, loaded, asked, text, views, speed_again=True)

    def stop_measuring(self, request: gr.Request, model: str, *values: Any) -> tuple[Any, ...]:
        self._look_at(request, ())
        loaded, asked, text, views = self._chosen(model, values)
        message = "stopped; press Measure"
        return (
            *self._measured_cards(loaded, asked, text, message),
            *_structure(loaded, asked, views, message),
        )

    def write(self, model: str, *values: Any) -> Iterator[tuple[str, str, str]]:
        """Dense text, converted text, report."""
        settings, (prompt, tokens, temperature) = _parted(values)
        check_writing(prompt, tokens, temperature)
        loaded = self.workbench.loaded(model)
        spec = read_spec(settings)
        asked = loaded.asked(spec)
        if isinstance(asked, Calibrated):
            for message in loaded.convert(asked):
                yield gr.skip(), gr.skip(), f"<p>{escape(message)} …</p>"
        models = (loaded.model, loaded.converted(asked))
        started = shown = monotonic()
        writings: tuple[Writing, ...] = ()
        steps = write_side_by_side(models, loaded.tokenizer, prompt, tokens, temperature)
        for writings in steps:
            now = monotonic()
            if now - shown > 1 / UPDATES_PER_SECOND:
                shown = now
                yield *_texts(writings), f"<p>writing with {describe(spec)} …</p>"
            if now - started > WRITING_SECONDS:
                gr.Info(f"Stopped after {WRITING_SECONDS:.0f} seconds.")
                break
        yield *_texts(writings), writing_report(loaded, spec, writings)

    def _chosen(
        self, model: str, values: Sequence[Any]
    ) -> tuple[LoadedModel, Conversion, str, list[Any]]:
        """Model, conversion, text, and what is looked at: layer, projection, quantity."""
        settings, (text, *views) = _parted(values)
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
        nothing = (gr.skip(),) * STRUCTURE

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
                )
        if isinstance(asked, Calibrated):
            shown = self._measured_cards(loaded, asked, text, "measuring …")
            yield *shown, *_structure(loaded, asked, views, "")
        elif loaded.known_evaluation(asked, text) is None:
            yield cards("measuring …")
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
            yield cards("")

    def _measured_cards(
        self, loaded: LoadedModel, asked: Conversion, text: str, message: str
    ) -> tuple[str, str]:
        evaluation, speed = loaded.known_evaluation(asked, text), loaded.known_speed(asked)
        perplexity = (
            perplexity_card(evaluation, text)
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
        return f"press Measure, about {loaded.seconds_to_measure(asked, text):.0f} s"

    def _is_quick(self, loaded: LoadedModel, asked: Conversion, text: str) -> bool:
        if loaded.key == DEMO_KEY:
            return True
        converted = loaded.is_converted(asked)
        return converted and loaded.seconds_to_measure(asked, text) < QUICK_SECONDS

    def _look_at(self, request: gr.Request, look: tuple) -> None:
        self._latest[request.session_hash] = look
        self._latest.move_to_end(request.session_hash)
        while len(self._latest) > VISITORS_REMEMBERED:
            self._latest.popitem(last=False)


def _sentence(error: UserError) -> str:
    message = str(error)
    return escape(message[:1].upper() + message[1:], quote=False)


def _parted(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The values of the controls that make the spec, and those after them."""
    return values[: len(CONTROLS)], values[len(CONTROLS) :]


def _structure(
    loaded: LoadedModel, asked: Conversion, views: Sequence[Any], message: str
) -> tuple[Any, ...]:
    """Cards of non-zero parameters and compute, histograms and heat map."""
    if not loaded.is_converted(asked):
        cards = pending_structure_cards(loaded, message)
        return *(card.html() for card in cards), gr.skip(), gr.skip()
    shown = preview(loaded, asked, *views)
    return shown.nonzero.html(), shown.compute.html(), shown.histograms, shown.heat


def check_writing(prompt: Any, tokens: Any, temperature: Any) -> None:
    """Raise UserError for what the components forbid, since the API can send anything."""
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt must be a text of at most {MAX_PROMPT:,} characters.")
    if not _is(Integral, tokens) or not 1 <= tokens <= MAX_NEW_TOKENS:
        raise UserError(f"tokens must be a whole number between 1 and {MAX_NEW_TOKENS}.")
    if not _is(Real, temperature) or not 0 <= temperature <= 2:
        raise UserError("temperature must be a number between 0 and 2.")


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def writing_report(loaded: LoadedModel, spec: ConversionSpec, writings: tuple[Writing, ...]) -> str:
    """How fast both wrote, and the first token in which they part."""
    dense, converted = writings
    rows = "".join(
        f'<tr><th class="{name}">{name}</th><td>{len(w.tokens)} tokens</td>'
        f"<td>{w.tokens_per_second or 0:.1f} tokens/s</td>"
        f"<td>{'ended by itself' if w.finished else ''}</td></tr>"
        for name, w in (("dense", dense), ("converted", converted))
    )
    at = parted_at(dense.tokens, converted.tokens)
    if at is None:
        parting = "Both wrote the same text, token for token."
    else:
        first, second = (
            escape(repr(loaded.tokenizer.decode([w.tokens[at]]))) for w in (dense, converted)
        )
        parting = (
            f"They part at token {at + 1}: dense goes on with <code>{first}</code>, "
            f"converted with <code>{second}</code>."
        )
    return f"<p>Written with {escape(describe(spec))}. {parting}</p><table>{rows}</table>"


def _texts(writings: tuple[Writing, ...]) -> tuple[str, ...]:
    return tuple(writing.text.lstrip() for writing in writings)
