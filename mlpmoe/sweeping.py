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

from .core.calibration import Calibration, check_disjoint
from .core.errors import SpecError, UserError
from .core.mlps import read_mlps
from .core.spec import ConversionSpec, fields_of
from .measure.notation import change, signed_percent
from .measure.perplexity import choose_window, encode_text
from .measure.sweep import Run, comparison, sweep
from .models import assets_folder, load
from .terminal import print_json, print_table, progress

DEFAULT_ACTIVE = (0.875, 0.75, 0.5)  # budgets of --compare
LEAST_ACTIVE = 0.05  # below, static branches cannot come near


def run_sweep(arguments: argparse.Namespace) -> None:
    values = {
        field.name: getattr(arguments, field.name).split(",")
        for field in fields(ConversionSpec)
        if field.name in arguments
    }
    if not arguments.compare:
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
    rows = [["perplexity", "to dense", "MLP compute", "conversion"]]
    for (name, spec), run in zip(specs, runs, strict=True):
        flags = f"{name}: {spec.to_flags()}" if name else spec.to_flags()
        compute = signed_percent(run["mlp_macs_share"] - 1)
        rows.append(
            [f"{run['perplexity']:,.2f}", change(run["ratio"], run["stderr"]), compute, flags]
        )
    print_table(rows, align=">>><")


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
            if all(run[name] == value for name, value in setting.items()):
                yield ConversionSpec.from_dict(run["spec"]), run
        except (ValueError, KeyError, TypeError):
            continue


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def evaluation_text(arguments: argparse.Namespace) -> tuple[Path, str]:
    """Path and content of the text that perplexity is measured on."""
    path = arguments.text or assets_folder() / "texts" / "evaluation.txt"
    return path, read_text(path)


def calibration_text_for(arguments: argparse.Namespace, evaluation: str) -> tuple[Path, str]:
    """Path and content of the calibration text. UserError if it shares a passage with the
    evaluation text."""
    path = arguments.calibration or assets_folder() / "texts" / "calibration.txt"
    text = read_text(path)
    check_disjoint(text, evaluation)
    return path, text


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises OSError and UnicodeError with messages for a person."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnicodeError(f"{path} is not UTF-8 text (byte {error.start:,}).") from error
