"""What happens on each event of the page: component values in, component updates out.

Nothing of a visitor is kept here but the number of their latest change, so that a measurement
that has been overtaken stops by itself.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from numbers import Integral, Real
from time import monotonic
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.spec import PRESETS, ConversionSpec
from ..measure.generation import Writing, parted_at, write_side_by_side
from ..models.catalogue import DEMO_KEY
from .cards import (
    describe,
    pending_perplexity_card,
    pending_speed_card,
    perplexity_card,
    speed_card,
    status_line,
)
from .components import CUSTOM, MAX_BRANCHES, MAX_NEW_TOKENS, MAX_PROMPT
from .lesson import lesson
from .preview import preset_name, preview
from .workbench import Evaluation, LoadedModel, Workbench

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
                spec.check_fits(self.workbench.loaded(DEMO_KEY).d_ff)
                if spec.needs_calibration or spec.routed or spec.order != "contiguous":
                    raise UserError(
                        "links open static branches only so far; choose other methods on the tab "
                        "Experts."
                    )
                if spec.branches > MAX_BRANCHES:
                    raise UserError(f"this page offers at most {MAX_BRANCHES} branches (B).")
        except UserError as error:
            gr.Warning(f"{_sentence(error)} The page opens with its defaults.", title="Broken link")
            spec = ConversionSpec()
        if model != DEMO_KEY:
            gr.Info(f"This link is about {escape(model[:80])}. Press Load to load it.")
        demo = self.workbench.loaded(DEMO_KEY)
        return True, model, status_line(demo), *self._spec_updates(demo, spec)

    def choose_preset(self, model: str, name: str) -> tuple:
        loaded = self.workbench.loaded(model)
        if name not in PRESETS:
            return (gr.skip(),) * 5
        PRESETS[name].check_fits(loaded.d_ff)
        return self._spec_updates(loaded, PRESETS[name])

    def _spec_updates(self, loaded: LoadedModel, spec: ConversionSpec) -> tuple:
        """B, fade, K, compensation, and B again for `settle_keep` to compare with."""
        return (
            gr.update(value=spec.branches, maximum=_most_branches(loaded)),
            spec.fade,
            gr.update(value=spec.kept, maximum=max(2, spec.branches)),
            spec.compensation,
            spec.branches,
        )

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
            gr.update(maximum=_most_branches(loaded), value=min(branches, _most_branches(loaded))),
            gr.update(maximum=max(1, len(loaded.mlps) - 1), value=0),
            gr.update(choices=loaded.projections, value=loaded.projections[0]),
        )

    def load_failed(self, model: str) -> str:
        """The status line of the model that is still there."""
        return status_line(self.workbench.loaded(model))

    def preview(
        self, model: str, branches: int, fade: float, keep: int, compensation: str, text: str,
        layer: int, projection: str, quantity: str, branches_before: int, request: gr.Request,
    ) -> tuple:  # fmt: skip
        """All that needs no forward pass, at once; what was measured before, if it was."""
        loaded = self.workbench.loaded(model)
        chosen, keep = keep, settle_keep(branches, keep, branches_before)
        # K is left alone where it may stay: the visitor may have moved it further meanwhile.
        settled = keep == chosen and branches == branches_before
        spec = _spec(branches, fade, keep, compensation)
        spec.check_fits(loaded.d_ff)
        shown = preview(loaded, spec, layer, projection, quantity)
        self._look_at(request, (loaded.key, spec, text))
        return (
            gr.skip() if settled else gr.update(value=keep, maximum=max(2, branches)),
            gr.skip() if branches == branches_before else branches,
            preset_name(spec) or CUSTOM,
            shown.nonzero.html(),
            shown.compute.html(),
            *self._measured_cards(loaded, spec, text, self._invitation(loaded, spec, text)),
            shown.histograms,
            shown.heat,
            shown.snippet,
        )

    def lesson(
        self, model: str, branches: int, fade: float, keep: int, compensation: str, layer: int
    ) -> tuple[str, str, str, str]:
        return lesson(*self._chosen(model, branches, fade, keep, compensation), layer)

    def measure_if_quick(
        self, model: str, branches: int, fade: float, keep: int, compensation: str, text: str,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        loaded, spec = self._chosen(model, branches, fade, keep, compensation)
        if self._is_quick(loaded, spec, text):
            yield from self._measure(loaded, spec, text, request)

    def measure(
        self, model: str, branches: int, fade: float, keep: int, compensation: str, text: str,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        loaded, spec = self._chosen(model, branches, fade, keep, compensation)
        self._look_at(request, (loaded.key, spec, text))
        yield from self._measure(loaded, spec, text, request, speed_again=True)

    def stop_measuring(
        self, model: str, branches: int, fade: float, keep: int, compensation: str, text: str,
        request: gr.Request,
    ) -> tuple[str, str]:  # fmt: skip
        self._look_at(request, ())
        loaded, spec = self._chosen(model, branches, fade, keep, compensation)
        return self._measured_cards(loaded, spec, text, "stopped; press Measure")

    def write(
        self, model: str, branches: int, fade: float, keep: int, compensation: str,
        prompt: str, tokens: int, temperature: float,
    ) -> Iterator[tuple[str, str, str]]:  # fmt: skip
        """Dense text, converted text, report."""
        check_writing(prompt, tokens, temperature)
        loaded, spec = self._chosen(model, branches, fade, keep, compensation)
        models = (loaded.model, loaded.converted(spec))
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
        self, model: str, branches: int, fade: float, keep: int, compensation: str
    ) -> tuple[LoadedModel, ConversionSpec]:
        return self.workbench.loaded(model), _spec(branches, fade, keep, compensation)

    def _measure(
        self,
        loaded: LoadedModel,
        spec: ConversionSpec,
        text: str,
        request: gr.Request,
        speed_again: bool = False,
    ) -> Iterator[tuple[str, str]]:
        """The cards of perplexity and speed, as the measurement goes on."""
        look = (loaded.key, spec, text)
        if loaded.known_evaluation(spec, text) is None:
            yield self._measured_cards(loaded, spec, text, "measuring …")
        for step in loaded.evaluate(spec, text):
            if self._latest.get(request.session_hash) != look:
                return  # overtaken by a later change
            if not isinstance(step, Evaluation):
                message = f"measuring, {step.done / step.total:.0%}"
                yield self._measured_cards(loaded, spec, text, message)
        if speed_again or loaded.known_speed(spec) is None:
            perplexity, _ = self._measured_cards(loaded, spec, text, "")
            yield perplexity, pending_speed_card("measuring …").html()
            loaded.speed(spec, again=speed_again)
        if self._latest.get(request.session_hash) == look:
            yield self._measured_cards(loaded, spec, text, "")

    def _measured_cards(
        self, loaded: LoadedModel, spec: ConversionSpec, text: str, message: str
    ) -> tuple[str, str]:
        evaluation, speed = loaded.known_evaluation(spec, text), loaded.known_speed(spec)
        perplexity = (
            perplexity_card(evaluation, text)
            if evaluation
            else pending_perplexity_card(loaded.known_dense(text), text, message)
        )
        return perplexity.html(), (
            speed_card(speed, loaded) if speed else pending_speed_card(message)
        ).html()

    def _invitation(self, loaded: LoadedModel, spec: ConversionSpec, text: str) -> str:
        if self._is_quick(loaded, spec, text):
            return "measuring …"
        return f"press Measure, about {loaded.seconds_to_measure(spec, text):.0f} s"

    def _is_quick(self, loaded: LoadedModel, spec: ConversionSpec, text: str) -> bool:
        return loaded.key == DEMO_KEY or loaded.seconds_to_measure(spec, text) < QUICK_SECONDS

    def _look_at(self, request: gr.Request, look: tuple) -> None:
        self._latest[request.session_hash] = look
        self._latest.move_to_end(request.session_hash)
        while len(self._latest) > VISITORS_REMEMBERED:
            self._latest.popitem(last=False)


def _sentence(error: UserError) -> str:
    message = str(error)
    return escape(message[:1].upper() + message[1:], quote=False)


def settle_keep(branches: int, keep: int, branches_before: int) -> int:
    """K after B moved: all branches stay all, and K never exceeds B."""
    return branches if keep == branches_before else min(keep, branches)


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


def _spec(branches: int, fade: float, keep: int, compensation: str) -> ConversionSpec:
    """The spec of the controls; keeping all is `keep=None`, so that equal specs are equal.

    K exceeds B for a moment while B is moved down; then all are kept, as `settle_keep` decides.
    """
    keep_all = keep >= branches
    return ConversionSpec(
        branches=branches,
        fade=fade,
        keep=None if keep_all else keep,
        compensation="sqrt" if keep_all else compensation,
    )


def _most_branches(loaded: LoadedModel) -> int:
    return min(MAX_BRANCHES, loaded.d_ff)
