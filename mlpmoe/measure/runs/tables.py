"""Measured runs as CSV that spreadsheets and pandas read."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so may be run by a spreadsheet


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One header, then a line per row; columns are all keys in order of first appearance, and
    nested values, such as a run's spec, have a column each under their own names.

    None is an empty cell, numbers are written in full. A text that a spreadsheet would take for a
    formula gets an apostrophe in front; a negative number is a number. Raises ValueError if a
    nested value and another one have the same name.
    """
    flat = [flattened(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_safe, columns))
    writer.writerows([_safe(row.get(name)) for name in columns] for row in flat)
    return file.getvalue()


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what is in its mappings in their place; ValueError if two have one name."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        entries = flattened(value) if isinstance(value, Mapping) else {name: value}
        if twice := flat.keys() & entries.keys():
            raise ValueError(f"two columns are called {min(twice)}")
        flat |= entries
    return flat


def _safe(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
