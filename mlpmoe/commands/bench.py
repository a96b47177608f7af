"""The command `bench`: speed and memory, as ratios in one run."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from ..core.errors import UserError
from ..measure.cost.bench import WRITTEN, bench, machine
from ..measure.cost.bench_plan import LARGE, SHAPES
from .arguments import at_least
from .terminal import bench_line, print_json, progress

NAME, HELP = "bench", "speed and memory of the conversion, as ratios in one run"


USUAL = {"dtype": "both", "shape": "all", "rounds": 7, "tokens": WRITTEN}
ON_GPU = {"dtype": "bfloat16", "shape": "8b"}  # in place of these
QUICK = {"dtype": "bfloat16", "shape": "smollm2", "rounds": 3, "tokens": 32}  # about a minute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "both")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=dtypes, help="default: both; on cuda: bfloat16")
    parser.add_argument(
        "--shape", choices=[*SHAPES, *LARGE, "all"],
        help=f"whose shape the model has (default: all, that is {', '.join(SHAPES)}; on cuda: 8b)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=at_least(3), metavar="N", help="default: 7")
    parser.add_argument(
        "--tokens", type=at_least(2), metavar="N",
        help=f"written in each timed generation (default: {WRITTEN})",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="one shape in one dtype, in about a minute"
    )


def run(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: leave --device away.")
    usual = USUAL | (ON_GPU if device == "cuda" else {}) | (QUICK if arguments.quick else {})
    given = {name: getattr(arguments, name) for name in usual}
    wish = {name: usual[name] if value is None else value for name, value in given.items()}
    dtypes = ["float32", "bfloat16"] if wish["dtype"] == "both" else [wish["dtype"]]
    shapes = list(SHAPES) if wish["shape"] == "all" else [wish["shape"]]
    setting = machine(device) | {"rounds": wish["rounds"], "tokens": wish["tokens"]}
    if not arguments.json:
        features = ", ".join(setting["cpu_features"]) or "no known features"
        kernels = "compiled kernels" if setting["kernels"] else "no compiled kernels"
        chip = f"{setting['gpu']}, " if "gpu" in setting else ""
        print(
            f"random weights · torch {setting['torch']}, {kernels} · {chip}"
            f"{setting['cores']} cores, {setting['threads']} threads ({features}) · "
            f"median and quartiles of {setting['rounds']} rounds"
        )
    lines = []
    for shape in shapes:
        for dtype in dtypes:
            if not arguments.json:
                print(f"\n{shape}, {dtype}", flush=True)
            options = {"rounds": wish["rounds"], "written": wish["tokens"], "report": progress}
            made = (SHAPES | LARGE)[shape]
            for line in bench(getattr(torch, dtype), made, **options, device=device):
                lines.append({"shape": shape} | asdict(line) | {"met": line.met})
                if not arguments.json:
                    progress("")
                    print(bench_line(line), flush=True)
    progress("")
    if arguments.json:
        print_json(setting | {"lines": lines})
