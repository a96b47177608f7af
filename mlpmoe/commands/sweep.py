"""The command `sweep`: many conversions of one model, kept in a file that it goes on from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..core.calibration import warn_of_few_tokens
from ..core.errors import SpecError, UserError
from ..core.files import check_output
from ..core.mlps import read_mlps
from ..core.spec import ConversionSpec
from ..core.written import SPARSITY
from ..measure.notation import change, signed_percent
from ..measure.quality.encoding import scored_tokens, windows
from ..measure.runs.engines import DEFAULT_WORKERS, ENGINES, Job, run_locally, run_on_ray
from ..measure.runs.file import RunsFile
from ..measure.runs.front import front
from ..measure.runs.grid import grid, read_grid, read_values
from ..measure.runs.pace import about, forecast
from ..measure.runs.recipes import recipes
from ..measure.runs.sharing import measured_together
from ..measure.runs.sweep import AT_ONCE, Run, Take, check_fit, comparison
from ..measure.runs.tables import to_csv
from ..models import find_entry, load, recovery_folder
from .arguments import MODEL_HELP, SPEC_NAMES, add_setting, add_spec, at_least
from .terminal import print_json, print_table, progress
from .texts import calibration_text_for, evaluation_text, in_windows, read_text, run_setting

DEFAULT_ACTIVE = (0.875, 0.75, 0.5)  # budgets of --compare
LEAST_ACTIVE = 0.05  # below, static branches cannot come near

NAME = "sweep"
HELP = "perplexity and compute of many conversions; spec flags take several values, with commas"
EXAMPLES = """examples:
  python -m mlpmoe sweep demo --branches 8,16 --fade 0:0.9:0.3 --keep all,75% --out runs.jsonl
  python -m mlpmoe sweep demo --spec-file sweep.json --out runs.jsonl --csv
  python -m mlpmoe sweep demo --branches 4:32:4 --dry-run
  python -m mlpmoe sweep demo --spec-file sweep.json --engine ray --workers 2 --out runs.jsonl
  python -m mlpmoe sweep demo --compare --active 0.875,0.75,0.5 --out runs.jsonl
  python -m mlpmoe sweep smollm2-135m --front --out runs.jsonl
  python -m mlpmoe sweep demo --method cmoe --shared 0.125,0.25,0.375 --selection topk,threshold

Numbers may be ranges, start:stop:step, with the stop included; --keep also takes all and shares of
B such as 75%. Commas part values, so layers spared together are joined by plus signs: --spared
none,0,0+11. A sweep file is JSON: {"branches": "8,16", "fade": [0, 0.5, 0.9], "keep": "75%"}.
Several sweeps, of either engine, may go on from one --out file at a time: each run is measured by
whoever claims it first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_setting(parser)
    parser.add_argument(
        "--compare", action="store_true", help="every method and baseline, at each --active"
    )
    parser.add_argument(
        "--recipes", action="store_true", help="what each stage of the static recipes contributes"
    )
    parser.add_argument(
        "--front", action="store_true", help="the best recipe known of each kind, at 75 and 50 %%"
    )
    parser.add_argument(
        "--spec-file", type=Path, metavar="FILE",
        help="values of the spec's fields as JSON; flags replace those of the file",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="a line of JSON per run; what it holds is kept and not measured again",
    )  # fmt: skip
    parser.add_argument("--csv", action="store_true", help="a table with commas, nothing rounded")
    parser.add_argument(
        "--dry-run", action="store_true", help="say how many runs and about how long, and end"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local",
        help="where it runs: in this process, or on Ray: the cluster of RAY_ADDRESS, else here",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N",
        help=f"of the engine ray; each holds the model (default: {DEFAULT_WORKERS})",
    )  # fmt: skip
    add_spec(parser, file=False)


