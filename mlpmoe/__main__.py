"""The command line: `python -m mlpmoe COMMAND`. Each command is thin over one of the library's."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
import transformers
from torch import Tensor

from . import sweeping
from .core.calibration import Calibration
from .core.compensation import COMPENSATIONS, FILLS
from .core.conversion import convert, mlp_modules
from .core.errors import UnsupportedModelError, UserError
from .core.order import ORDERS
from .core.routed.routers import ROUTERS
from .core.spec import METHODS, PROFILES, SELECTIONS, ConversionSpec
from .measure.bench import LAYERS, bench, machine
from .measure.parameters import parameter_report
from .measure.perplexity import (
    EncodedText,
    Perplexity,
    choose_window,
    compare,
    encode_text,
    summarise,
    window_losses,
)
from .measure.speed import decode_speed
from .models import CATALOGUE, ModelError, load
from .sweeping import calibration_text_for, evaluation_text
from .terminal import (
    bench_line,
    parameter_rows,
    perplexity_rows,
    print_json,
    print_table,
    progress,
    speed_rows,
)

EXIT_STATUS = (
    "exit status: 0 done, 1 failed, 2 wrong usage or a value out of range, 130 interrupted"
)
EXAMPLES = """examples:
  python -m mlpmoe models
  python -m mlpmoe evaluate demo --branches 16 --fade 0.9
  python -m mlpmoe evaluate qwen2.5-0.5b --keep 12 --compensation none --text mine.txt --json
  python -m mlpmoe sweep demo --compare --active 0.75,0.5 --out runs.jsonl
  python -m mlpmoe bench --layers 4 --rounds 3
"""
EVALUATE_EXAMPLES = """examples:
  python -m mlpmoe evaluate demo --branches 16 --fade 0.9
  python -m mlpmoe evaluate ./my-model --branches 16 --keep 12 --window 512 --stride 256
"""
SWEEP_EXAMPLES = """examples:
  python -m mlpmoe sweep demo --branches 8,16 --fade 0,0.5,0.9 --out runs.jsonl
  python -m mlpmoe sweep demo --compare --active 0.875,0.75,0.5 --out runs.jsonl
  python -m mlpmoe sweep demo --method cmoe --shared 0.125,0.25,0.375 --selection topk,threshold
"""
SPEC_FLAGS = {  # field -> its placeholder, and what a person needs to know beside the name
    "method": ("NAME", f"method of conversion: {', '.join(METHODS)}"),
    "branches": ("B", "branches per MLP"),
    "fade": (
        "S",
        "Fractal Fade strength: branch i loses its smallest min(1, S·i/B) of gate and up",
    ),
    "keep": ("K", "only the first K branches stay"),
    "order": ("NAME", f"which neurons come first: {', '.join(ORDERS)}"),
    "compensation": (
        "NAME",
        f"static: {', '.join(COMPENSATIONS)}; sqrt is √(B/K). Routed: {', '.join(FILLS)}",
    ),
    "experts": ("N", "experts per MLP, shared ones included"),
    "active": ("SHARE", "routed: share of the neurons that run for a token"),
    "shared": ("SHARE", "share of the neurons that always run, or auto (expertweaver)"),
    "router": ("NAME", f"what scores the experts: {', '.join(ROUTERS)}; neurons: gate, gate-norm"),
    "selection": ("NAME", f"which scores win: {', '.join(SELECTIONS)}"),
    "profile": ("NAME", f"gate activations that expertweaver averages: {', '.join(PROFILES)}"),
    "tau": ("T", "coefficient of variation of a specialised neuron (expertweaver)"),
    "progressive": ("BOOL", "profile each layer on the converted layers before it"),
    "seed": ("N", "of what a method draws"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± or √ gets a ?
    arguments = _parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ModelError, UnsupportedModelError, OSError, UnicodeError) as error:
        return _fail(error, 1)
    except UserError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(reason: object, status: int) -> int:
    progress("")
    print(f"mlpmoe: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


# Arguments ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        "python -m mlpmoe",
        description="Turn the dense MLPs of a language model into a mixture of experts, and "
        "measure it.",
        epilog=f"{EXAMPLES}\n{EXIT_STATUS}",
        **layout,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable, name: str, help: str, examples: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help, description=help, epilog=examples or None, **layout
        )
        made.add_argument("--json", action="store_true", help="one JSON object, nothing rounded")
        made.set_defaults(run=run)
        return made

    command(run_models, "models", "the models that have a short name")

    evaluate = command(
        run_evaluate,
        "evaluate",
        "perplexity, parameters and speed of a model and of its conversion",
        EVALUATE_EXAMPLES,
    )
    evaluate.add_argument("model", metavar="MODEL", help="short name, hub id or folder")
    _add_setting(evaluate)
    evaluate.add_argument("--no-speed", dest="speed", action="store_false", help="skip speed")
    _add_spec(evaluate)

    sweep = command(
        sweeping.run_sweep,
        "sweep",
        "perplexity and compute of many conversions; spec flags take several values, with commas",
        SWEEP_EXAMPLES,
    )
    sweep.add_argument("model", metavar="MODEL", help="short name, hub id or folder")
    _add_setting(sweep)
    sweep.add_argument(
        "--compare", action="store_true", help="every method and baseline, at each --active"
    )
    sweep.add_argument(
        "--out", type=Path, metavar="FILE", help="a line of JSON per run; what it holds is kept"
    )
    _add_spec(sweep)

    benchmark = command(
        run_bench, "bench", "speed and memory of the conversion, as ratios in one run"
    )
    dtypes = ("float32", "bfloat16", "both")
    benchmark.add_argument("--dtype", choices=dtypes, default="both", help="default: %(default)s")
    benchmark.add_argument(
        "--rounds", type=_at_least(3), default=7, metavar="N", help="default: %(default)s"
    )
    benchmark.add_argument(
        "--layers", type=_at_least(1), default=LAYERS, metavar="N", help="default: %(default)s"
    )
    return parser


def _add_setting(parser: argparse.ArgumentParser) -> None:
    """What is measured on what, and where."""
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8; default: our stories")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text that methods may look at, UTF-8; default: other stories of ours",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, ...")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _add_spec(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of ConversionSpec, which reads and checks the values itself."""
    group = parser.add_argument_group("conversion")
    for field in fields(ConversionSpec):
        default = {"keep": "all"}.get(field.name, "the method's")
        default = default if field.default is None else field.default
        placeholder, meaning = SPEC_FLAGS.get(field.name, ("VALUE", field.name))
        group.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar=placeholder,
            help=f"{meaning} (default: {default})",
        )


