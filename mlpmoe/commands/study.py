"""The command `study`: one of the studies, as a table and as curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.errors import UserError
from ..core.files import check_output, write_reason
from ..measure.notation import number
from ..models import load
from ..studies import STUDIES, Study, check_course, find_study, run_study
from ..studies.curves import svg
from .arguments import MODEL_HELP
from .terminal import print_json, print_table, progress

NAME, HELP = "study", "train branches or experts further, and compare"
EXAMPLES = "examples:\n  python -m mlpmoe study apart\n" + (
    "  python -m mlpmoe study downcycling --steps 400 --plot curves.svg\n\nstudies:\n"
    + "\n".join(f"  {name:<12} {study.about}" for name, study in STUDIES.items())
    + "\n\nEach takes some minutes on the demo model."
)
ERROR = "_stderr"  # end of the name of a column that holds the error of another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"of the study: {', '.join(STUDIES)}")
    parser.add_argument("--model", default="demo", help=f"{MODEL_HELP} (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="N",
        help="of each training, of 512 tokens each (default: the study's)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of the order in which texts are read, and of what is drawn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the curves to this file, as SVG"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def run(arguments: argparse.Namespace) -> None:
    study = find_study(arguments.name)
    check_course(arguments.steps, arguments.seed)
    _check_plot(arguments.name, study, arguments.plot)
    model, tokenizer = load(arguments.model, "float32", arguments.device, on_progress=progress)
    rows = run_study(
        arguments.name, model, tokenizer, arguments.steps, arguments.seed, on_progress=progress
    )
    progress("")
    _print(arguments, study, rows, model)
    if arguments.plot:
        _write(arguments.plot, svg(rows, study.axes))
        if not arguments.json:
            print(f"\nCurves: {arguments.plot}")


def _print(
    arguments: argparse.Namespace, study: Study, rows: Sequence[dict[str, Any]],
    model: PreTrainedModel,
) -> None:  # fmt: skip
    if arguments.json:
        setting = {
            "study": arguments.name,
            "model": arguments.model,
            "steps": arguments.steps or study.steps,
            "seed": arguments.seed,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        }
        return print_json({"setting": setting, "rows": rows})
    print(f"{study.about}\n")
    print_table(*_table(rows))


def _write(file: Path, plot: str) -> None:
    try:
        file.write_text(plot, encoding="utf-8")
    except OSError as error:
        file.unlink(missing_ok=True)  # half of it opens nowhere
        raise OSError(f"{file} cannot be written: {write_reason(error)}") from error


def _check_plot(name: str, study: Study, file: Path | None) -> None:
    """Before minutes are spent on it."""
    if file is None:
        return
    if study.axes is None:
        drawn = ", ".join(name for name, study in STUDIES.items() if study.axes)
        raise UserError(f"the study {name} has no curves; --plot is for {drawn}.")
    check_output(file)


def _table(rows: Sequence[dict[str, Any]]) -> tuple[list[list[str]], str]:
    """Header and rows, the error of a figure beside it; and how columns are aligned."""
    names = [name for name in rows[0] if not name.endswith(ERROR)]
    header = [name.replace("_", " ") for name in names]
    cells = [[_cell(row[name], row.get(name + ERROR)) for name in names] for row in rows]
    align = "".join("<" if isinstance(rows[0][name], str) else ">" for name in names)
    return [header, *cells], align


def _cell(value: Any, error: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value) + ("" if error is None else f" ± {number(error, 2)}")
    return f"{value:,}" if isinstance(value, int) else str(value)
