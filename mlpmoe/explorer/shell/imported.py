"""Runs of a file that `sweep --out` or `evaluate --out` wrote, for the browser to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...measure.runs.sweep import Run
from ...models import CALIBRATIONS, TEXTS, find_entry
from ..server.texts import OWN_PREFIX
from .records import MOST_RECORDS, Record, now

NO_RUNS = (
    "this file holds no runs. Choose one that sweep --out or evaluate --out wrote: a line of JSON "
    "for each run."
)


def imported_records(path: str | Path) -> tuple[list[Record], int]:
    """The runs of the file, as many of the last ones as a browser keeps, and how many lines were
    passed over: what cannot be read, and models that broke, whose dense perplexity is not known.
    Of a run that was measured again the later line counts. UserError for a file without runs."""
    when, records, left_out = now(), {}, 0
    for line in Path(path).read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            record = _record(json.loads(line), when)
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
            left_out += 1  # UserError is a ValueError
            continue
        records.pop(record.id, None)
        records[record.id] = record
    if not records:
        raise UserError(NO_RUNS)
    return list(records.values())[-MOST_RECORDS:], left_out


def _record(entry: Mapping[str, Any], when: str) -> Record:
    """A line as a record, checked as one that comes from a browser."""
    run = Run.from_dict(entry)
    known = find_entry(entry["model"])
    calibration = entry.get("calibration") if run.spec.needs_calibration else None
    values = {
        "model": known.key if known else entry["model"],
        "text": _key(entry["text"], TEXTS),
        "tokens": entry["tokens"],
        "dense": run.perplexity / run.ratio,
        "run": run.to_dict() | {"spec": run.spec.to_query()},
        "when": when,
        "source": "sweep",
        "speed": None,
        "calibration": _key(calibration, CALIBRATIONS) if calibration else None,
    }
    return Record.from_dict(values)


def _key(written: str, known: Mapping[str, Any]) -> str:
    """The page's key of a text that a file names with its digest; one of the visitor's own has the
    same digest on the page."""
    name, _, digest = written.rpartition(" ")
    return name if name in known else f"{OWN_PREFIX}{digest}"
