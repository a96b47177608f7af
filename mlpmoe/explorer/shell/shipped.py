"""The runs that come with the project (assets/sweeps)."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from ...measure.runs.sweep import Run
from ...models import assets_folder, find_entry
from .records import Record

TEXT_KEYS = {"evaluation.txt": "stories", "prose-evaluation.txt": "prose"}  # of shipped files


@lru_cache(maxsize=4)
def shipped(model: str) -> tuple[Record, ...]:
    """The runs of a model that come with the project (assets/sweeps); () for most models."""
    file = assets_folder() / "sweeps" / f"{model}.jsonl"
    if find_entry(model) is None or not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(_shipped(model, json.loads(line)) for line in lines)


def _shipped(model: str, entry: dict[str, Any]) -> Record:
    run = Run.from_dict(entry)
    text = TEXT_KEYS.get(name := entry["text"].split()[0], name)
    return Record(model, text, entry["tokens"], run.perplexity / run.ratio, run, "", None)
