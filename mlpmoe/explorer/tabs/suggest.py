"""What happens on the tab Suggest: a budget in, measured recipes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate
from time import monotonic, time_ns
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from ...core.calibration import Calibration
from ...core.errors import UserError
from ...core.presets import PRESETS
from ...core.spec import ConversionSpec
from ...measure.notation import change, signed_percent
from ...measure.quality.encoding import scored_tokens
from ...measure.runs.deadline import Deadline, TimeUp
from ...measure.runs.pace import about
from ...measure.runs.search import COSTS, Budget, best, finalists, front, search
from ...measure.runs.sweep import Run
from ...measure.runs.trials import Trials, prepare
from ...measure.words import capital, in_words
from ...models import default_calibration, default_text, named_calibration
from ..plots.front_plot import front_plot
from ..server.background import in_thread
from ..server.events import status
from ..server.jobs import Jobs
from ..server.loaded import LoadedModel
from ..server.measuring import measuring
from ..server.texts import text_name
from ..server.workbench import Workbench
from ..shell.links import Link
from ..shell.records import Record, measured_record, write_records
from .suggest_panel import EMPTY

MAX_SECONDS = 300


@dataclass
class _Found:
    """What a search has come to so far."""

    budget: Budget
    tried: list[Run] = field(default_factory=list)  # on the text the search goes by
    measured: list[Run] = field(default_factory=list)  # on the evaluation text
    # the same, for the visitor's browser to keep
    records: list[Record] = field(default_factory=list)
    left_out: int = 0  # finds for which there was no time
    trials: Trials | None = None
    calibration: Calibration | None = None  # that finds are measured with
    shown: tuple[int, int] = (0, 0)  # tried, measured


class SuggestHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        # A search goes on with measuring what it found, and that ends with what it has.
        self.jobs = Jobs()

    def choose_goal(self, goal: str) -> tuple:
        """Which slider counts."""
        return gr.update(visible=goal != "perplexity"), gr.update(visible=goal == "perplexity")

    def suggest(
        self, request: gr.Request, model: str, goal: str, share: float, increase: float,
        calibrated: bool, seconds: float,
    ) -> Iterator[tuple]:  # fmt: skip
        """Status, sentence, plot, table and the specs of its rows, as the search goes on."""
        loaded = self.workbench.loaded(model)
        found, seconds = _Found(read_budget(goal, share, increase)), min(seconds, MAX_SECONDS)
        for work in (_search(loaded, found, calibrated, seconds), _measure(loaded, found, seconds)):
            with self.jobs.doing(request) as job, closing(work):
                for message in work:
                    yield status(f"{message} …"), gr.skip(), *_news(loaded, found)
                    if job.stopped:
                        break
        yield (
            "", sentence(loaded, found), _plot(loaded, found), *_table(loaded, found),
            write_records(found.records) if found.records else gr.skip(),
        )  # fmt: skip

    def take(self, specs: list[str], event: gr.SelectData) -> str:
        """What is to be restored: a row, and the time, so that a second click counts too."""
        row = event.index[0] if isinstance(event.index, list | tuple) else event.index
        if not isinstance(row, int) or not 0 <= row < len(specs):
            return gr.skip()
        return f"{specs[row]} {time_ns()}"

    def another_model(self) -> tuple:
        """Everything, when what it showed was another model's."""
        return "", EMPTY, empty_plot(), [], []


def _search(loaded: LoadedModel, found: _Found, calibrated: bool, seconds: float) -> Iterator[str]:
    """Fill `found.tried`, yielding what is being done; closing the iterator stops."""

    def work(report: Any) -> None:
        text = named_calibration(default_calibration(loaded.key))
        report("searching")
        if calibrated:
            found.calibration = Calibration.from_text(loaded.tokenizer, text)

        def told(message: str, share: float | None = None) -> None:
            report(f"searching, {message}", share)

        with loaded.turns.turn(long=True), suppress(TimeUp):
            deadline = Deadline(seconds)  # from the first turn on
            found.trials = prepare(
                loaded.model, loaded.tokenizer, text, found.calibration, deadline, told
            )
            for run in search(found.trials, found.budget, deadline, report=told):
                found.tried.append(run)

    with loaded.in_use():
        yield from in_thread(work)


