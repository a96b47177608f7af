"""The four endpoints for programs: /models, /preview, /evaluate, /generate.

Signatures and docstrings are what `gradio_client` users see. Values are checked here, because a
program can send anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..core.checks import known
from ..core.errors import UserError
from ..core.routed import ROUTED_METHODS
from ..core.spec import ConversionSpec
from ..core.written import SPARSITY
from ..measure.text.generation import parted_at
from ..models import CATALOGUE, default_text
from .server.asked import Conversion, spec_of
from .server.background import each_in_thread
from .server.events import IN_TURNS, readable
from .server.loaded import LoadedModel
from .server.turns import Place
from .server.workbench import Workbench
from .shell.answer import check_writing, in_turns
from .shell.preview import summary

USUAL = {"branches": 16, "fade": 0.0, "keep": None, "compensation": "sqrt"}


def add_endpoints(workbench: Workbench) -> None:
    """Register the endpoints on the Blocks under construction."""

    def models() -> list[dict]:
        """The models on offer: key, label, parameters, note, needs_gpu, loaded."""
        return [
            {
                "key": entry.key,
                "label": entry.label,
                "parameters": entry.parameters,
                "note": entry.note,
                "needs_gpu": entry.needs_gpu,
                "loaded": workbench.holds(entry.key),
            }
            for entry in CATALOGUE
        ]

    def find(
        model: str, branches: int, fade: float, keep: int | None, compensation: str,
        more: dict[str, Any] | None,
    ) -> tuple[LoadedModel, Conversion]:  # fmt: skip
        if not isinstance(more, dict | None):
            raise UserError("more must be an object: further fields of ConversionSpec by name.")
        more = more or {}
        common = {
            "branches": branches, "fade": fade, "keep": keep, "compensation": compensation
        }  # fmt: skip
        # what stands there unasked is not part of a routed spec, nor is a fade beside a sparsity
        if known(more.get("method"), ROUTED_METHODS) or SPARSITY in more:
            common = {name: value for name, value in common.items() if value != USUAL[name]}
        spec = ConversionSpec.from_dict(common | more)
        loaded = workbench.loaded(model)
        loaded.check_fits(spec)
        asked = loaded.asked(spec)
        if loaded.is_to_train(asked):
            raise UserError(
                "programs begin no training on this page: press Measure there first, or use the "
                "library or the shell."
            )
        return loaded, asked

    @readable
    def preview(
        model: str = "demo",
        branches: int = 16,
        fade: float = 0.0,
        keep: int | None = None,
        compensation: str = "sqrt",
        more: dict | None = None,
    ) -> dict:
        """Parameters, zeros and compute of a conversion.

        more: further fields of ConversionSpec by name, such as {"order": "norm"} or
        {"method": "cmoe", "active": 0.5}. Quick, unless a stage looks at a calibration text.
        """
        return summary(*find(model, branches, fade, keep, compensation, more))

    @readable
    def evaluate(
        model: str = "demo",
        branches: int = 16,
        fade: float = 0.0,
        keep: int | None = None,
        compensation: str = "sqrt",
        text: str | None = None,
        more: dict | None = None,
    ) -> Iterator[dict]:
        """Perplexity of both models on a text: "stories", "prose", "proxy", "wikitext2" or "c4";
        None is the one of the model's kind.

        Streams {"done", "total", "doing"}: tokens, and what is being done; with "before" and
        "seconds" (turns of others, and about how long they take) while it waits. The last message
        holds the result.
        """
        loaded, asked = find(model, branches, fade, keep, compensation, more)
        text = default_text(loaded.key) if text is None else text
        done, total = 0, loaded.plan(text).tokens
        for message in loaded.convert(asked):
            yield {"done": done, "total": total} | _doing(message)
        for step in each_in_thread(loaded.evaluate(asked, text)):
            if isinstance(step, Place):
                yield {"done": done, "total": total} | _doing(step)
            elif step.complete:
                yield {
                    "spec": spec_of(asked).to_dict(),
                    "text": text,
                    "tokens": step.dense.tokens,
                    "dense": step.dense.value,
                    "dense_stderr": step.dense.stderr,
                    "converted": step.converted.value,
                    "converted_stderr": step.converted.stderr,
                    "ratio": step.change.ratio,
                    "ratio_stderr": step.change.stderr,
                    "measurable": step.change.measurable,
                    "bits_per_byte": step.converted.bits_per_byte,
                }
            else:
                done, total = 0 if step.look else step.dense.tokens, step.total
                yield {"done": done, "total": total} | _doing("measuring")

    @readable
    def generate(
        prompt: str,
        model: str = "demo",
        branches: int = 16,
        fade: float = 0.0,
        keep: int | None = None,
        compensation: str = "sqrt",
        tokens: int = 64,
        temperature: float = 0.0,
        more: dict | None = None,
    ) -> Iterator[dict]:
        """Dense and converted model continue a prompt in lockstep.

        Streams {"dense", "converted", "tokens", "parted_at", "doing"}; parted_at is the index of
        the first token that differs, or null; with "before" and "seconds" (turns of others, and
        about how long they take) while it waits. The last message has no "doing".
        """
        check_writing(prompt, tokens, temperature)
        loaded, asked = find(model, branches, fade, keep, compensation, more)
        written = {"dense": "", "converted": "", "tokens": [0, 0], "parted_at": None}
        for message in loaded.convert(asked):
            yield written | _doing(message)
        steps = loaded.write(asked, prompt, tokens, temperature)
        for step in each_in_thread(in_turns(loaded, steps)):
            if isinstance(step, Place):
                yield written | _doing(step)
                continue
            for dense, converted in step:
                written = {
                    "dense": dense.text,
                    "converted": converted.text,
                    "tokens": [len(dense.tokens), len(converted.tokens)],
                    "parted_at": parted_at(dense.tokens, converted.tokens),
                }
                yield written | _doing("writing")
        yield written

    gr.api(models, api_name="models")
    gr.api(preview, api_name="preview", **IN_TURNS)
    gr.api(evaluate, api_name="evaluate", **IN_TURNS)
    gr.api(generate, api_name="generate", **IN_TURNS)


def _doing(message: str) -> dict[str, Any]:
    """What is being done, for a program; and its place in the line, while it waits."""
    place = isinstance(message, Place) and {"before": message.ahead, "seconds": message.seconds}
    return {"doing": str(message)} | (place or {})
