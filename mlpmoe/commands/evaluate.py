"""The command `evaluate`: one model and one conversion of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..core.conversion import convert, mlp_modules, recovery_of, spec_of
from ..core.errors import UserError
from ..core.files import check_output
from ..core.recovery.report import RecoveryReport
from ..core.spec import ConversionSpec
from ..measure.cost.parameters import ParameterReport, parameter_report
from ..measure.cost.speed import SpeedReport, decode_speed
from ..measure.quality.encoding import Window, scored_tokens, windows
from ..measure.quality.head import token_losses
from ..measure.quality.judge import LoadedTasks, load_tasks
from ..measure.quality.perplexity import Perplexity, compare, summarise
from ..measure.quality.tasks import TaskScore, task_scores
from ..measure.runs.file import RunsFile
from ..measure.runs.sweep import Run, run_of
from ..models import load
from .arguments import (
    MODEL_HELP,
    add_setting,
    add_spec,
    add_training_limit,
    at_least,
    conversion_ways,
    read_spec,
)
from .terminal import (
    parameter_rows,
    perplexity_rows,
    print_json,
    print_recovery,
    print_table,
    progress,
    speed_rows,
    task_rows,
)
from .texts import calibration_text_for, evaluation_text, in_windows, run_setting

NAME, HELP = "evaluate", "perplexity, parameters and speed of a model and of its conversion"
EXAMPLES = """examples:
  python -m mlpmoe evaluate demo --branches 16 --fade 0.9
  python -m mlpmoe evaluate ./my-model --branches 16 --keep 12 --window 512 --stride 256
  python -m mlpmoe evaluate qwen2.5-0.5b --branches 16 --fade 0.9 --text wikitext2
  python -m mlpmoe evaluate demo --keep 8 --recover lora --recover-steps 200
  python -m mlpmoe evaluate smollm2-135m --keep 12 --tasks arc_easy,hellaswag --limit 500

Tasks are those of EleutherAI's lm-eval (pip install ".[tasks]"; python -m lm_eval ls tasks lists
them). Their data is fetched once, before anything is measured.
"""
TASKS_NOTE = """
Differences of shares are in points of percent. Their errors come from the differences question by
question; where it says not paired, both models count as independent, and errors are too large."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_setting(parser)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="skip speed")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="add the run to this file as a line of JSON, which sweep --out goes on from",
    )  # fmt: skip
    group = parser.add_argument_group("tasks of lm-eval, after perplexity")
    group.add_argument(
        "--tasks", metavar="NAMES", help="such as arc_easy,hellaswag: accuracy of both models"
    )
    group.add_argument("--tasks-folder", metavar="DIR", help="tasks of your own (YAML)")
    group.add_argument(
        "--limit", type=at_least(1), metavar="N",
        help="the first N questions of each task (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--shots", type=at_least(0), metavar="N",
        help="solved examples before each question (default: what the task says, mostly none)",
    )  # fmt: skip
    add_spec(parser)
    add_training_limit(parser)


def run(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments)
    ways = conversion_ways(arguments, spec)
    if arguments.out:
        check_output(arguments.out)
    tasks = _tasks(arguments)
    text = evaluation_text(arguments)
    seen = calibration_text_for(arguments, text.content) if spec.needs_calibration else None
    dense, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    encoded, window, stride = text.encode(tokenizer, dense)
    file = None
    if arguments.out:
        kept = run_setting(arguments.model, dense, text, seen, window, stride)
        file = RunsFile(arguments.out, kept)
    parts = windows(dense, encoded, window, stride)
    progress("converting")
    calibration = seen.encode(tokenizer, dense) if seen else None
    converted = convert(dense, spec, calibration, **ways)
    recovery, spec = recovery_of(converted), spec_of(converted)
    perplexities = [
        _perplexity(name, model, parts)
        for name, model in (("dense", dense), ("converted", converted))
    ]
    scored = ()
    if tasks:
        scored = task_scores(
            dense, converted, tokenizer, tasks, None, arguments.limit, arguments.shots, progress
        )
    speed = None
    if arguments.speed:
        progress("measuring speed")
        speed = decode_speed(dense, converted)
    progress("counting parameters")
    reports = [parameter_report(model) for model in (dense, converted)]
    progress("")
    setting = {
        "model": arguments.model,
        "architecture": type(dense).__name__,
        "layers": len(mlp_modules(dense)),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "threads": torch.get_num_threads(),
        "text": text.name,
        "text_digest": text.digest,
        "protocol": text.protocol,
        "documents": len(encoded.documents),
        "bytes": sum(part.size for part in parts),
        "tokens": scored_tokens(parts),
        "window": window,
        "stride": stride,
        "calibration": seen.name if seen else None,
        "calibration_tokens": calibration.samples.numel() if calibration else None,
    }
    try:
        if file and recovery and recovery.cut_short:
            print(
                f"mlpmoe: the run is not added to {arguments.out}: the time limit cut training "
                "short, so no settings give it again.",
                file=sys.stderr,
            )
        elif file:
            measured = run_of(spec, *perplexities, *reports)
            _append(file, replace(measured, tasks=scored), scored_tokens(parts))
    finally:  # a disk that is full takes no run, but what was measured is shown
        found = Found(spec, setting, perplexities, reports, recovery, scored, speed)
        found.print_json() if arguments.json else found.print(text.stream)


