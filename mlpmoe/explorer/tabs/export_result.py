"""What is shown of a checkpoint that was made: figures, files, and how to open it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from zipfile import ZipFile

from ...checkpoints.check.record import Record
from ...checkpoints.check.verification import Verification
from ...measure.notation import difference, number
from ...measure.quality.perplexity import compare
from ...models import format_bytes
from ..shell.run_words import model_name, short_recipe
from .export_plan import Wanted

FILE_WORDS = {  # what is in a file that not everybody knows
    "README.md": "model card for the hub",
    "conversion.json": "the settings, to be opened here again",
    "config.json": "architecture",
    "model.safetensors": "weights",
    "modeling_mlpmoe.py": "code that runs the branches or experts",
}
EMPTY = (
    '<p class="empty">No checkpoint yet. When one is made, it is opened again in a fresh process '
    "and compared with the model in memory, and the figures stand here.</p>"
)


@dataclass(frozen=True)
class Made:
    """A checkpoint that waits to be downloaded."""

    wanted: Wanted
    name: str  # of the folder in the zip
    zip: Path  # the one file that is served
    bytes: int  # of its files
    files: tuple[tuple[str, int], ...]  # name and bytes
    record: Record


def result(made: Made) -> str:
    """For which settings it was made, and the figures of the verification, as HTML."""
    record, found = made.record, made.record.verification
    notes = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
    return (
        f"<h4>Checkpoint of {escape(made_for(made.wanted))}</h4>"
        f"<table>{''.join(_row(*row) for row in _rows(record, found, made))}</table>"
        + (f'<ul class="note">{notes}</ul>' if notes else "")
        + _files(made.files)
    )


def made_for(wanted: Wanted) -> str:
    return f"{model_name(wanted.model)}, {short_recipe(wanted.spec)}"


def stale_note(made: Made) -> str:
    """What stands above a result whose settings are no longer those of the page."""
    return (
        '<p class="problem">The settings have changed since. This checkpoint is of '
        f"{escape(made_for(made.wanted))}.</p>"
    )


def zipped_files(file: Path) -> tuple[tuple[str, int], ...]:
    """Names inside the top folder, and bytes."""
    with ZipFile(file) as archive:
        return tuple(
            (info.filename.partition("/")[2], info.file_size) for info in archive.infolist()
        )


def _rows(record: Record, found: Verification, made: Made) -> Sequence[tuple[str, str, str]]:
    """What, figure, remark."""
    allowed = f"{found.allowed:.1e} allowed"
    saved = found.saved_dtypes.replace(",", " and ")
    judged = ""
    if not found.strict:
        judged = "from rounding to 16 bits" if "F16" in saved else "of the worst token"
    rows = [
        ("Largest difference of a logit", _small(found.max_logit_difference), judged),
        (
            "… relative to the largest logit", _small(found.relative_difference),
            allowed if found.strict else "",
        ),
    ]  # fmt: skip
    if not found.strict:
        rows.append(("… of the median token", _small(found.typical_difference), allowed))
    rows.append(
        (
            "Same likeliest next token", f"{found.argmax_agreement:.1%}",
            f"of {found.compared_tokens:,} tokens",
        )
    )  # fmt: skip
    if found.perplexity is not None:
        on = f"{record.text}, {found.scored_tokens:,} tokens"
        rows += [
            ("Perplexity in memory", f"{found.perplexity:,.4f}", on),
            ("Perplexity reloaded", f"{found.reloaded_perplexity:,.4f}", "the same text"),
        ]
    if record.measured:
        change = difference(compare(record.measured.dense, record.measured.converted))
        rows.append(
            ("Perplexity of the dense model", number(record.measured.dense.value, 4), change)
        )
    return [
        *rows,
        ("Saved as", saved, f"computed in {found.dtype}"),
        ("Size", format_bytes(made.bytes), f"{len(made.files)} files"),
        (
            "Architecture", record.architecture,
            "with code of its own" if record.remote_code else "stock, no code of its own",
        ),
    ]  # fmt: skip


def _row(name: str, figure: str, remark: str) -> str:
    return f"<tr><th>{name}</th><td>{escape(figure)}</td><td>{escape(remark)}</td></tr>"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 1000 else format_bytes(count)


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _files(files: Sequence[tuple[str, int]]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{_bytes(size)}</td>"
        f"<td>{FILE_WORDS.get(name, '')}</td></tr>"
        for name, size in files
    )
    return f"<details><summary>Files in the zip</summary><table>{rows}</table></details>"
