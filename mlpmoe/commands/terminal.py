"""What the command line writes: tables, JSON, progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..core.recovery.report import RecoveryReport
from ..measure.cost.bench import BenchLine
from ..measure.cost.parameters import ParameterReport
from ..measure.cost.speed import SpeedReport
from ..measure.notation import (
    NBSP,
    difference,
    number,
    score_difference,
    scores,
    signed_percent,
    speedup,
)
from ..measure.quality.perplexity import Perplexity, PerplexityChange
from ..measure.quality.tasks import TaskScore

_shown = ""  # by `progress`


def progress(message: str, fraction: float | None = None) -> None:
    """Replace the line on stderr that says what is being done, if a person may be watching. The
    same may be told any number of times."""
    global _shown
    line = message if fraction is None else f"{message} {fraction:.0%}"
    if line != _shown and sys.stderr.isatty():
        _shown = line
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


class TrainingProgress:
    """`progress` of a conversion, with what training has come to behind its steps."""

    def __init__(self) -> None:
        self.seen = ""

    def __call__(self, message: str, fraction: float | None = None) -> None:
        progress(f"{message}{self.seen}", fraction)

    def look(self, report: RecoveryReport) -> None:
        self.seen = f", held-out KL {report.looks[-1].held_out:.4g} (before {report.before:.4g}),"


def perplexity_rows(
    dense: Perplexity, converted: Perplexity, changed: PerplexityChange
) -> Iterator[list[str]]:
    def with_error(measured: Perplexity) -> str:
        if measured.value >= 1e4 or not math.isfinite(measured.value + measured.stderr):
            return number(measured.value)
        return f"{measured.value:,.2f} ± {measured.stderr:,.2f}"

    yield ["perplexity", with_error(dense), with_error(converted), difference(changed)]
    bits = dense.bits_per_byte, converted.bits_per_byte
    more = bits[1] - bits[0]
    yield [
        "bits per byte",
        *(f"{value:.3f}" if math.isfinite(value) else number(value) for value in bits),
        f"{more:+.3f}" if math.isfinite(more) else number(more),
    ]


def parameter_rows(dense: ParameterReport, converted: ParameterReport) -> Iterator[list[str]]:
    names = {
        "total": "parameters",
        "nonzero": "  not zero",
        "mlp_total": "  in MLPs",
        "mlp_nonzero": "  in MLPs, not zero",
        "macs_per_token": "multiply-adds per token",
        "mlp_macs_per_token": "  in MLPs",
    }
    for field, name in names.items():
        old, new = getattr(dense, field), getattr(converted, field)
        shown = f"{new - old:+,}".replace("-", "−").replace("+0", "0")
        if new != old:
            shown += f" ({signed_percent(new / old - 1)})"
        yield [name, f"{old:,}", f"{new:,}", shown]


def speed_rows(speed: SpeedReport | None) -> Iterator[list[str]]:
    if speed is None:
        return
    yield [
        "tokens written per second",
        number(speed.dense),
        number(speed.converted),
        speedup(speed.speedup),
    ]
    if speed.plain is not None:
        yield ["  by torch alone", number(speed.plain), "", ""]


def print_recovery(report: RecoveryReport | None) -> None:
    """What training did, and what it saw on its way."""
    if report is None:
        return
    rows = [["step", "KL, trained on", "held out", ""]]
    for look in report.looks:
        trained = "" if look.train is None else f"{look.train:.4g}"
        kept = "kept" if look.step == report.best else ""
        rows.append([f"{look.step:,}", trained, f"{look.held_out:.4g}", kept])
    print(report)
    print_table(rows, align=">>><")


def task_rows(found: Sequence[TaskScore]) -> Iterator[list[str]]:
    """A row per task and metric; what is special about an error stands behind it."""
    for score in found:
        shots = "shots differ" if score.shots is None else f"{score.shots}-shot"
        note = "" if score.paired or score.difference_stderr is None else "not paired"
        asked = f"{score.samples:,} × {shots}"
        yield [score.task, score.metric, asked, *scores(score), score_difference(score), note]


def bench_line(line: BenchLine) -> str:
    def shown(value: float) -> str:
        if line.unit == "%":
            return f"{100 * value:{'.2g' if abs(value) < 1 else '.0f'}} %"
        return f"× {number(value)}" if line.unit == "×" else f"{number(value)} {line.unit}"

    measured = line.measured
    spread = ""
    if measured.low != measured.high:
        scale = 100 if line.unit == "%" else 1
        spread = f"({number(scale * measured.low)} to {number(scale * measured.high)})"
    target = ""
    if line.target is not None:
        sign = "≥" if line.at_least else "≤"
        target = f"target {sign} {shown(line.target)}: {'met' if line.met else 'not met'}"
    text = f"  {line.what:<72}{shown(measured.median):>9} {spread:<18}{target}"
    return f"{text.rstrip()}{'   ' + line.note if line.note else ''}"


def print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Columns two spaces apart, each aligned left (<) or right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        )
        print("  ".join(cells).replace(NBSP, " ").rstrip())


def print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with None for infinite and undefined numbers, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
