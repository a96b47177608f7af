"""What happens on the tab Generations: both models go on from one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from numbers import Integral, Real
from time import monotonic
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.spec import ConversionSpec
from ..measure.generation import Writing, parted_at, write_side_by_side
from ..measure.words import in_short
from ..models.catalogue import DEMO_KEY
from .asked import Calibrated, spec_of
from .generations_panel import BEGINNINGS, MAX_NEW_TOKENS, MAX_PROMPT, QUESTIONS, STORIES
from .loaded import LoadedModel
from .settings import parted, read_asked
from .workbench import Workbench

WRITING_SECONDS = 120.0  # after that, writing stops
UPDATES_PER_SECOND = 20  # of streamed text
TEMPERATURE = 0.6  # for stories, which repeat themselves at 0


class GenerationHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def another_model(self, model: str, prompt: str) -> tuple:
        """Prompt and examples of the model's kind, and how it is best tried; empty panes. A prompt
        of the visitor's own stays."""
        loaded = self.workbench.loaded(model)
        prompts = prompts_for(loaded)
        ours = not prompt.strip() or prompt in (*STORIES, *QUESTIONS, *BEGINNINGS)
        return (
            prompts[0] if ours else gr.skip(),
            gr.update(samples=[[example] for example in prompts]),
            TEMPERATURE if prompts is STORIES else 0,
            *[""] * 3,
        )

    def write(self, model: str, *values: Any) -> Iterator[tuple[str, str, str]]:
        """Dense text, converted text, report."""
        settings, (prompt, tokens, temperature) = parted(values)
        check_writing(prompt, tokens, temperature)
        loaded = self.workbench.loaded(model)
        asked = read_asked(loaded, settings)
        spec = spec_of(asked)
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
                yield *_texts(writings), f"<p>writing with {in_short(spec)} …</p>"
            if now - started > WRITING_SECONDS:
                gr.Info(f"Stopped after {WRITING_SECONDS:.0f} seconds.")
                break
        yield *_texts(writings), writing_report(loaded, spec, writings)


def prompts_for(loaded: LoadedModel) -> tuple[str, ...]:
    """What the model can go on from."""
    if loaded.key == DEMO_KEY:
        return STORIES
    return QUESTIONS if loaded.tokenizer.chat_template else BEGINNINGS


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
            f"They differ from token {at + 1} on: dense writes <code>{first}</code>, "
            f"converted <code>{second}</code>."
        )
    return f"<p>Written with {escape(in_short(spec))}. {parting}</p><table>{rows}</table>"


def _texts(writings: tuple[Writing, ...]) -> tuple[str, ...]:
    return tuple(writing.text.lstrip() for writing in writings)