@dataclass(frozen=True)
class Found:
    """What is shown in the end; of pairs the first is the dense model's."""

    spec: ConversionSpec
    setting: dict[str, Any]
    perplexities: list[Perplexity]
    reports: list[ParameterReport]
    recovery: RecoveryReport | None
    scored: Sequence[TaskScore]
    speed: SpeedReport | None

    def print_json(self) -> None:
        changed, recovery, speed = compare(*self.perplexities), self.recovery, self.speed
        models = {
            name: _perplexity_fields(measured) | asdict(report)
            for name, measured, report in zip(
                ("dense", "converted"), self.perplexities, self.reports, strict=True
            )
        }
        print_json(
            {"setting": self.setting, "spec": self.spec.to_dict(), **models}
            | {"recovery": recovery and recovery.to_dict()}
            | {"perplexity_change": asdict(changed), "speed": asdict(speed) if speed else None}
            | {"tasks": [score.to_dict() for score in self.scored]}
        )

    def print(self, stream: bool) -> None:
        """stream: whether the text was cut into windows as a whole."""
        setting, spec = self.setting, self.spec
        print(
            "{model}: {architecture}, {layers} layers, {dtype} on {device}, {threads} threads\n"
            "{text}: {documents} {pieces}, {bytes:,} bytes, {tokens:,} tokens, {windows}".format(
                **setting,
                pieces="windows" if stream else "documents",
                windows=in_windows(setting["window"], setting["stride"]),
            )
        )
        if setting["calibration"]:
            print("calibrated on {calibration}, {calibration_tokens:,} tokens".format(**setting))
        print(f"converted with {spec.to_flags()}")
        print_recovery(self.recovery)
        print()
        rows = [["", "dense", "converted", "difference"]]
        rows += perplexity_rows(*self.perplexities, compare(*self.perplexities))
        rows += parameter_rows(*self.reports)
        rows += speed_rows(self.speed)
        print_table(rows, align="<>><")
        if self.scored:
            print()
            header = ["task", "metric", "questions", "dense", "converted", "difference", ""]
            print_table([header, *task_rows(self.scored)], align="<<>>><<")
            print(TASKS_NOTE)
        if spec.fades and spec.fade_unit != "neuron":
            print("\nFade leaves its zeros in place: they save neither multiply-adds nor time.")


def _tasks(arguments: argparse.Namespace) -> LoadedTasks | None:
    """The tasks of --tasks with their data, before anything else takes time."""
    if arguments.tasks is not None:
        return load_tasks(arguments.tasks.split(","), arguments.tasks_folder, progress)
    for flag in ("tasks_folder", "limit", "shots"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} is for --tasks: name some.")
    return None


def _append(file: RunsFile, run: Run, tokens: int) -> None:
    """Add the run; scores of other tasks that the file has for it stay its own."""
    now = {(score.task, score.metric) for score in run.tasks}
    known = file.read().get(run.spec)
    before = [s for s in (known.tasks if known else ()) if (s.task, s.metric) not in now]
    file.append(replace(run, tasks=(*before, *run.tasks)), tokens)


def _perplexity(
    name: str, model: transformers.PreTrainedModel, parts: Sequence[Window]
) -> Perplexity:
    losses: list[Tensor] = []
    for number, part in enumerate(parts):
        progress(f"perplexity, {name}", number / len(parts))
        losses.append(token_losses(model, part.ids, part.first))
    return summarise(torch.cat(losses), parts)


def _perplexity_fields(measured: Perplexity) -> dict[str, float]:
    return {
        "perplexity": measured.value,
        "stderr": measured.stderr,
        "bits_per_byte": measured.bits_per_byte,
    }
