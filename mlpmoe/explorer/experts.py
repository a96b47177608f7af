"""What happens on the tab of routed experts: settings in, measured figures and plots out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from math import exp, log
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.calibration import check_disjoint
from ..core.errors import UserError
from ..core.routed import ROUTED_METHODS
from ..core.spec import ConversionSpec
from ..measure.notation import count, difference, number, signed_percent
from ..measure.parameters import ParameterReport
from ..measure.routing import routing
from ..measure.sweep import BOUND, STATIC, comparison
from ..models import default_text
from ..models.texts import check_own_text
from .asked import Calibrated, Conversion
from .expert_figures import coloured_tokens, load_plot, split_plot, story_ids, variation_plot
from .expert_plots import Point, tradeoff
from .expert_settings import OWN, read_spec
from .experts_panel import EMPTY
from .loaded import Evaluation, LoadedModel
from .preview import snippet
from .records import measured_record, write_records
from .shipped import shipped
from .texts import text_name
from .workbench import Workbench

BUDGETS = (0.875, 0.75, 0.5)  # active shares of the comparison that comes with the demo model
LOAD_TOKENS = 512  # of that text, for the load of experts
SHOWN_POINTS = 12  # measured here, the latest


class ExpertHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def describe(self, model: str, *settings: Any) -> tuple:
        """About the method, snippet, whether it has experts, and the trade-off plot so far."""
        loaded = self.workbench.loaded(model)
        try:
            spec = read_spec(*settings[:-2])
            seen = "own-calibration.txt" if settings[-2] == OWN else None
            shown = snippet(loaded.key, spec, default_text(loaded.key), seen)
        except UserError as error:
            shown = f"# {error}"
        method = settings[0]
        has_experts = "experts" in ROUTED_METHODS[method].fields
        return (
            ROUTED_METHODS[method].about,
            shown,
            gr.update(interactive=has_experts),
            tradeoff(points(loaded)),
        )

    def another_model(self, model: str) -> tuple:
        """Result, details and layer, when what they showed was another model's."""
        layers = len(self.workbench.loaded(model).mlps)
        return EMPTY, gr.update(visible=False), gr.update(maximum=max(1, layers - 1), value=0)

    def read_file(self, path: str | None) -> tuple:
        """An uploaded calibration text."""
        if path is None:
            return gr.skip(), gr.skip()
        return check_own_text(Path(path).read_bytes()), OWN

    def measure(self, model: str, layer: int, *settings: Any) -> Iterator[tuple]:
        """Status, result, trade-off, details and what they hold, as the work goes on."""
        loaded = self.workbench.loaded(model)
        spec = read_spec(*settings[:-2])
        spec.check_fits(loaded.d_ff)
        asked = calibrated(loaded, spec, *settings[-2:])
        kind = BOUND if spec.router == "oracle" else "here"
        for message in self._measure(loaded, asked, ROUTED_METHODS[spec.method].label, kind):
            yield _status(message), *(gr.skip(),) * 8
        evaluation = loaded.known_evaluation(asked, default_text(loaded.key))
        converted = loaded.converted(asked)
        report, share = loaded.structure.report(asked), loaded.points[asked].compute
        found = routing(converted, story_ids(loaded)[:LOAD_TOKENS])
        varied = variation_plot(converted, spec.tau)
        yield (
            _status(""),
            result(loaded, spec, evaluation, report, share),
            tradeoff(points(loaded)),
            gr.update(visible=True),
            load_plot(found),
            split_plot(converted, found),
            gr.update(value=varied, visible=varied is not None),
            coloured_tokens(loaded, found, layer),
            self._record(loaded, asked),
        )

    def measure_static(self, model: str, active: float) -> Iterator[tuple]:
        """Status and trade-off, with the calibrated static recipes at the same share of neurons."""
        loaded = self.workbench.loaded(model)
        for name, (kind, spec) in comparison(active).items():
            if kind != STATIC or not spec.needs_calibration:
                continue
            asked = loaded.asked(spec)
            for message in self._measure(loaded, asked, name, STATIC):
                yield _status(f"{name}: {message}"), gr.skip(), gr.skip()
            yield _status(""), tradeoff(points(loaded)), self._record(loaded, asked)

    def _record(self, loaded: LoadedModel, asked: Conversion) -> str:
        """The run for the browser to keep; none on a calibration text of the visitor's own, which
        a link cannot carry."""
        if isinstance(asked, Calibrated) and asked.key == OWN:
            return gr.skip()
        return write_records([measured_record(loaded, asked, default_text(loaded.key), "experts")])

    def _measure(
        self, loaded: LoadedModel, asked: Conversion, name: str, kind: str
    ) -> Iterator[str]:
        """Convert and measure, yielding what is being done; the result becomes a point."""
        for message in loaded.convert(asked):
            yield f"{message} …"
        for step in loaded.evaluate(asked, default_text(loaded.key)):
            yield f"measuring perplexity, {step.dense.tokens / step.total:.0%}"
        report = loaded.structure.report(asked)
        share = report.mlp_macs_per_token / loaded.report.mlp_macs_per_token
        loaded.points.pop(asked, None)  # so that it comes last
        loaded.points[asked] = Point(name, kind, share, step.change.ratio, step.change.stderr)

    def recolour(self, model: str, layer: int, *settings: Any) -> str:
        """The coloured words of another layer, of what was measured last with these settings."""
        loaded = self.workbench.loaded(model)
        try:
            asked = calibrated(loaded, read_spec(*settings[:-2]), *settings[-2:])
        except UserError:
            return EMPTY
        if asked not in loaded.points:
            return EMPTY
        found = routing(loaded.converted(asked), story_ids(loaded)[:LOAD_TOKENS])
        return coloured_tokens(loaded, found, layer)


