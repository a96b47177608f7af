"""What happens in a sweep: a plan before it starts, and runs as they come."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gradio as gr

from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...core.written import flag_of
from ...measure.runs.grid import grid, read_values
from ...measure.runs.pace import about
from ..server.events import sentence, status
from ..server.jobs import Jobs
from ..server.loaded import LoadedModel
from ..server.measuring import measuring
from ..server.texts import OWN_PREFIX
from ..server.workbench import Workbench
from ..shell.links import Link
from ..shell.records import Record, measured_record, read_records, write_records
from ..shell.settings import check_shown
from .sweep_panel import ROUTED, STATIC

MOST_RUNS = 250  # of one sweep on the page; the shell takes more
SENT_AGAIN = 5  # runs; the page may pass over one of two messages that come at the same moment


@dataclass(frozen=True)
class Plan:
    """What a sweep will do."""

    missing: tuple[ConversionSpec, ...]
    known: int  # measured before
    left_out: int  # K beyond B

    @property
    def runs(self) -> int:
        return len(self.missing) + self.known


class SweepHandlers:
    """The events of the sweep over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.jobs = Jobs()  # stopped, what is measured is kept

    def plan(self, model: str, text: str, stored: str, *values: Any) -> tuple[str, str]:
        """How many runs and how long, in a sentence; and the sweep in the shell."""
        loaded = self.workbench.loaded(model)
        try:
            words = in_words(self._plan(loaded, text, stored, values), loaded, text)
        except UserError as error:
            # the shell's flags have dashes in front, the page's fields have not
            plain = UserError(re.sub(r"--(?=\w)", "", str(error)))
            return f'<p class="problem">{sentence(plain)}</p>', gr.skip()
        return f"<p>{words}</p>", snippet(model, text, values)

    def sweep(
        self, request: gr.Request, model: str, text: str, stored: str, *values: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Status and new runs. Stopped, it leaves what it has measured."""
        loaded = self.workbench.loaded(model)
        plan = self._plan(loaded, text, stored, values)
        records: list[Record] = []
        started = monotonic()
        with (
            self.jobs.doing(request) as job,
            closing(self._measured(loaded, text, plan, records)) as work,
        ):
            for where, found in work:
                if found:
                    yield gr.skip(), write_records(records[-SENT_AGAIN:])
                elif not job.stopped:
                    yield status(where), gr.skip()
                if job.stopped:
                    break
        seconds = monotonic() - started
        done = f"{len(records)} measured in {seconds:.0f} s" if records else "nothing measured"
        if job.stopped:
            left = len(plan.missing) - len(records)
            yield status(f"Stopped: {done}, {left} left. Sweep goes on with them."), gr.skip()
        else:
            yield status(f"Done: {done}, {plan.known} were there before."), gr.skip()

    def _measured(
        self, loaded: LoadedModel, text: str, plan: Plan, records: list[Record]
    ) -> Iterator[tuple[str, bool]]:
        """What is being done and for how long, and whether a record was added. Closing the
        iterator leaves the run that is under way."""
        calibrates = any(spec.needs_calibration for spec in plan.missing)
        each, started = None if calibrates else _seconds_each(plan, loaded, text), monotonic()
        for done, spec in enumerate(plan.missing):
            where, begun = f"run {done + 1} of {len(plan.missing)}", monotonic()
            each = (begun - started) / done if done else each
            yield f"{where} …", False
            asked = loaded.asked(spec)
            for message in measuring(loaded, asked, text):
                left = (each or 0.0) * (len(plan.missing) - done) - (monotonic() - begun)
                yield f"{where}{f', {about(left)} left' if left > 0 else ''}: {message} …", False
            records.append(measured_record(loaded, asked, text, "sweep"))
            yield where, True

    def _plan(self, loaded: LoadedModel, text: str, stored: str, values: Sequence[Any]) -> Plan:
        made = [grid(some) for some in read_fields(values)]
        specs = tuple(dict.fromkeys(spec.canonical() for one in made for spec in one.specs))
        for spec in specs:
            check_shown(spec)
            loaded.check_fits(spec)
        if len(specs) > MOST_RUNS:
            raise UserError(
                f"these are {len(specs):,} runs; the page takes up to {MOST_RUNS} at a time. "
                "Give fewer values, or sweep in the shell."
            )
        # of the same model, on the same text, calibrated on the text that the sweep looks at
        known = {record.query for record in read_records(stored)[0]}
        queries = (Link(loaded.key, spec, text).to_query() for spec in specs)
        missing = tuple(s for s, query in zip(specs, queries, strict=True) if query not in known)
        left_out = sum(one.left_out for one in made)
        return Plan(missing, len(specs) - len(missing), left_out)


def read_fields(values: Sequence[Any]) -> list[dict[str, list[str]]]:
    """Field of the spec -> its values as texts, for static methods, then for routed ones, as far as
    some are chosen. UserError for a field of them without any."""
    methods, values = list(values[0] or []), values[1:]
    if not methods:
        raise UserError("choose a method at least.")
    static = {"method": ["mlpmoe"]} | _read(STATIC, values[: len(STATIC)])
    routed = {"method": [method for method in methods if method != "mlpmoe"]}
    for name, texts in _read(ROUTED, values[len(STATIC) :]).items():
        if texts:
            routed[name] = texts
    if "mlpmoe" in methods and (empty := [name for name, texts in static.items() if not texts]):
        raise UserError(f"{flag_of(empty[0])} has no value.")
    return [*([static] if "mlpmoe" in methods else []), *([routed] if routed["method"] else [])]


def _read(names: Sequence[str], values: Sequence[Any]) -> dict[str, list[str]]:
    return {
        name: (read_values(name, value) if value.strip() else [])
        if isinstance(value, str)
        else list(value or [])
        for name, value in zip(names, values, strict=True)
    }


def in_words(plan: Plan, loaded: LoadedModel, text: str) -> str:
    """The plan in a sentence."""
    words = [f"<strong>{plan.runs} run{'s' if plan.runs != 1 else ''}</strong>"]
    if plan.known:
        words.append(f"{plan.known} of them measured before")
    if plan.left_out:
        words.append(f"{plan.left_out} combinations with K above B left out")
    if not loaded.has_text(text):
        words.append("the text is read first")
    elif plan.missing:
        words.append(about(_seconds_each(plan, loaded, text) * len(plan.missing)))
        if calibrated := sum(spec.needs_calibration for spec in plan.missing):
            words.append(f"and longer for {calibrated} that calibrate first")
    return ", ".join(words) + "."


def snippet(model: str, text: str, values: Sequence[Any]) -> str:
    """The sweep as a command, or two, that goes on where it was."""
    chosen = "mine.txt" if text.startswith(OWN_PREFIX) else text
    commands = []
    for some in read_fields(values):
        flags = " ".join(
            f"--{flag_of(name)} {shlex.quote(','.join(texts))}"
            for name, texts in some.items()
            if (name, texts) != ("method", ["mlpmoe"])
        )
        commands.append(
            f"python -m mlpmoe sweep {shlex.quote(model)} --text {chosen} \\\n  {flags} \\\n"
            "  --out runs.jsonl\n"
        )
    return "".join(commands)


def _seconds_each(plan: Plan, loaded: LoadedModel, text: str) -> float | None:
    """About how long a run takes that needs no calibration; None while the text is not read."""
    if not plan.missing or not loaded.has_text(text):
        return None
    return loaded.plan(text).tokens / loaded.tokens_per_second
