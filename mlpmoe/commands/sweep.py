"""The command `sweep`: many conversions of one model, kept in a file that it goes on from."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from ..core.calibration import Calibration
from ..core.errors import SpecError, UserError
from ..core.mlps import read_mlps
from ..core.spec import ConversionSpec, fields_of
from ..measure.notation import change, signed_percent
from ..measure.perplexity import choose_window, encode_text
from ..measure.recipes import recipes
from ..measure.sweep import Run, comparison, sweep
from ..models import load
from .arguments import add_setting, add_spec
from .terminal import print_json, print_table, progress
from .texts import calibration_text_for, evaluation_text, read_text

DEFAULT_ACTIVE = (0.875, 0.75, 0.5)  # budgets of --compare
LEAST_ACTIVE = 0.05  # below, static branches cannot come near


NAME = "sweep"
HELP = "perplexity and compute of many conversions; spec flags take several values, with commas"
EXAMPLES = """examples:
  python -m mlpmoe sweep demo --branches 8,16 --fade 0,0.5,0.9 --out runs.jsonl
  python -m mlpmoe sweep demo --compare --active 0.875,0.75,0.5 --out runs.jsonl
  python -m mlpmoe sweep demo --method cmoe --shared 0.125,0.25,0.375 --selection topk,threshold
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="short name, hub id or folder")
    add_setting(parser)
    parser.add_argument(
        "--compare", action="store_true", help="every method and baseline, at each --active"
    )
    parser.add_argument(
        "--recipes", action="store_true", help="what each stage of the static recipes contributes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="a line of JSON per run; what it holds is kept"
    )
    add_spec(parser)


def run(arguments: argparse.Namespace) -> None:
    values = {
        field.name: getattr(arguments, field.name).split(",")
        for field in fields(ConversionSpec)
        if field.name in arguments
    }
    if arguments.recipes and (values or arguments.compare):
        raise UserError("--recipes takes no spec flags and no --compare.")
    if arguments.recipes:
        specs = list(recipes().items())
    elif not arguments.compare:
        specs = [("", spec) for spec in spec_product(values)]
    elif set(values) - {"active"}:
        raise UserError("--compare takes no other spec flag than --active.")
    else:
        budgets = _budgets(values.get("active"))
    model, tokenizer = load(
        arguments.model, arguments.dtype, arguments.device, on_progress=progress
    )
    if arguments.compare:
        gated = read_mlps(model)[0].weights.gate is not None
        specs = [
            (name, spec)
            for active in budgets
            for name, (_, spec) in comparison(active, gated).items()
        ]
    window, stride = choose_window(model, arguments.window, arguments.stride)
    path, text = evaluation_text(arguments)
    calibration, calibrated_on = None, None
    if any(spec.needs_calibration for _, spec in specs):
        calibration_path, calibration_text = calibration_text_for(arguments, text)
        calibration = Calibration.from_text(tokenizer, calibration_text)
        calibrated_on = f"{calibration_path.name} {_digest(calibration_text)}"
    setting = {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": f"{path.name} {_digest(text)}",
        "calibration": calibrated_on,
        "window": window,
        "stride": stride,
    }
    known = dict(_known(arguments.out, setting)) if arguments.out else {}
    missing = list(dict.fromkeys(spec for _, spec in specs if spec not in known))
    encoded = encode_text(tokenizer, text)
    for run in sweep(model, encoded, missing, calibration, window, stride, progress):
        known[run.spec] = run.to_dict()
        if arguments.out:
            line = json.dumps(setting | {"tokens": encoded.scored_tokens} | run.to_dict())
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    progress("")
    measured = [field.name for field in fields(Run)]
    runs = [{"name": name} | {key: known[spec][key] for key in measured} for name, spec in specs]
    if arguments.json:
        return print_json({"setting": setting, "runs": runs})
    print(
        f"{arguments.model} on {path.name}, {encoded.scored_tokens:,} tokens, windows of {window} "
        f"every {stride}; {len(missing)} measured now, {len(specs) - len(missing)} before"
    )
    rows = [["perplexity", "to dense", "MLP non-zero", "MLP compute", "conversion"]]
    for (name, spec), run in zip(specs, runs, strict=True):
        flags = f"{name}: {spec.to_flags()}" if name else spec.to_flags()
        compute = signed_percent(run["mlp_macs_share"] - 1)
        nonzero = signed_percent(run["mlp_nonzero_share"] - 1)
        changed = change(run["ratio"], run["stderr"])
        rows.append([f"{run['perplexity']:,.2f}", changed, nonzero, compute, flags])
    print_table(rows, align=">>>><")


def _budgets(texts: list[str] | None) -> list[float]:
    """The active shares of --compare; SpecError for what is not between 0.05 and 1."""
    if texts is None:
        return list(DEFAULT_ACTIVE)
    budgets = [ConversionSpec.from_texts({"method": "random", "active": t}).active for t in texts]
    for share in budgets:
        if share < LEAST_ACTIVE:
            raise SpecError(f"active must be at least {LEAST_ACTIVE:g} here, not {share:g}.")
    return budgets


def spec_product(values: dict[str, list[str]]) -> Iterator[ConversionSpec]:
    """Every combination of the values, each combination once. A value that the method of a
    combination does not use is left out of it. SpecError if no method uses it."""
    methods = values.get("method", ["mlpmoe"])
    seen = set()
    for method in methods:
        used = {
            name: given
            for name, given in values.items()
            if name != "method" and (name == "compensation" or name in fields_of(method))
        }
        for combination in product(*used.values()):
            texts = dict(zip(used, combination, strict=True))
            spec = ConversionSpec.from_texts({"method": method} | texts)
            if spec not in seen:
                seen.add(spec)
                yield spec
    for name in set(values) - {"method", "compensation"}:
        if not any(name in fields_of(method) for method in methods):
            raise SpecError(f"{name} does not belong to {', '.join(methods)}.")


def _known(path: Path, setting: dict[str, Any]) -> Iterator[tuple[ConversionSpec, dict[str, Any]]]:
    """The runs in a file that were measured in the same setting. What cannot be read, such as the
    last line of a sweep that was killed, is measured again."""
    if not path.exists():
        return
    text = read_text(path)
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            run = json.loads(line)
            same = all(run[name] == value for name, value in setting.items())
            if same and all(field.name in run for field in fields(Run)):
                yield ConversionSpec.from_dict(run["spec"]), run
        except (ValueError, KeyError, TypeError):
            continue


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
