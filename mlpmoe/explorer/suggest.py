"""What happens on the tab Suggest: a budget in, measured recipes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from time import time_ns
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from ..core.calibration import Calibration
from ..core.conversion import observe
from ..core.errors import UserError
from ..core.presets import PRESETS
from ..core.spec import ConversionSpec
from ..measure.encoding import scored_tokens
from ..measure.notation import change, signed_percent
from ..measure.search import (
    COSTS,
    SEARCH_TOKENS,
    Budget,
    best,
    finalists,
    front,
    scoring_text,
    search,
)
from ..measure.sweep import Run
from ..measure.words import in_words
from ..models import default_calibration, default_text, named_calibration
from .background import in_thread
from .front_plot import front_plot
from .links import Link
from .loaded import Calibrated, LoadedModel
from .records import Record, measured_record, write_records
from .suggest_panel import EMPTY
from .texts import text_name
from .workbench import Workbench

MAX_SECONDS = 300


@dataclass
class _Found:
    """What a search has come to so far."""

    budget: Budget
    tried: list[Run]  # on the text the search goes by
    measured: list[Run]  # on the evaluation text
    records: list[Record]  # the same, for the visitor's browser to keep


class SuggestHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self._running: set[str] = set()  # sessions that search
        self._stopping: set[str] = set()  # of these, those that pressed Stop

    def choose_goal(self, goal: str) -> tuple:
        """Which slider counts."""
        return gr.update(visible=goal != "perplexity"), gr.update(visible=goal == "perplexity")

    def stop(self, request: gr.Request) -> str:
        """End what is under way: a search goes on with measuring what it found, and measuring
        ends with what it has."""
        if request.session_hash not in self._running:
            return ""
        self._stopping.add(request.session_hash)
        return _status("stopping")

    def suggest(
        self, request: gr.Request, model: str, goal: str, share: float, increase: float,
        calibrated: bool, seconds: float,
    ) -> Iterator[tuple]:  # fmt: skip
        """Status, sentence, plot, table and the specs of its rows, as the search goes on."""
        session = request.session_hash
        self._running.add(session)
        try:
            yield from self._suggest(session, model, goal, share, increase, calibrated, seconds)
        finally:
            self._running.discard(session)
            self._stopping.discard(session)

    def _suggest(
        self, session: str, model: str, goal: str, share: float, increase: float,
        calibrated: bool, seconds: float,
    ) -> Iterator[tuple]:  # fmt: skip
        loaded = self.workbench.loaded(model)
        budget = read_budget(goal, share, increase)
        found = _Found(budget, [], [], [])
        unchanged = (gr.skip(),) * 4
        shown = 0
        for message in self._search(loaded, found, calibrated, min(seconds, MAX_SECONDS)):
            plot = gr.skip()
            if len(found.tried) > shown:
                shown, plot = len(found.tried), self._plot(loaded, found)
            yield _status(message), gr.skip(), plot, gr.skip(), gr.skip(), gr.skip()
            if session in self._stopping and found.tried:
                break
        self._stopping.discard(session)
        specs = finalists(found.tried, budget)
        for number, spec in enumerate(specs, 1):
            what = f"measuring find {number} of {len(specs)}"
            for message in _measure(loaded, spec):
                yield _status(f"{what}: {message}"), gr.skip(), *unchanged
            record = measured_record(
                loaded, loaded.asked(spec), default_text(loaded.key), "suggest"
            )
            found.measured.append(record.run)
            found.records.append(record)
            if session in self._stopping:
                break
            yield (
                _status(what), gr.skip(), self._plot(loaded, found), *_table(loaded, found),
                write_records([record]),
            )  # fmt: skip
        yield (
            _status(""), sentence(loaded, found), self._plot(loaded, found),
            *_table(loaded, found), write_records(found.records) if found.records else gr.skip(),
        )  # fmt: skip

    def _plot(self, loaded: LoadedModel, found: _Found) -> go.Figure:
        return front_plot(
            found.tried, found.measured, found.budget, lambda run: _query(loaded, run)
        )

    def _search(
        self, loaded: LoadedModel, found: _Found, calibrated: bool, seconds: float
    ) -> Iterator[str]:
        """Fill `found.tried`, yielding what is being done; closing the iterator stops."""
        text = named_calibration(default_calibration(loaded.key))
        scoring = scoring_text(loaded.tokenizer, text)

        def work(report: Any) -> None:
            observed = None
            if calibrated:
                report("calibrating")
                tokens = Calibration.from_text(loaded.tokenizer, text, SEARCH_TOKENS)
                observed = observe(loaded.model, tokens)
            runs = search(
                loaded.model, scoring, found.budget, observed, seconds,
                report=lambda message: report(f"searching, {message}"),
            )  # fmt: skip
            for run in runs:
                found.tried.append(run)
                report(f"searching, {len(found.tried)} tried")

        yield from in_thread(work)

    def take(self, specs: list[str], event: gr.SelectData) -> str:
        """What is to be restored: a row, and the time, so that a second click counts too."""
        row = event.index[0] if isinstance(event.index, list | tuple) else event.index
        if not isinstance(row, int) or not 0 <= row < len(specs):
            return gr.skip()
        return f"{specs[row]} {time_ns()}"

    def another_model(self) -> tuple:
        """Everything, when what it showed was another model's."""
        return "", EMPTY, empty_plot(), [], []


