"""What happens on the tab Export: a conversion becomes a checkpoint, verified, zipped, handed out;
and a conversion.json sets the controls again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import gradio as gr

from ...checkpoints.check.record import read_spec_file
from ...checkpoints.check.verification import ExportError
from ...checkpoints.write.export import SAVED, Exported, export
from ...core.calibration import check_disjoint
from ...core.errors import UserError
from ...models import CALIBRATIONS, find_entry, format_bytes
from ..server.asked import Calibrated
from ..server.background import in_thread
from ..server.events import sentence, status
from ..server.jobs import Job, Jobs
from ..server.loaded import LoadedModel
from ..server.texts import OWN_PREFIX, text_name
from ..server.turns import Turns
from ..server.workbench import Workbench
from ..shell.links import Link
from ..shell.run_words import model_name, short_recipe
from ..shell.settings import check_shown, read_asked
from .export_panel import TAB
from .export_plan import Wanted, check_room, command, dtype_choices, folder_name, plan
from .export_result import Made, result, stale_note, zipped_files
from .handed_out import HandedOut, workspace, zip_folder

SHOWN = 5  # outputs of `make`
SHOW_SECONDS = 2.0  # from which the time so far is shown
_making = Turns()  # one at a time: each takes a second model in memory, and room on the disk
OWN_CALIBRATION = "a text of its maker's own"


class ExportHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.handed_out = HandedOut()
        self.jobs = Jobs()

    def describe(self, request: gr.Request, model: str, *values: Any) -> tuple:
        """What will be exported, the command, the number formats, and whether the result is of
        other settings."""
        loaded = self.workbench.loaded(model)
        (form, dtype, text), settings = values[:3], values[3:]
        try:
            wanted = _wanted(loaded, form, dtype, settings)
        except UserError as error:
            problem = f'<p class="problem">{sentence(error)}</p>'
            return problem, gr.skip(), gr.skip(), gr.skip()
        made = self.handed_out.get(request.session_hash)
        return (
            plan(loaded, wanted),
            command(loaded, wanted, text),
            gr.update(choices=dtype_choices(loaded)),
            stale_note(made) if made and made.wanted != wanted else "",
        )

    def begin(self, request: gr.Request) -> str:
        """Take this visitor's turn; UserError if they have one already."""
        if self.jobs.of(request):
            raise UserError("a checkpoint is being made for you already. Press Stop to end that.")
        self.jobs.put(request)
        return status("waiting for its turn …")

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page."""
        self.jobs.stop(request)
        self.handed_out.forget(request.session_hash)

    def failed(self) -> str:
        return status("Not made.")

    def make(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple]:
        """Status, note on other settings, result, download, how to open it. Stopped or failed, it
        leaves what was there before."""
        if self.jobs.of(request) is None:  # stopped before its turn
            yield status("Stopped."), *(gr.skip(),) * (SHOWN - 1)
            return
        with self.jobs.doing(request) as job:
            last = yield from self._make(request.session_hash, job, model, values)
        yield last  # no sooner: whoever reads it may press the button again

    def _make(
        self, session: str, job: Job, model: str, values: tuple
    ) -> Generator[tuple, None, tuple]:
        """What is shown on the way; returns what is shown at the end."""
        loaded = self.workbench.loaded(model)
        (form, dtype, text), settings = values[:3], values[3:]
        wanted = _wanted(loaded, form, dtype, settings)
        started, unchanged = monotonic(), (gr.skip(),) * (SHOWN - 1)
        found: list[Made] = []
        with _unless_handed_out(found), workspace() as folder, loaded.in_use():
            steps = _work(loaded, wanted, text, folder, found)
            with closing(in_thread(lambda report: _in_turn(steps, report))) as work:
                for message in work:
                    if job.stopped:
                        return status("Stopped."), *unchanged
                    yield status(f"{message} …{_since(started)}"), *unchanged
            made = found.pop()
            self.handed_out.put(session, made)
        download = f"Download {made.zip.name} ({format_bytes(made.bytes)})"
        return (
            status(f"Made and verified in {monotonic() - started:.0f} s."),
            "",
            result(made),
            gr.update(value=str(made.zip), label=download, visible=True),
            gr.update(value=made.record.opening(made.name), visible=True),
        )

    def open_record(self, path: str | None, model: str, text: str) -> tuple:
        """What is to be restored (see `Link`), and a sentence; of a conversion.json that somebody
        chose. UserError for other files."""
        if path is None:
            return (gr.skip(),) * 2
        spec, base = read_spec_file(path), base_model(path)
        check_shown(spec)
        key = self._key_of(base, model)
        if key == model or self.workbench.holds(key):
            self.workbench.loaded(key).check_fits(spec)
        shown = f"{model_name(key)}, {short_recipe(spec)}"
        said = f"Set as in {Path(path).name}: {shown}."
        if base and key != self._key_of(base, base):
            said += f" It was made from {base:.80}, which is not loaded."
        query = Link(key, spec, text, TAB).to_query()
        return f"{query} {time_ns()}", status(said)

    def _key_of(self, base: str | None, otherwise: str) -> str:
        """The key of the base model that a file names, where it can be loaded without asking."""
        entry = find_entry(base) if base else None
        if entry:
            return entry.key
        return base if base and self.workbench.holds(base) else otherwise


def _wanted(loaded: LoadedModel, form: str, dtype: str, settings: tuple) -> Wanted:
    """What the controls ask for; UserError for what cannot be."""
    wanted = Wanted(loaded.key, read_asked(loaded, settings), form, dtype)
    wanted.check()
    return wanted


@contextmanager
def _unless_handed_out(found: list[Made]) -> Iterator[None]:
    """Removes what is left there: who stops it may come later than the zip."""
    try:
        yield
    finally:
        for made in found:
            shutil.rmtree(made.zip.parent, ignore_errors=True)


def _in_turn(work: Iterator[str], report: Callable[[str], None]) -> None:
    with _making.turn(), closing(work):
        for message in work:
            report(message)


def _work(
    loaded: LoadedModel, wanted: Wanted, text: str, folder: Path, found: list[Made]
) -> Iterator[str]:
    """Convert, export below `folder`, zip; yields what is being done and adds to `found`."""
    asked, name = wanted.asked, folder_name(wanted)
    check_room(loaded, wanted, folder)
    if isinstance(asked, Calibrated):
        if text.startswith(OWN_PREFIX):
            check_disjoint(asked.text, loaded.texts.read(text))
        yield from loaded.convert(asked)
        check_room(loaded, wanted, folder)
    yield "reading the text"
    encoded = yield from in_thread(lambda report: loaded.text(text))
    exported = yield from _exported(loaded, wanted, text, encoded, folder / name)
    yield "packing the zip"

    def pack(report: Any) -> None:
        file = zip_folder(exported.folder)
        found.append(Made(wanted, name, file, exported.bytes, zipped_files(file), exported.record))

    yield from in_thread(pack)


def _exported(
    loaded: LoadedModel, wanted: Wanted, text: str, encoded: Any, folder: Path
) -> Generator[str, None, Exported]:
    calibration = None
    if isinstance(wanted.asked, Calibrated) and wanted.spec.needs_calibration:
        ours = CALIBRATIONS.get(wanted.asked.key)
        calibration = f"{ours.label} of mlpmoe" if ours else OWN_CALIBRATION

    def work(report: Any) -> Exported:
        def politely(message: str, share: float | None) -> None:
            report(message, share)
            with loaded.turns.turn():  # between steps, whoever waits goes first
                pass

        report("converting", None)
        try:
            return export(
                loaded.converted(wanted.asked), folder, tokenizer=loaded.tokenizer, text=encoded,
                text_name=text_name(text), dense=loaded.model,
                known=loaded.known_whole(wanted.asked, text), calibration_name=calibration,
                form=wanted.form, dtype=SAVED if wanted.dtype == SAVED else None,
                on_progress=politely,
            )  # fmt: skip
        except ExportError as error:  # which may name the folder, nobody's business
            raise ExportError(str(error).replace(f"{folder.parent}/", "")) from error

    return (yield from in_thread(work))


def base_model(path: str | Path) -> str | None:
    """The base model that a conversion.json names, which `read_spec_file` has accepted."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    base = values.get("base_model")
    name = base.get("name") if isinstance(base, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def _since(started: float) -> str:
    seconds = monotonic() - started
    return f" {seconds:.0f} s" if seconds >= SHOW_SECONDS else ""
