"""Runs of a search that nobody made, and what can be said of them without the search."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import plotly.graph_objects as go

from mlpmoe import ConversionSpec
from mlpmoe.measure.runs.sweep import Run


def a_run(cost=0.5, ratio=1.1, spec=None, stderr=0.01, macs=None) -> Run:
    spec = spec or ConversionSpec(branches=32, keep=20)
    compute = macs or cost
    return Run(spec, 5.0 * ratio, ratio, stderr, 1.0, 100, cost, cost, 100, compute, compute)


def nonzero(run: Run) -> float:
    return run.mlp_nonzero_share


def compute(run: Run) -> float:
    return run.mlp_macs_share


def beaten(run: Run, others: Iterable[Run], cost: Callable[[Run], float]) -> bool:
    """Whether another one is at least as good in both and better in one."""
    mine = cost(run), run.ratio
    return any(
        cost(o) <= mine[0] and o.ratio <= mine[1] and (cost(o), o.ratio) != mine for o in others
    )


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = figure.select_traces({"name": name})
    return found