def _spec(arguments: argparse.Namespace) -> ConversionSpec:
    names = [field.name for field in fields(ConversionSpec) if field.name in arguments]
    return ConversionSpec.from_texts({name: getattr(arguments, name) for name in names})


def _at_least(minimum: int) -> Callable[[str], int]:
    def number_of(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    number_of.__name__ = "whole number"  # argparse names it in its message
    return number_of


# models ------------------------------------------------------------------------------------


def run_models(arguments: argparse.Namespace) -> None:
    if arguments.json:
        entries = [asdict(entry) | {"source": str(entry.source)} for entry in CATALOGUE]
        return print_json({"models": entries})
    rows = [["model", "parameters", "GPU", "note"]]
    for entry in CATALOGUE:
        gpu = "needed" if entry.needs_gpu else ""
        rows.append([entry.key, f"{entry.parameters:,}", gpu, entry.note])
    print_table(rows, align="<><<")


# evaluate ----------------------------------------------------------------------------------


def run_evaluate(arguments: argparse.Namespace) -> None:
    spec = _spec(arguments)
    path, text = evaluation_text(arguments)
    if spec.needs_calibration:
        calibration_path, calibration_text = calibration_text_for(arguments, text)
    dense, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    window, stride = choose_window(dense, arguments.window, arguments.stride)
    encoded = encode_text(tokenizer, text)
    progress("converting")
    calibration = None
    if spec.needs_calibration:
        calibration = Calibration.from_text(tokenizer, calibration_text)
    converted = convert(dense, spec, calibration, on_progress=progress)
    perplexities = [
        _perplexity(name, model, encoded, window, stride)
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
        "text": path.name,
        "documents": len(encoded.documents),
        "bytes": encoded.scored_bytes,
        "tokens": encoded.scored_tokens,
        "window": window,
        "stride": stride,
        "calibration": calibration_path.name if calibration else None,
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
        "{text}: {documents} documents, {bytes:,} bytes, {tokens:,} tokens, "
        "windows of {window} every {stride}".format(**setting)
    )
    if calibration:
        print("calibrated on {calibration}, {calibration_tokens:,} tokens".format(**setting))
    print(f"converted with {spec.to_flags()}\n")
    rows = [["", "dense", "converted", "difference"]]
    rows += perplexity_rows(*perplexities, changed)
    rows += parameter_rows(*reports)
    rows += speed_rows(speed)
    print_table(rows, align="<>><")
    if spec.fade:
        print("\nFade leaves its zeros in place: they save neither multiply-adds nor time.")


def _perplexity(
    name: str, model: transformers.PreTrainedModel, text: EncodedText, window: int, stride: int
) -> Perplexity:
    losses: list[Tensor] = []
    done = 0
    progress(f"perplexity, {name}", 0)
    for piece in window_losses(model, text, window, stride):
        losses.append(piece)
        done += len(piece)
        progress(f"perplexity, {name}", done / text.scored_tokens)
    return summarise(torch.cat(losses), text.scored_bytes)


def _perplexity_fields(measured: Perplexity) -> dict[str, float]:
    return {
        "perplexity": measured.value,
        "stderr": measured.stderr,
        "bits_per_byte": measured.bits_per_byte,
    }


# bench -------------------------------------------------------------------------------------


def run_bench(arguments: argparse.Namespace) -> None:
    dtypes = ["float32", "bfloat16"] if arguments.dtype == "both" else [arguments.dtype]
    setting = machine() | {"rounds": arguments.rounds, "layers": arguments.layers}
    if not arguments.json:
        features = ", ".join(setting["cpu_features"]) or "no known features"
        print(
            f"Qwen2.5-0.5B shape, {arguments.layers} layers, random weights · "
            f"torch {setting['torch']} · {setting['cores']} cores, {setting['threads']} threads "
            f"({features}) · median and quartiles of {arguments.rounds} rounds"
        )
    lines = []
    for dtype in dtypes:
        if not arguments.json:
            print(f"\n{dtype}", flush=True)
        options = {"layers": arguments.layers, "rounds": arguments.rounds}
        for line in bench(getattr(torch, dtype), **options, report=progress):
            lines.append(line)
            if not arguments.json:
                progress("")
                print(bench_line(line), flush=True)
    progress("")
    if arguments.json:
        print_json(setting | {"lines": [asdict(line) | {"met": line.met} for line in lines]})


if __name__ == "__main__":
    sys.exit(main())
