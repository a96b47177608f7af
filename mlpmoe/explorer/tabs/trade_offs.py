"""What happens on the tab of trade-offs: runs that the browser keeps, as plot, table and files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from html import escape
from pathlib import Path
from time import monotonic
from typing import Any

import gradio as gr

from ...core.errors import UserError
from ...measure.runs.tables import to_csv
from ...measure.text.generation import write_side_by_side
from ..plots.tradeoff_plot import AXES, tradeoff_plot
from ..server.asked import Conversion, spec_of
from ..server.events import status
from ..server.jobs import Jobs
from ..server.loaded import LoadedModel
from ..server.texts import text_name
from ..server.workbench import Workbench
from ..shell.answer import WRITING_SECONDS, check_writing, in_turns
from ..shell.imported import imported_records
from ..shell.records import Record, pinned, read_records, write_records
from ..shell.run_words import model_name, short_recipe
from ..shell.shipped import shipped
from .published import published
from .runs_table import comparison_table, runs_table
from .scores_table import scores_table
from .weights import histograms, layer_and_projection

COMPARED = 6  # outputs of `compare`
COMPARED_TOKENS = 96  # that both write


class TradeOffHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench, self.jobs = workbench, Jobs()

    def show(self, stored: str, model: str, text: str, x: str, y: str, layers: list[str]) -> tuple:
        """Plot, sentence, tables, whether Undo and Delete can be pressed, comparison and whether
        there is one."""
        for axis in (x, y):
            if axis not in AXES:
                raise UserError(f"{axis!r:.40} is not measured; choose of {', '.join(AXES)}.")
        records, undo = read_records(stored)
        here = [r for r in records if (r.model, r.text) == (model, text)]
        shown: dict[str, Sequence[Record]] = {
            "runs": [record for record in here if record.source != "sweep"],
            "sweep": [record for record in here if record.source == "sweep"],
            "shipped": shipped(model),
        }
        shown = {layer: some for layer, some in shown.items() if layer in layers}
        elsewhere = published() if "published" in layers else ()
        pair = pinned(records)
        return (
            tradeoff_plot(shown, elsewhere, x, y),
            about(records, here, model, text),
            runs_table(records) + scores_table(records),
            gr.update(interactive=undo),
            gr.update(interactive=bool(records)),
            comparison_table(pair),
            gr.update(visible=len(pair) == 2),
        )

    def remember(self, stored: str) -> list[Record]:
        """The runs that the browser keeps, for the curve."""
        return read_records(stored)[0]

    def another_model(self, model: str) -> tuple:
        """Layer and projection of the comparison."""
        return layer_and_projection(self.workbench.loaded(model))

    def csv(self, stored: str) -> tuple[str, str]:
        """What the file holds, and its name."""
        records, _ = read_records(stored)
        if not records:
            raise UserError("there are no runs to save yet.")
        return to_csv([flat(record) for record in records]), "mlpmoe-runs.csv"

    def json(self, stored: str) -> tuple[str, str]:
        records, _ = read_records(stored)
        if not records:
            raise UserError("there are no runs to save yet.")
        runs = [
            record.to_dict() | {"recipe": short_recipe(record.run.spec), "link": f"?{record.query}"}
            for record in records
        ]
        return json.dumps({"runs": runs}, indent=2, ensure_ascii=False), "mlpmoe-runs.json"

    def open_file(self, path: str | None) -> str:
        """New runs for the browser, of a file that the shell wrote; how many is said in a toast."""
        if path is None:
            return gr.skip()
        records, left_out = imported_records(path)
        said = (
            f"{len(records)} run{'s' if len(records) > 1 else ''} read from {Path(path).name:.60}"
        )
        if left_out:
            said += f"; {left_out} line{'s' if left_out > 1 else ''} without a usable run"
        gr.Info(f"{escape(said)}.")
        return write_records(records)

    def compare(
        self, request: gr.Request, stored: str, layer: int, projection: str, prompt: str
    ) -> Iterator[tuple[Any, ...]]:
        """Status, whether there is something to see, two histograms, two texts."""
        steps = self._compared(stored, layer, projection, prompt)
        with self.jobs.doing(request) as job, closing(steps):
            for step in steps:
                if job.stopped:
                    yield status("Stopped."), *(gr.skip(),) * (COMPARED - 1)
                    break
                yield step

    def _compared(
        self, stored: str, layer: int, projection: str, prompt: str
    ) -> Iterator[tuple[Any, ...]]:
        pair = pinned(read_records(stored)[0])
        if len(pair) < 2:
            raise UserError("pin two runs first.")
        check_writing(prompt, COMPARED_TOKENS, 0.0)
        nothing = (gr.skip(),) * 2
        loaded, asked = [], []
        for letter, record in zip("AB", pair, strict=True):
            loaded.append(self.workbench.loaded(record.model))
            asked.append(loaded[-1].asked(record.run.spec, record.calibration))
            for message in loaded[-1].convert(asked[-1]):
                yield status(f"{letter}: {message} …"), gr.skip(), *nothing, *nothing
        plots = [
            _histograms(one, conversion, layer, projection)
            for one, conversion in zip(loaded, asked, strict=True)
        ]
        yield status("writing …"), gr.update(visible=True), *plots, "", ""
        for written in _write(loaded, asked, prompt):
            yield status("writing …"), gr.skip(), *nothing, *written
        yield "", gr.skip(), *nothing, *nothing


def _histograms(loaded: LoadedModel, asked: Conversion, layer: int, projection: str) -> Any:
    """The branches of a static run; nothing for a routed one, which has none."""
    spec = spec_of(asked)
    if spec.routed:
        return gr.update(value=None, visible=False)
    return gr.update(value=histograms(loaded, asked, layer, projection), visible=True)


def _write(
    loaded: Sequence[LoadedModel], asked: Sequence[Conversion], prompt: str
) -> Iterator[tuple[str, str]]:
    """Both texts, as they grow. Two models write one after the other if their tokenizers differ."""
    models = [one.converted(conversion) for one, conversion in zip(loaded, asked, strict=True)]
    if loaded[0] is not loaded[1]:
        raise UserError("A and B are of different models, so they do not write the same text.")
    started, texts = monotonic(), ("", "")
    steps = write_side_by_side(tuple(models), loaded[0].tokenizer, prompt, COMPARED_TOKENS, 0.0)
    for written in in_turns(loaded[0], steps):
        if written:
            texts = tuple(writing.text.lstrip() for writing in written[-1])
            yield texts
        if monotonic() - started > WRITING_SECONDS:
            break
    yield texts


def about(records: Sequence[Record], here: Sequence[Record], model: str, text: str) -> str:
    """How many runs there are, and how many of them the plot shows."""
    if not records:
        return ""
    words = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    if len(here) < len(records):
        words += f"; {len(here)} of {model_name(model)} on {text_name(text)}, which the plot shows"
    return f"<p>{escape(words)}</p>"


def flat(record: Record) -> dict[str, Any]:
    """One row of a table, with a column for each field."""
    values = record.run.to_row()
    speed = record.speed
    return {
        "model": record.model,
        "text": record.text,
        "tokens": record.tokens,
        "recipe": short_recipe(record.run.spec),
        **values.pop("spec"),
        "dense_perplexity": record.dense,
        **values,
        "speedup": speed.median if speed else None,
        "speedup_low": speed.low if speed else None,
        "speedup_high": speed.high if speed else None,
        "measured": record.when,
        "link": f"?{record.query}",
    }
