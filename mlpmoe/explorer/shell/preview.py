"""A spec in other words: its numbers for programs, its preset, the code that gives the same."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from ...core.presets import PRESETS
from ...core.spec import ConversionSpec
from ...models import default_calibration
from ...models.texts import TEXTS
from ..server.asked import Conversion, spec_of
from ..server.loaded import LoadedModel
from ..server.texts import OWN_PREFIX


def summary(loaded: LoadedModel, asked: Conversion) -> dict[str, Any]:
    """The numbers of the structure as plain values, for the API."""
    spec, zeros = spec_of(asked), loaded.structure.zeros(asked)
    dense, converted = loaded.report, loaded.structure.report(asked)
    return {
        "model": loaded.label,
        "spec": spec.to_dict(),
        "parameters": {"dense": dense.total, "converted": converted.total},
        "nonzero": {"dense": dense.nonzero, "converted": converted.nonzero},
        "mlp_nonzero": {"dense": dense.mlp_nonzero, "converted": converted.mlp_nonzero},
        "macs_per_token": {"dense": dense.macs_per_token, "converted": converted.macs_per_token},
        "faded": asdict(zeros) if zeros else None,
    }


def preset_name(spec: ConversionSpec) -> str | None:
    """The preset that says the same, if there is one."""
    effect = spec.canonical()
    same = (name for name, preset in PRESETS.items() if preset.canonical() == effect)
    return next(same, None)


def snippet(model: str, spec: ConversionSpec, text: str, calibration: str | None = None) -> str:
    """The run in Python, and in the shell as a comment; both give the figures of the page.

    text, calibration: names of texts, or the file of an own one; calibration None: the default.
    """
    calibration = calibration or default_calibration(model)
    if calibration.startswith(OWN_PREFIX):
        calibration = "own-calibration.txt"
    names = ["ConversionSpec", "compare", "convert", "load", "perplexity"]
    setting, argument, flag = [], "", ""
    if spec.needs_calibration:
        names.append("Calibration")
        setting.append(f"seen = {_reading(calibration, names, 'named_calibration')}")
        argument = ", Calibration.from_text(tokenizer, seen)"
        flag = f" --calibration {calibration}"
    shown = "own-text.txt" if text.startswith(OWN_PREFIX) else text
    stream = text in TEXTS and TEXTS[text].protocol == "stream"
    if stream:
        most = TEXTS[text].most_windows
        names.remove("perplexity")
        setting += [
            f"text = {_reading(text, names, 'named_text')}",
            f"windows = encode_stream(tokenizer, text, context_length(model), {most})",
        ]
        measure = "measure(m, windows)"
    else:
        setting.append(f"text = {_reading(shown, names, 'named_text')}")
        measure = "perplexity(m, tokenizer, text)"
    lines = [
        f"from mlpmoe import {', '.join(sorted(names))}",
        *(
            [
                "from mlpmoe.core.mlps import context_length",
                "from mlpmoe.measure.quality.encoding import encode_stream",
                "from mlpmoe.measure.quality.perplexity import measure",
            ]
            if stream
            else []
        ),
        "",
        f"model, tokenizer = load({model!r})",
        *setting,
        f"converted = convert(model, {spec.to_python()}{argument})",
        f"dense, other = [{measure} for m in (model, converted)]",
        "print(dense.value, other.value, compare(dense, other))",
        "",
        f"# or: python -m mlpmoe evaluate {shlex.quote(model)} --text {shown}{flag} "
        f"{spec.to_flags()}",
    ]
    return "\n".join(lines) + "\n"


def _reading(text: str, names: list[str], by_name: str) -> str:
    """The expression that reads a text; what it needs is added to the names."""
    if text.endswith(".txt"):
        return f"open({text!r}, encoding='utf-8').read()"
    names.append(by_name)
    return f"{by_name}({text!r})"
