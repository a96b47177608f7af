"""The command `bench`: speed and memory, as ratios in one run."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from ..measure.cost.bench import LAYERS, bench, machine
from .arguments import at_least
from .terminal import bench_line, print_json, progress

NAME, HELP = "bench", "speed and memory of the conversion, as ratios in one run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "both")
    parser.add_argument("--dtype", choices=dtypes, default="both", help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=at_least(3), default=7, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--layers", type=at_least(1), default=LAYERS, metavar="N", help="default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> None:
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
