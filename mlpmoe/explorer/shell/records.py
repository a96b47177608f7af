"""Runs as the visitor's browser keeps them: what was measured, of which model, on which text, when.

The server keeps none. What comes back from a browser may be old, broken or made up, so it is
checked like any other input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from math import inf
from typing import Any

from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...measure.cost.speed import Ratio
from ...measure.runs.sweep import Run
from ...models.texts import TEXTS
from ..server.asked import Calibrated, Conversion
from ..server.loaded import LoadedModel
from ..server.texts import OWN_PREFIX
from .links import LONGEST, Link

MOST_RECORDS = 300  # more are forgotten, the oldest first; see page.js
# where on the page it was measured; "experts" was a tab of earlier versions
SOURCES = ("measured", "sweep", "suggest", "experts")
LONGEST_NAME = 500  # characters of a model's or a text's name


@dataclass(frozen=True)
class Record:
    """A run of one model on one text."""

    model: str  # key, as links have it
    text: str
    tokens: int  # predicted tokens of the text
    dense: float  # perplexity of the dense model on them
    run: Run
    when: str  # UTC, as in 2026-11-25T21:07:00Z
    speed: Ratio | None = None  # writing speed, converted / dense
    source: str = "measured"
    pinned: int = 0  # when it was pinned, in milliseconds, as page.js counts; 0: it is not
    calibration: str | None = None  # key of the text that was looked at; None: the default

    @property
    def id(self) -> str:
        """The same for the same model, text and spec: measuring again replaces a run."""
        return sha256(self.query.encode()).hexdigest()[:12]

    @cached_property  # a curve asks for those of all its runs, several times a second
    def query(self) -> str:
        """The link's query string that restores the run; one that comes with the project was
        measured on a text that is not here, and is restored on the model's own."""
        here = self.text in TEXTS or self.text.startswith(OWN_PREFIX)
        text = self.text if here else None
        return Link(self.model, self.run.spec, text, calibration=self.calibration).to_query()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "id": self.id,
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "dense": self.dense,
            "run": self.run.to_dict() | {"spec": self.run.spec.to_query()},
            "when": self.when,
            "source": self.source,
            "speed": None if self.speed is None else asdict(self.speed),
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Record:
        """The record with these values; UserError if they are none."""
        try:
            run, speed = dict(values["run"]), values["speed"]
            spec = ConversionSpec.from_query(_name(run["spec"], LONGEST))
            record = cls(
                model=_name(values["model"]),
                text=_name(values["text"]),
                tokens=int(values["tokens"]),
                dense=float(values["dense"]),
                run=Run.from_dict(run | {"spec": spec.to_dict()}),
                when=datetime.fromisoformat(values["when"]).strftime("%Y-%m-%dT%H:%M:%SZ"),
                speed=None if speed is None else Ratio(**{k: float(v) for k, v in speed.items()}),
                source=values["source"],
                pinned=int(values.get("pinned") or 0),
                calibration=_name(values["calibration"]) if values.get("calibration") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("this is not a run that was measured here.") from None
        if (
            not all(0 < figure < inf for figure in record._divisors())
            or record.tokens < 1
            or record.source not in SOURCES
        ):
            raise UserError("this is not a run that was measured here.")
        return record

    def _divisors(self) -> Iterator[float]:
        """The figures that others are divided by, on tables and plots."""
        run = self.run
        yield self.dense
        yield from (run.nonzero_share, run.mlp_nonzero_share, run.macs_share, run.mlp_macs_share)
        yield min(run.ratio, 1.0)  # which may be infinite
        if self.speed is not None:
            yield from (self.speed.low, self.speed.median, self.speed.high)


def measured_record(
    loaded: LoadedModel,
    asked: Conversion,
    text: str,
    source: str = "measured",
    when: str | None = None,
) -> Record:
    """The run of a conversion that is measured. when: its measurement began, by default now; what
    is sent again of one measurement has the same."""
    evaluation = loaded.known_evaluation(asked, text)
    speed = loaded.known_speed(asked)
    return Record(
        model=loaded.key,
        text=text,
        tokens=evaluation.dense.tokens,
        dense=evaluation.dense.value,
        run=loaded.run(asked, text),
        when=when or now(),
        speed=speed and speed.speedup,
        source=source,
        calibration=asked.key if isinstance(asked, Calibrated) else None,
    )


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_records(records: Sequence[Record]) -> str:
    """New runs for page.js to keep."""
    return json.dumps([record.to_dict() for record in records])


def read_records(stored: str) -> tuple[list[Record], bool]:
    """What page.js sends: the runs, the newest first, and whether there is something to undo.
    What cannot be read is left out."""
    try:
        values = json.loads(stored or "{}")
        listed, undo = list(values.get("runs", [])), bool(values.get("undo"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return [], False
    records = {}
    for entry in listed[:MOST_RECORDS]:
        try:
            record = Record.from_dict(entry)
        except UserError:
            continue
        records.setdefault(record.id, record)
    return list(records.values()), undo


def pinned(records: Sequence[Record]) -> list[Record]:
    """The runs to compare, at most two, the older first."""
    found = sorted((r for r in records if r.pinned), key=lambda r: r.pinned, reverse=True)
    return found[:2][::-1]


def _name(value: Any, longest: int = LONGEST_NAME) -> str:
    if not isinstance(value, str) or not value or len(value) > longest:
        raise UserError("this is not a run that was measured here.")
    value.encode()  # half a character raises ValueError
    return value
