"""What training after a conversion moved, on plots of cost: an arrow from the same conversion
without it, and words at both."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import plotly.graph_objects as go

from ...core.recovery.kinds import NOTHING, RECOVERIES
from ...core.spec import ConversionSpec
from ...measure.notation import change
from ...measure.runs.sweep import Run

HEAD, WIDTH = 10, 1.2  # pixels
STANDOFF = 8  # pixels between the head and the middle of its point, which may be where one is
MOST_SAID = 3  # trainings, at the point that they begin from
Point = tuple[float, float]


def trained_pairs(
    runs: Sequence[Run], texts: Sequence[Hashable] | None = None
) -> list[tuple[int, int]]:
    """Numbers of runs, and of the same conversions trained, where both were measured. texts: what
    each was calibrated on, which has to be the same where the untrained conversion looks at it;
    by default it is."""
    texts = [None] * len(runs) if texts is None else texts
    before: dict[tuple, int] = {}
    for number, (run, text) in enumerate(zip(runs, texts, strict=True)):
        if not run.spec.recovers:
            before.setdefault(_key(run.spec, text), number)
    found = []
    for number, (run, text) in enumerate(zip(runs, texts, strict=True)):
        origin = before.get(_key(replace(run.spec, recover=NOTHING), text))
        if run.spec.recovers and origin is not None:
            found.append((origin, number))
    return found


def _key(spec: ConversionSpec, text: Hashable) -> tuple:
    return spec.canonical(), text if spec.needs_calibration else None


def said_at_both(runs: Sequence[Run], pairs: Iterable[tuple[int, int]]) -> Mapping[int, str]:
    """What the hover text of a run says of the other end of its arrows, by number of the run."""
    said: dict[int, list[str]] = {}
    for origin, number in pairs:
        before, after = runs[origin], runs[number]
        spec = after.spec
        what = f"{RECOVERIES[spec.recover].short} ({spec.recover_steps} steps)"
        said.setdefault(origin, []).append(f"{what}: {_perplexity(after)}")
        said[number] = [f"without training: {_perplexity(before)}"]
    return {number: "<br>".join(["", *some[:MOST_SAID]]) for number, some in said.items()}


def _perplexity(run: Run) -> str:
    return f"perplexity {change(run.ratio, run.stderr)}"


def add_arrows(
    figure: go.Figure, ends: Iterable[tuple[Point, Point]], colours: Sequence[str]
) -> None:
    """A thin arrow between each two points, in the colour of the second. It cannot be pointed at;
    its ends can."""
    drawn = 0
    for (before, after), colour in zip(ends, colours, strict=True):
        if before == after:  # nothing that these axes show was won
            continue
        figure.add_scatter(
            x=[before[0], after[0]], y=[before[1], after[1]], mode="lines+markers",
            name="training", legendgroup="training", showlegend=not drawn, hoverinfo="skip",
            line={"color": colour, "width": WIDTH},
            marker={
                "color": colour, "symbol": ["circle", "arrow"], "size": [0, HEAD], "opacity": 1,
                "angleref": "previous", "standoff": [0, STANDOFF], "line": {"width": 0},
            },
        )  # fmt: skip
        drawn += 1