def run(arguments: argparse.Namespace) -> None:
    if arguments.csv and (arguments.json or arguments.dry_run):
        raise UserError("--csv stands alone: leave out --json and --dry-run.")
    if arguments.workers and arguments.engine != "ray":
        raise UserError("--workers is for --engine ray.")
    if arguments.out:
        check_output(arguments.out)
    values = _values(arguments)
    budgets = _budgets(values.get("active")) if arguments.compare else []
    specs, left_out = list(recipes().items()) if arguments.recipes else [], 0
    if not specs and not budgets and not arguments.front:
        made = grid(values)
        specs, left_out = [("", spec) for spec in made.specs], made.left_out
    text = evaluation_text(arguments)
    model, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    specs = specs or _compared(model, budgets, arguments.front)
    encoded, window, stride = text.encode(tokenizer, model)
    tokens = scored_tokens(windows(model, encoded, window, stride))
    calibration, seen = None, None
    if any(spec.needs_calibration for _, spec in specs):
        seen = calibration_text_for(arguments, text.content)
        calibration = seen.encode(tokenizer, model)
        warn_of_few_tokens(model, [spec for _, spec in specs], calibration)
    check_fit(model, [spec for _, spec in specs], calibration is not None)
    setting = run_setting(arguments.model, model, text, seen, window, stride)
    file = RunsFile(arguments.out, setting) if arguments.out else None
    known = file.read() if file else {}
    missing = list(dict.fromkeys(spec for _, spec in specs if spec not in known))
    if arguments.dry_run:
        seconds = forecast(model, encoded, missing, calibration, window, stride, AT_ONCE)
        workers = 1 if arguments.engine == "local" else arguments.workers or DEFAULT_WORKERS
        plan = {"runs": len(specs), "known": len(specs) - len(missing), "left_out": left_out}
        return _print_plan(arguments, plan | {"seconds": seconds / workers})
    # The dtype that was chosen here, since "auto" may be another on a worker.
    job = Job(
        _reachable(arguments.model), encoded, calibration, setting["dtype"], arguments.device,
        window, stride, recovery_folder(),
    )  # fmt: skip
    if arguments.engine == "ray":
        del model  # each worker loads its own
        workers = arguments.workers or DEFAULT_WORKERS

    def measure(specs: Sequence[ConversionSpec], take: Take = list) -> Iterator[Run]:
        if arguments.engine == "ray":
            return run_on_ray(job, specs, load, workers, progress, take)
        return run_locally(job, specs, lambda *_: (model, tokenizer), progress, take)

    now = measured_together(measure, missing, file, tokens, progress) if file else measure(missing)
    with closing(now):  # an interrupt leaves no worker running
        measured = {run.spec: run for run in now}
    progress("")
    known = known | (file.read() if file else {}) | measured  # others may have measured some
    runs = [(name, known[spec]) for name, spec in specs]
    if arguments.csv:
        about_all = {"model": arguments.model, "text": text.name, "tokens": tokens}
        print(to_csv([{"name": name, **about_all, **run.to_row()} for name, run in runs]), end="")
    elif arguments.json:
        print_json({"setting": setting, "runs": [{"name": n} | r.to_dict() for n, r in runs]})
    else:
        print(
            f"{arguments.model} on {text.name}, {tokens:,} tokens, "
            f"{in_windows(window, stride)}; {len(measured)} measured now, "
            f"{len(specs) - len(measured)} before{_left_out(left_out)}"
        )
        print_table([HEADER, *(_row(name, run) for name, run in runs)], align=">>>><")


def _values(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The values of each field of the spec, from the sweep file and the flags; UserError where
    they do not go with --recipes or --compare."""
    values = {}
    if arguments.spec_file:
        values = read_grid(read_text(arguments.spec_file))
    flags = [name for name in SPEC_NAMES if name in arguments]
    for name, other in (("fade", SPARSITY), (SPARSITY, "fade")):
        if name in flags:
            values.pop(other, None)  # of the file, which says the same in another way
    for name in flags:
        values[name] = read_values(name, getattr(arguments, name))
    alone = [name for name in ("recipes", "front") if getattr(arguments, name)]
    if alone and (values or arguments.compare or len(alone) > 1):
        raise UserError(
            f"--{alone[0]} takes no spec flags and no --compare; give one of --compare, --recipes "
            "and --front."
        )
    if arguments.compare and set(values) - {"active"}:
        raise UserError("--compare takes no other spec flag than --active.")
    return values


def _compared(
    model: PreTrainedModel, budgets: Sequence[float], best: bool
) -> list[tuple[str, ConversionSpec]]:
    weights = min((mlp.weights for mlp in read_mlps(model)), key=lambda w: w.d_ff)
    gated = weights.gate is not None
    if best:
        return list(front(weights.d_ff, gated).items())
    return [
        (name, spec) for active in budgets for name, (_, spec) in comparison(active, gated).items()
    ]


def _reachable(model: str) -> str:
    """The model's name; a folder or file from the root, for a worker that runs in another folder.
    The folder of a catalogue's name is not meant, see `load`."""
    path = Path(model)
    return str(path.absolute()) if find_entry(model) is None and path.exists() else model


def _budgets(texts: Sequence[str] | None) -> list[float]:
    """The active shares of --compare; SpecError for what is not between 0.05 and 1."""
    if texts is None:
        return list(DEFAULT_ACTIVE)
    budgets = [ConversionSpec.from_texts({"method": "random", "active": t}).active for t in texts]
    for share in budgets:
        if share < LEAST_ACTIVE:
            raise SpecError(f"active must be at least {LEAST_ACTIVE:g} here, not {share:g}.")
    return budgets


def _print_plan(arguments: argparse.Namespace, plan: dict[str, Any]) -> None:
    progress("")
    if arguments.json:
        return print_json(plan)
    new = plan["runs"] - plan["known"]
    time = f"; {about(plan['seconds'])}, without what conversions compute" if new else ""
    print(
        f"{plan['runs']} runs, {plan['known']} known and {new} to measure"
        f"{_left_out(plan['left_out'])}{time}"
    )


def _left_out(count: int) -> str:
    """Said where combinations are missing."""
    return f", {count} left out with K above B" if count else ""


HEADER = ["perplexity", "to dense", "MLP non-zero", "MLP compute", "conversion"]


def _row(name: str, run: Run) -> list[str]:
    flags = f"{name}: {run.spec.to_flags()}" if name else run.spec.to_flags()
    return [
        f"{run.perplexity:,.2f}",
        change(run.ratio, run.stderr),
        signed_percent(run.mlp_nonzero_share - 1),
        signed_percent(run.mlp_macs_share - 1),
        flags,
    ]
