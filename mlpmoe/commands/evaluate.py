"""The command `evaluate`: one model and one conversion of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers
from torch import Tensor

from ..core.conversion import convert, mlp_modules
from ..measure.cost.parameters import parameter_report
from ..measure.cost.speed import decode_speed
from ..measure.quality.encoding import Window, scored_tokens, windows
from ..measure.quality.head import token_losses
from ..measure.quality.perplexity import Perplexity, compare, summarise
from ..models import load
from .arguments import MODEL_HELP, add_setting, add_spec, read_spec
from .terminal import parameter_rows, perplexity_rows, print_json, print_table, progress, speed_rows
from .texts import calibration_text_for, evaluation_text, in_windows

NAME, HELP = "evaluate", "perplexity, parameters and speed of a model and of its conversion"
EXAMPLES = """examples:
  python -m mlpmoe evaluate demo --branches 16 --fade 0.9
  python -m mlpmoe evaluate ./my-model --branches 16 --keep 12 --window 512 --stride 256
  python -m mlpmoe evaluate qwen2.5-0.5b --branches 16 --fade 0.9 --text wikitext2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_setting(parser)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="skip speed")
    add_spec(parser)


def run(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments)
    text = evaluation_text(arguments)
    seen = calibration_text_for(arguments, text.content) if spec.needs_calibration else None
    dense, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    encoded, window, stride = text.encode(tokenizer, dense)
    parts = windows(dense, encoded, window, stride)
    progress("converting")
    calibration = seen.encode(tokenizer, dense) if seen else None
    converted = convert(dense, spec, calibration, on_progress=progress)
    perplexities = [
        _perplexity(name, model, parts)
        for name, model in (("dense", dense), ("converted", converted))
    ]
    speed = None
    if arguments.speed:
        progress("measuring speed")
        speed = decode_speed(dense, converted)
    progress("counting parameters")
    reports = [parameter_report(model) for model in (dense, converted)]
    progress("")
    changed = compare(*perplexities)
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
    if arguments.json:
        models = {
            name: _perplexity_fields(measured) | asdict(report)
            for name, measured, report in zip(
                ("dense", "converted"), perplexities, reports, strict=True
            )
        }
        print_json(
            {"setting": setting, "spec": spec.to_dict(), **models}
            | {"perplexity_change": asdict(changed), "speed": asdict(speed) if speed else None}
        )
        return
    print(
        "{model}: {architecture}, {layers} layers, {dtype} on {device}, {threads} threads\n"
        "{text}: {documents} {pieces}, {bytes:,} bytes, {tokens:,} tokens, {windows}".format(
            **setting,
            pieces="windows" if text.stream else "documents",
            windows=in_windows(window, stride),
        )
    )
    if calibration:
        print("calibrated on {calibration}, {calibration_tokens:,} tokens".format(**setting))
    print(f"converted with {spec.to_flags()}\n")
    rows = [["", "dense", "converted", "difference"]]
    rows += perplexity_rows(*perplexities, changed)
    rows += parameter_rows(*reports)
    rows += speed_rows(speed)
    print_table(rows, align="<>><")
    if spec.fades and spec.fade_unit != "neuron":
        print("\nFade leaves its zeros in place: they save neither multiply-adds nor time.")


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
