"""Records of runs that nobody measured, for tests of tables and plots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlpmoe import ConversionSpec
from mlpmoe.explorer.shell.records import Record
from mlpmoe.measure.cost.speed import Ratio
from mlpmoe.measure.quality.tasks import TaskScore
from mlpmoe.measure.runs.sweep import Run

FIGURES = {
    "perplexity": 12.0, "ratio": 1.2, "stderr": 0.01, "bits_per_byte": 1.1, "nonzero": 900,
    "nonzero_share": 0.9, "mlp_nonzero_share": 0.8, "macs_per_token": 950, "macs_share": 0.95,
    "mlp_macs_share": 0.75,
}  # fmt: skip


def made_run(spec: ConversionSpec | None = None, **figures: Any) -> Run:
    """A run whose other figures are those of FIGURES."""
    assert set(figures) <= set(FIGURES)
    return Run(spec or ConversionSpec(keep=12), **FIGURES | figures)


def made_record(
    spec: ConversionSpec | None = None, *, model: str = "demo", text: str = "stories",
    tokens: int = 1000, dense: float = 10.0, when: str = "2026-11-25T21:07:00Z",
    speed: Ratio | None = None, source: str = "measured", pinned: int = 0,
    tasks: tuple[TaskScore, ...] = (), **figures: Any,
) -> Record:  # fmt: skip
    run = replace(made_run(spec, **figures), tasks=tasks)
    return Record(model, text, tokens, dense, run, when, speed, source, pinned)