def read_budget(goal: str, share: float, increase: float) -> Budget:
    if goal == "perplexity":
        return Budget("nonzero", None, 1 + increase / 100)
    if not isinstance(goal, str) or goal not in COSTS:
        raise UserError(f"{goal!r:.60} is no budget; allowed: {', '.join(COSTS)}, perplexity.")
    return Budget(goal, share / 100)


def sentence(loaded: LoadedModel, found: _Found) -> str:
    """What the best spec does and costs, in plain words."""
    chosen = best(found.measured, found.budget)
    if chosen is None:
        return (
            "<p>Nothing within this budget was found. Give the search more seconds, or a larger "
            "budget.</p>"
        )
    words = in_words(chosen.spec)
    tokens = scored_tokens(loaded.windows(default_text(loaded.key)))
    text = (
        f"<p><strong>{escape(words[:1].upper() + words[1:])}.</strong> Perplexity "
        f"{change(chosen.ratio, chosen.stderr)}, non-zero MLP parameters "
        f"{signed_percent(chosen.mlp_nonzero_share - 1)}, MLP multiply-adds "
        f"{signed_percent(chosen.mlp_macs_share - 1)}.</p>"
    )
    presets = [run for run in found.measured if run.spec in PRESETS.values()]
    rival = best(presets, found.budget)
    if rival and rival.spec != chosen.spec:
        name = next(name for name, spec in PRESETS.items() if spec == rival.spec)
        text += (
            f"<p>The best preset within the budget, {escape(name.rstrip(' *'))}: perplexity "
            f"{change(rival.ratio, rival.stderr)}.</p>"
        )
    return (
        f'{text}<p class="note">{len(found.tried)} recipes tried, {len(found.measured)} measured '
        f"on {tokens:,} tokens of the {text_name(default_text(loaded.key))}.</p>"
    )


def empty_plot() -> go.Figure:
    return front_plot([], [], Budget(share=0.7))


def _measure(loaded: LoadedModel, spec: ConversionSpec) -> Iterator[str]:
    asked = loaded.asked(spec)
    if isinstance(asked, Calibrated):
        yield from loaded.convert(asked)
    for step in loaded.evaluate(asked, default_text(loaded.key)):
        yield f"perplexity, {step.dense.tokens / step.total:.0%}"


def _table(loaded: LoadedModel, found: _Found) -> tuple[list[list[str]], list[str]]:
    """Rows of the measured specs, the cheapest first, and their query strings."""
    runs = sorted(found.measured, key=lambda run: (found.budget.cost_of(run), run.ratio))
    best_ones = front(found.measured, found.budget)
    chosen = best(found.measured, found.budget)
    return [_row(run, run in best_ones, run == chosen) for run in runs], [
        _query(loaded, run) for run in runs
    ]


def _query(loaded: LoadedModel, run: Run) -> str:
    return Link(loaded.key, run.spec).to_query()


def _row(run: Run, unbeaten: bool, chosen: bool) -> Sequence[str]:
    words = in_words(run.spec)
    name = next((name for name, spec in PRESETS.items() if spec == run.spec), None)
    note = f"Preset {name.rstrip(' *')}: " if name else ""
    mark = "★ " if chosen else "" if unbeaten else "(beaten) "
    return [
        change(run.ratio, run.stderr),
        signed_percent(run.mlp_nonzero_share - 1),
        signed_percent(run.mlp_macs_share - 1),
        f"{mark}{note}{words}",
    ]


def _status(text: str) -> str:
    return f"<p>{escape(text)} …</p>" if text else ""