def _measure(loaded: LoadedModel, found: _Found, seconds: float) -> Iterator[str]:
    """Measure the best finds and fill `found.measured`, yielding what is being done and for how
    long. The best is measured however long it takes, others if all fit into the seconds that the
    search had; closing the iterator leaves the one under way."""
    specs, text = finalists(found.tried, found.budget), default_text(loaded.key)
    if not specs:
        return
    times = yield from in_thread(lambda report: _forecast(loaded, found, specs, report))
    count = sum(end <= seconds for end in accumulate(times)) or 1
    found.left_out = len(specs) - count
    for number, spec in enumerate(specs[:count]):
        started, what = monotonic(), f"measuring find {number + 1} of {count}"
        for message in measuring(loaded, loaded.asked(spec), text):
            left = sum(times[number:count]) - (monotonic() - started)
            yield f"{what}{f', {about(left)} left' if left > 0 else ''}: {message}"
        record = measured_record(loaded, loaded.asked(spec), text, "suggest")
        found.measured.append(record.run)
        found.records.append(record)
        yield what


def _forecast(
    loaded: LoadedModel, found: _Found, specs: Sequence[ConversionSpec], report: Any
) -> list[float]:
    """About how many seconds each takes to be measured after those before it."""
    report("seeing how long measuring will take")
    text = default_text(loaded.key)
    tokens, dense = loaded.plan(text).tokens, loaded.known_dense(text)
    known = {s: loaded.known_evaluation(loaded.asked(s), text) for s in specs}
    missing = [spec for spec, one in known.items() if not (one and one.complete)]
    calibration = found.calibration.samples.numel() if found.calibration else 0
    with loaded.turns.turn(long=True):
        seconds = found.trials.forecast(
            missing, tokens, calibration, dense is None or dense.tokens < tokens
        )
    times = dict(zip(missing, seconds, strict=True))
    return [times.get(spec, 0.0) for spec in specs]


def _news(loaded: LoadedModel, found: _Found) -> tuple:
    """Plot, table, the specs of its rows and the latest record, where there is more to show than
    before."""
    known = len(found.tried), len(found.measured)
    tried, measured = (now > before for now, before in zip(known, found.shown, strict=True))
    found.shown = known
    return (
        _plot(loaded, found) if tried or measured else gr.skip(),
        *(_table(loaded, found) if measured else (gr.skip(),) * 2),
        write_records(found.records[-1:]) if measured else gr.skip(),
    )


def _plot(loaded: LoadedModel, found: _Found) -> go.Figure:
    return front_plot(found.tried, found.measured, found.budget, lambda run: _query(loaded, run))


def read_budget(goal: str, share: float, increase: float) -> Budget:
    if goal == "perplexity":
        return Budget("nonzero", None, 1 + increase / 100)
    if not isinstance(goal, str) or goal not in COSTS:
        raise UserError(f"{goal!r:.60} is not a budget; allowed: {', '.join(COSTS)}, perplexity.")
    return Budget(goal, share / 100)


def sentence(loaded: LoadedModel, found: _Found) -> str:
    """What the best spec does and costs, in plain words."""
    chosen = best(found.measured, found.budget)
    if chosen is None:
        return f"<p>{_why_nothing(loaded, found)}</p>"
    words = in_words(chosen.spec)
    tokens = scored_tokens(loaded.windows(default_text(loaded.key)))
    text = (
        f"<p><strong>{escape(capital(words))}.</strong> Perplexity "
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
    more = f" There was no time for {found.left_out} more." if found.left_out else ""
    if found.calibration and found.trials.calibration is None:
        more += " There was no time to look at a calibration text."
    return (
        f'{text}<p class="note">{len(found.tried)} recipes tried, {len(found.measured)} measured '
        f"on {tokens:,} tokens of the {text_name(default_text(loaded.key))}.{more}</p>"
    )


def _why_nothing(loaded: LoadedModel, found: _Found) -> str:
    if not found.tried and not found.measured:
        return "Nothing was tried in that time. Give the search more seconds."
    if best(found.tried, found.budget) and not found.measured:
        return (
            f"Stopped before a find was measured on the {text_name(default_text(loaded.key))}. The "
            "points are what was tried on other text."
        )
    return "Nothing within this budget was found. Give the search more seconds, or a larger budget."


def empty_plot() -> go.Figure:
    return front_plot([], [], Budget(share=0.7))


def _table(loaded: LoadedModel, found: _Found) -> tuple[list[list[str]], list[str]]:
    """Rows of the measured specs, the cheapest first, and their query strings."""
    runs = sorted(found.measured, key=lambda run: (found.budget.cost_of(run), run.ratio))
    best_ones = front(found.measured, found.budget)
    chosen = best(found.measured, found.budget)
    return [_row(run, run in best_ones, run == chosen) for run in runs], [
        _query(loaded, run) for run in runs
    ]


def _query(loaded: LoadedModel, run: Run) -> str:
    return Link(loaded.key, run.spec, default_text(loaded.key)).to_query()


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
