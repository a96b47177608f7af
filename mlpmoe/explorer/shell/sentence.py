"""The plain sentence above the pictures: what was removed, what that costs, and what would do
better."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, hypot, isfinite, log10

from ...core.recovery.report import RecoveryReport
from ...core.routed import ROUTED_METHODS
from ...core.spec import PROJECTIONS, ConversionSpec
from ...core.static.scores import SCORES
from ...measure.notation import NBSP, NO_CHANGE, number
from ...measure.quality.estimate import Evaluation
from ...measure.runs.families import (
    LEVEL,
    Estimate,
    Shares,
    best_at,
    cost_of,
    family_of,
    removed_by,
)
from ...measure.runs.sweep import Run
from ...measure.words import capital, joined, spared_in_words

TOO_MUCH = 1e5  # a ratio of perplexity beyond which a model says nothing any more
SURE = 2.0  # standard errors
LONGEST = 270  # characters: two lines


def sentence(
    spec: ConversionSpec,
    shares: Shares | None,
    known: Evaluation | Estimate | None,
    runs: Sequence[Run] = (),
    *,
    toy: bool = False,
    calibration: str = "",
    recovery: RecoveryReport | None = None,
) -> str:
    """HTML, about two lines of 120 characters.

    shares: what the conversion leaves of the dense MLPs, counted or expected; None: not known yet.
    known: what was measured so far, or an estimate, or nothing yet. runs: of the same model and
    text. toy: whether the model hides most of the damage. calibration: what the page calls the
    text that the conversion looks at. recovery: what training did, where it was done.
    """
    if removed_by(spec) == 0:
        if spec.routed:
            return _html("Nothing is left out: every token meets all neurons.")
        return _html("Nothing is removed: the branches add up to the dense model.")
    cost = cost_axis(spec)
    # an estimate comes from runs that may have been calibrated on another text
    named = spec.needs_calibration and not isinstance(known, Estimate)
    text = calibration if named and not (spec.recovers and known is None) else ""
    trained = _trained(spec, recovery, text)
    words = f"{_what(spec, shares)}{_spared(spec)}{trained}: {_damage(spec, known)}"
    if text and not trained:
        words += f", calibrated on {text}"
    found = [f"{words}."]
    if shares is not None:
        found += _others(spec, known, runs, cost, shares.of(cost))
    if toy:
        found.append("A toy model hides most of the damage.")
    said = " ".join(found)
    if trained and len(said) > LONGEST:
        said = said.replace(f" on {text}", "", 1)  # which the controls say, too
    return _html(said)


def cost_axis(spec: ConversionSpec) -> str:
    """The cost that a spec saves, "compute" or "nonzero": single zeros save no multiply-adds, and
    who routes keeps all weights."""
    zeros = not spec.routed and spec.fades and spec.fade_unit != "neuron"
    return "nonzero" if zeros else "compute"


def _html(text: str) -> str:
    return f"<p>{escape(text).replace('× ', f'×{NBSP}')}</p>"


def _what(spec: ConversionSpec, shares: Shares | None) -> str:
    """What the conversion does, as the beginning of a sentence."""
    if spec.routed:
        if family_of(spec) == "inputs":
            return f"Each token reads {_percent(spec.active)} of the MLP weights"
        if family_of(spec) == "directions":
            return f"Narrow factors leave {_percent(spec.active)} of the MLPs' multiply-adds"
        who = {"oracle": "An oracle (a bound)", "neurons": "The gate"}
        who = who.get(family_of(spec), "A router")
        return f"{who} picks {_percent(spec.active)} of the neurons for each token"
    dropped, neurons = spec.branches - spec.kept, spec.fade_unit == "neuron"
    gone = f"{_percent(1 - shares.nonzero)} of the MLP weights" if shares else ""
    comma = f", {gone}" if gone else ""
    if dropped and spec.fades:
        verb = "fade drops neurons" if neurons else "fade zeroes weights"
        return f"K drops {dropped} of {spec.branches} branches and {verb} of the others{comma}"
    if dropped:
        return f"K drops {dropped} of {spec.branches} branches{comma}"
    if spec.pattern:
        return f"{spec.fade_unit} zeros take {gone or 'MLP weights'}"
    return f"Fade drops neurons{comma}" if neurons else f"Fade zeroes {gone or 'MLP weights'}"


def _spared(spec: ConversionSpec) -> str:
    layers = spec.spared_layers
    if len(layers) > 3:
        return f" ({len(layers)} layers kept dense)"
    return f" ({spared_in_words(spec)})" if layers else ""


def _trained(spec: ConversionSpec, recovery: RecoveryReport | None, text: str) -> str:
    """text: that was trained on, "" where it is not said."""
    if not spec.recovers:
        return ""
    steps = recovery.steps if recovery else spec.recover_steps
    words = f"trained for {steps:,} step{'s' if steps > 1 else ''}{f' on {text}' if text else ''}"
    return f", {words} in vain" if recovery and recovery.best == 0 else f", then {words}"


def _damage(spec: ConversionSpec, known: Evaluation | Estimate | None) -> str:
    """What it costs in perplexity, and how sure that is."""
    if known is None:
        return "not measured yet" if spec.recovers else "what that costs is not measured yet"
    measured = _measured(spec, known)
    if measured is None:
        return (
            f"perplexity about × {_short(known.ratio)} ({_short(known.low)} to "
            f"{_short(known.high)}), estimated from neighbouring runs"
        )
    ratio, stderr, measurable = measured
    if not measurable:
        return f"{NO_CHANGE} of perplexity{' so far' if _early(known) else ''}"
    if not isfinite(ratio) or ratio >= TOO_MUCH:
        return f"it breaks the model, perplexity × {number(ratio)}"
    value, error = _figures(ratio, stderr)
    before = "" if isinstance(known, Evaluation) else ", as measured before"
    if ratio >= 2:
        sure = f" (±{NBSP}{error})" if error else ""
        return f"this model is {value} times as perplexed{sure}{before}"
    return f"perplexity × {value}{f' ±{NBSP}{error}' if error else ''}{before}"


def _measured(
    spec: ConversionSpec, known: Evaluation | Estimate | None
) -> tuple[float, float, bool] | None:
    """Ratio, its error, and whether there is a change to speak of; None for a true estimate. One
    that comes from a single run of this very spec is that run."""
    if isinstance(known, Evaluation):
        return known.change.ratio, known.change.stderr, known.change.measurable
    if known is not None and [run.spec for run in known.of] == [spec]:
        return known.of[0].ratio, known.of[0].stderr, _measurable(known.of[0])
    return None


def _early(known: Evaluation | Estimate | None) -> bool:
    """Whether a measurement is on its way and may still say something else."""
    return isinstance(known, Evaluation) and not known.settled


def _measurable(run: Run) -> bool:
    return not abs(run.ratio - 1) < SURE * run.stderr


def _others(
    spec: ConversionSpec, known: Evaluation | Estimate | None, runs: Sequence[Run], cost: str,
    share: float,
) -> list[str]:  # fmt: skip
    """What the best other recipes at the same budget cost: of all; beside a router, of the static
    ones; and without a calibration text, where the spec looks at none and the best does."""
    others = [run for run in runs if run.spec != spec]
    best = best_at(others, cost, share)
    if best is None or share > 1 - LEVEL:
        return []
    compute, less = cost == "compute", cost_of(best, cost) < share - LEVEL
    budget = "at this compute" if compute else "with as many zeros"
    static = best_at(others, cost, share, "static") if spec.routed else None
    beside = f"best static: {_ratio(static)}" if static else ""
    if not _beaten(spec, known, best):
        sure = _measured(spec, known) and not _early(known)
        found = [f"No run {budget} is better."] if sure else []
        return [*found, f"{capital(beside)}."] if beside else found
    if less:  # none is known that removes just as much
        budget = "at less compute" if compute else "with more zeros"
    text = f"Best {budget}: {_name(best)}, {_ratio(best)}"
    if best.spec.needs_calibration:
        text += " (calibrated)"
    if static is not None and static is not best:
        return [f"{text}; {beside}."]
    if best.spec.needs_calibration and not spec.needs_calibration:
        plain = best_at(others, cost, share, "uncalibrated")
        if plain is not None and known is not None and _beaten(spec, known, plain):
            text += f"; uncalibrated: {_ratio(plain)}"
    return [f"{text}."]


def _beaten(spec: ConversionSpec, known: Evaluation | Estimate | None, run: Run) -> bool:
    """Whether a run is better, as far as the errors tell; what cannot be deployed always is."""
    if known is None or spec.router == "oracle":
        return True
    measured = _measured(spec, known)
    if measured is None:
        return run.ratio < known.ratio
    errors = [error for error in (measured[1], run.stderr) if isfinite(error)]
    return run.ratio < measured[0] - SURE * hypot(*errors, 0.0)


def _figures(ratio: float, stderr: float) -> tuple[str, str]:
    """A ratio and its error, to the first digit of that; "" for an error that is not known."""
    if not (isfinite(stderr) and stderr > 0):
        return _short(ratio), ""
    digits = min(4, max(0, -floor(log10(stderr))))
    return f"{ratio:,.{digits}f}", f"{stderr:,.{digits}f}"


def _short(ratio: float) -> str:
    """A ratio that is not known well."""
    return f"{ratio:.2f}" if ratio < 2 else number(ratio, 2)


def _ratio(run: Run) -> str:
    if not _measurable(run):
        return NO_CHANGE
    return f"× {number(run.ratio) if run.ratio >= TOO_MUCH else _figures(run.ratio, run.stderr)[0]}"


def _name(run: Run) -> str:
    """A recipe in few words; how much it removes is known from the budget."""
    spec = run.spec
    trained = ["trained"] if spec.recovers else []
    if spec.routed:
        return ", ".join([ROUTED_METHODS[spec.method].label, *trained])
    parts = []
    if spec.kept < spec.branches:
        order = "" if spec.order == "contiguous" else f" by {spec.order.replace('-', ' ')}"
        parts.append(f"{spec.kept} of {spec.branches} branches{order}")
    if spec.fades:
        schedule = {"linear": "", "uniform": "evenly "}.get(spec.fade_schedule, "unevenly ")
        where = (
            "everywhere" if spec.projections == PROJECTIONS else f"in {joined(spec.projections)}"
        )
        parts.append(f"fade {schedule}{where}")
        if spec.fade_score != "magnitude":
            parts.append(SCORES[spec.fade_score].short)
    if spec.compensation == "refit":
        parts.append("refitted")
    return ", ".join([*parts, *trained])


def _percent(share: float) -> str:
    return f"{100 * share:.3g}{NBSP}%"