def calibrated(loaded: LoadedModel, spec: ConversionSpec, choice: str, own: str) -> Conversion:
    """The spec, with its calibration text if it needs one, ours or the visitor's; UserError if
    that is empty or shares a passage with what is measured."""
    if choice != OWN:
        return loaded.asked(spec)
    if not isinstance(own, str) or not own.strip():
        raise UserError("there is no calibration text: paste one, choose a file, or take ours.")
    check_disjoint(own, loaded.texts.read(default_text(loaded.key)))
    return Calibrated(spec, own, OWN)


@lru_cache(maxsize=4)
def shipped_points(model: str) -> tuple[Point, ...]:
    """The comparison on a model that comes with the project (assets/sweeps); () for most."""
    names = {
        spec: (name, kind)
        for active in BUDGETS
        for name, (kind, spec) in comparison(active).items()
    }
    runs = (record.run for record in shipped(model) if record.run.spec in names)
    return tuple(Point(*names[r.spec], r.mlp_macs_share, r.ratio, r.stderr) for r in runs)


def points(loaded: LoadedModel) -> list[Point]:
    """What is known of a model: the shipped comparison, and what was measured on this server."""
    return [*shipped_points(loaded.key), *list(loaded.points.values())[-SHOWN_POINTS:]]


def best_static(known: Sequence[Point], compute: float) -> float | None:
    """Perplexity ratio of the best static recipes at some compute, between the measured points
    (log-linear); None where nothing was measured on both sides."""
    best = {1.0: 0.0}
    for point in known:
        if point.kind == STATIC:
            at = round(point.compute, 3)
            best[at] = min(best.get(at, float("inf")), log(point.ratio))
    below = [c for c in best if c <= compute]
    above = [c for c in best if c > compute]
    if not below:
        return None
    low = max(below)
    if not above:
        return exp(best[low])
    high = min(above)
    share = (compute - low) / (high - low)
    return exp(best[low] * (1 - share) + best[high] * share)


def verdict(
    known: Sequence[Point], spec: ConversionSpec, ratio: float, share: float, stderr: float = 0.0
) -> str:
    """Whether routing pays here, in a sentence; a difference inside its error does not count.
    stderr: of the ratio."""
    if spec.router == "oracle":
        return "The oracle looks at every expert's output first: a bound for other routers."
    static = best_static(known, share)
    if static is None:
        return (
            "No static recipe was measured at so little compute: press “Add static recipes” to "
            "compare."
        )
    better = ratio < static
    if abs(ratio - static) < 1.96 * stderr:
        return (
            f"The best static recipe at this compute has × {static:.3f}: <strong>no measurable "
            "difference</strong>."
        )
    return (
        f"The best static recipe at this compute has × {static:.3f}: here "
        f"{'<strong>routing pays</strong>' if better else '<strong>static is better</strong>'}."
    )


def result(
    loaded: LoadedModel,
    spec: ConversionSpec,
    evaluation: Evaluation,
    report: ParameterReport,
    share: float,
) -> str:
    """The figures of one conversion as a table, and the verdict."""
    dense, changed = evaluation.dense, evaluation.change
    known = points(loaded)
    perplexity = difference(changed)
    macs = (loaded.report.macs_per_token, report.macs_per_token)
    active = (loaded.report.active_per_token, report.active_per_token)
    rows = [
        ("Perplexity", number(dense.value), number(evaluation.converted.value), perplexity),
        ("MLP multiply-adds per token", count(loaded.report.mlp_macs_per_token),
         count(report.mlp_macs_per_token), signed_percent(share - 1)),
        ("All multiply-adds per token", *map(count, macs), signed_percent(macs[1] / macs[0] - 1)),
        ("Parameters a token meets", *map(count, active),
         signed_percent(active[1] / active[0] - 1)),
        ("Parameters stored", count(loaded.report.total), count(report.total),
         signed_percent(report.total / loaded.report.total - 1)),
    ]  # fmt: skip
    body = "".join(
        f'<tr><th>{name}</th><td class="dense">{before}</td><td class="converted">{after}</td>'
        f"<td>{change}</td></tr>"
        for name, before, after, change in rows
    )
    return (
        f"<table><tr><th></th><td>dense</td><td>converted</td><td>difference</td></tr>{body}"
        f"</table><p>{verdict(known, spec, changed.ratio, share, changed.stderr)}</p>"
        f'<p class="note">{escape(ROUTED_METHODS[spec.method].label)}, {dense.tokens:,} tokens of '
        f"the {text_name(default_text(loaded.key))}. Routers are counted.</p>"
    )


def _status(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""
