"""The command `convert`: a checkpoint that other software opens, proven to be the conversion."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.forms.choose import AUTO, DENSE, FORM_WORDS
from ..checkpoints.write.export import SAVED, Exported, export, saved_dtype
from ..checkpoints.write.file_export import export_files
from ..checkpoints.write.source import PiecewiseError
from ..checkpoints.write.streaming import streams
from ..checkpoints.write.target import check_space, check_target
from ..core.conversion import convert
from ..core.spec import ConversionSpec
from ..measure.cost.parameters import parameter_report
from ..models import format_bytes, load, preflight
from ..models.host import DTYPES
from .arguments import (
    MODEL_HELP,
    add_spec,
    add_texts,
    add_training_limit,
    conversion_ways,
    read_spec,
)
from .terminal import print_json, print_recovery, print_table, progress
from .texts import EvaluationText, calibration_text_for, evaluation_text

NAME = "convert"
HELP = "write a conversion as a checkpoint that other software opens, and verify it"
EXAMPLES = """examples:
  python -m mlpmoe convert demo demo-12 --branches 16 --keep 12
  python -m mlpmoe convert demo demo-12 --keep 12 --order least-squares --compensation refit
  python -m mlpmoe convert qwen2.5-0.5b qwen-faded --spec-file conversion.json --dtype float32
  python -m mlpmoe convert demo demo-experts --method expertweaver --active 0.75
  python -m mlpmoe convert demo demo-branches --branches 8 --form branches

A static spec without calibration is converted layer by layer, so the model need not fit into
memory; after an interrupt the same command goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new or empty folder")
    forms = "; ".join(f"{name}: {words}" for name, words in FORM_WORDS.items())
    parser.add_argument("--form", choices=FORM_WORDS, default=AUTO, metavar="FORM", help=forms)
    parser.add_argument(
        "--dtype", choices=(SAVED, *DTYPES), default=SAVED, metavar="DTYPE",
        help=f"of the files: saved (as those of MODEL, the default), {', '.join(DTYPES)}",
    )  # fmt: skip
    parser.add_argument(
        "--compute", choices=("auto", *DTYPES), default="auto", metavar="DTYPE",
        help="that the model is measured in (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; where it is measured"
    )
    add_texts(parser)
    add_spec(parser)
    add_training_limit(parser)


def run(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments)
    ways = conversion_ways(arguments, spec)
    check_target(arguments.folder)
    text = evaluation_text(arguments)
    made = None
    if streams(spec) and arguments.form in (AUTO, DENSE):
        try:
            made = _from_files(arguments, spec, text)
        except PiecewiseError as error:
            progress(str(error))
    if made is None:
        made = _from_memory(arguments, spec, text, ways)
    progress("")
    if arguments.json:
        print_json({"folder": str(made.folder), "bytes": made.bytes} | made.record.to_dict())
    else:
        _print(made)


def _from_files(
    arguments: argparse.Namespace, spec: ConversionSpec, text: EvaluationText
) -> Exported:
    checked = preflight(
        arguments.model, device=arguments.device, dtype=arguments.compute, in_memory=False
    )
    return export_files(
        checked, arguments.folder, spec, dtype=arguments.dtype,
        encode=lambda tokenizer, model: text.encode(tokenizer, model)[0], text_name=text.name,
        on_progress=progress,
    )  # fmt: skip


def _from_memory(
    arguments: argparse.Namespace, spec: ConversionSpec, text: EvaluationText,
    ways: dict[str, Any],
) -> Exported:  # fmt: skip
    seen = calibration_text_for(arguments, text.content) if spec.needs_calibration else None
    dense, tokenizer = load(
        arguments.model, arguments.compute, arguments.device, on_progress=progress
    )
    # before minutes of calibration and training, whose result would be lost
    least = _least_bytes(dense, spec, arguments.dtype)
    check_space(arguments.folder.expanduser().absolute(), least, "takes at least")
    calibration = seen.encode(tokenizer, dense) if seen else None
    model = convert(dense, spec, calibration, **ways)
    return export(
        model, arguments.folder, tokenizer=tokenizer,
        text=text.encode(tokenizer, dense)[0], text_name=text.name, dense=dense,
        calibration_name=seen.name if seen else None, form=arguments.form, dtype=arguments.dtype,
        on_progress=progress,
    )  # fmt: skip


def _least_bytes(dense: PreTrainedModel, spec: ConversionSpec, dtype: str) -> int:
    """Of a checkpoint: what stands outside of the MLPs, and what is computed of those for a token
    at least; which neurons are left out by fade is not known yet."""
    report = parameter_report(dense)
    share = spec.active if spec.routed else spec.kept / spec.branches
    if spec.fade_unit == "neuron" and spec.fades:
        share = 0.0
    parameters = report.total - report.mlp_total + int(share * report.mlp_total)
    return parameters * saved_dtype(dense, dtype).itemsize


def _print(made: Exported) -> None:
    found, record = made.verification, made.record
    print(f"{made.folder}: {format_bytes(made.bytes)}, {record.architecture}, {found.saved_dtypes}")
    print(f"converted with {record.spec.to_flags()}")
    print_recovery(record.recovery)
    print()
    rows = [
        ["largest difference of a logit", f"{found.max_logit_difference:.2g}"],
        ["  of the largest logit", f"{found.relative_difference:.1e}"],
        ["  allowed", f"{found.allowed:.1e}"],
        ["same likeliest token", f"{found.argmax_agreement:.2%} of {found.compared_tokens:,}"],
    ]
    if found.perplexity is not None:
        if record.measured:
            rows.append(["perplexity, dense", f"{record.measured.dense.value:,.4f}"])
        rows += [
            ["perplexity, converted, in memory", f"{found.perplexity:,.4f}"],
            ["perplexity, reloaded", f"{found.reloaded_perplexity:,.4f}"],
            [f"  tokens of {record.text}", f"{found.scored_tokens:,}"],
        ]
    print_table(rows, align="<>")
    for note in record.notes:
        print(f"\n{note}")
    code = ", trust_remote_code=True" if record.remote_code else ""
    print(f'\nAutoModelForCausalLM.from_pretrained("{made.folder}"{code})')
