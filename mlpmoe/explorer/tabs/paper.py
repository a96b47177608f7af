"""What happens at the paper's tables: the same rows for the loaded model, as they are ready."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr

from ...measure.cost.speed import ROUNDS
from ...measure.quality.estimate import Evaluation
from ...measure.runs.paper import (
    FADED,
    VARIANTS,
    GenerationTime,
    ReproducedRow,
    generation_rounds,
    published_table,
)
from ...models import default_text
from ..server.background import in_thread
from ..server.events import status
from ..server.jobs import Jobs
from ..server.loaded import LoadedModel
from ..server.texts import text_name
from ..server.workbench import Workbench
from .paper_table import ModelFigures, reproduced_notes, reproduced_table

PROXY = "proxy"
Report = Callable[[str, float | None], None]


class PaperHandlers:
    """The events of the paper's tables over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.jobs = Jobs()  # stopped, what is measured is kept
        self._times: WeakKeyDictionary[LoadedModel, dict[str, GenerationTime]] = (
            WeakKeyDictionary()
        )  # by variant

    def show(self, request: gr.Request, model: str) -> tuple[Any, str, str]:
        """Status, what is known of this model, and the commands that measure it."""
        loaded = self.workbench.loaded(model)
        job = self.jobs.of(request)
        here = job is not None and job.about == loaded.key
        if job is not None and not here:
            job.left = job.stopped = True
        return gr.skip() if here else "", self._table(loaded), snippet(loaded.key)

    def reproduce(self, request: gr.Request, model: str) -> Iterator[tuple[Any, Any]]:
        """Status and table, which fills up and sharpens."""
        loaded = self.workbench.loaded(model)
        for spec in VARIANTS.values():
            spec.check_fits(loaded.d_ff)
        started, said = monotonic(), ""
        with (
            self.jobs.doing(request, loaded.key) as job,
            closing(in_thread(lambda report: self._measure(loaded, report))) as work,
        ):
            for doing in work:
                if job.stopped:
                    ended = "Stopped. What is measured stays; Reproduce goes on."
                    break
                if doing != said:
                    said = doing
                    yield status(f"{doing} …"), self._table(loaded)
            else:
                ended = f"Done in {monotonic() - started:.0f} s."
        if job.left:
            yield gr.skip(), gr.skip()
        else:
            yield status(ended), self._table(loaded)

    def _measure(self, loaded: LoadedModel, report: Report) -> None:
        """Make all figures known; the longest text comes last."""
        for variant, spec in VARIANTS.items():
            report(f"{variant}: counting", None)
            loaded.structure.report(spec)
        _evaluate(loaded, PROXY, report)
        self._time(loaded, report)
        _evaluate(loaded, default_text(loaded.key), report)

    def _time(self, loaded: LoadedModel, report: Report) -> None:
        for variant, spec in VARIANTS.items():
            report(f"{variant}: generation, warming up", None)
            rounds = generation_rounds(loaded.model, loaded.converted(spec), turn=loaded.turns.turn)
            for number, time in enumerate(rounds, 1):
                if time:
                    self._times.setdefault(loaded, {})[variant] = time
                report(f"{variant}: generation, round {number} of {ROUNDS}", None)

    def _table(self, loaded: LoadedModel) -> str:
        texts = (PROXY, default_text(loaded.key))
        times = self._times.get(loaded, {})
        rows = [
            ReproducedRow(
                variant,
                loaded.structure.known_report(spec),
                tuple(_windows_only(loaded.known_evaluation(spec, text)) for text in texts),
                times.get(variant),
            )
            for variant, spec in VARIANTS.items()
        ]
        model = ModelFigures(
            label=loaded.label,
            dtype=str(loaded.checked.dtype).removeprefix("torch."),
            device=loaded.checked.device.type,
            report=loaded.report,
            faded_weights=_faded_weights(loaded),
            texts=("our proxy text", text_name(texts[1])),
            perplexities=tuple(
                _windows_only(loaded.known_evaluation(None, text)) for text in texts
            ),
            published=published_table(loaded.key),
        )
        return reproduced_table(model, rows) + reproduced_notes(model, rows)


def _evaluate(loaded: LoadedModel, text: str, report: Report) -> None:
    for variant, spec in VARIANTS.items():
        doing = f"{variant}: perplexity on the {text_name(text)}"
        report(doing, None)
        for step in loaded.evaluate(spec, text):
            report(doing, step.dense.tokens / step.total)


def snippet(model: str) -> str:
    """Rows and texts as commands; each also measures the dense row."""
    commands = [
        f"python -m mlpmoe evaluate {shlex.quote(model)} {spec.to_flags()} --text {text}"
        for text in (PROXY, default_text(model))
        for spec in VARIANTS.values()
    ]
    return "\n".join(commands) + "\n"


def _faded_weights(loaded: LoadedModel) -> int:
    names = [name for name in VARIANTS[FADED].projections if name in loaded.projections]
    return sum(getattr(mlp.weights, name).numel() for mlp in loaded.mlps for name in names)


def _windows_only(evaluation: Evaluation | None) -> Evaluation | None:
    """Without a first look, whose short pieces give another ratio."""
    return None if evaluation is None or evaluation.look else evaluation
