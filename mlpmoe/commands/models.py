"""The command `models`: what can be loaded by a short name."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..models import CATALOGUE
from .terminal import print_json, print_table

NAME, HELP = "models", "the models that have a short name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> None:
    if arguments.json:
        entries = [asdict(entry) | {"source": str(entry.source)} for entry in CATALOGUE]
        return print_json({"models": entries})
    rows = [["model", "parameters", "GPU", "note"]]
    for entry in CATALOGUE:
        gpu = "needed" if entry.needs_gpu else ""
        rows.append([entry.key, f"{entry.parameters:,}", gpu, entry.note])
    print_table(rows, align="<><<")
