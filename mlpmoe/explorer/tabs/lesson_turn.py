"""The lesson's last step: a challenge for the front, from the runs that come with the project, and
whether a setting meets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, isfinite

from ...core.presets import PRESETS
from ...core.spec import ConversionSpec
from ...measure.notation import NBSP, number
from ...measure.quality.estimate import Evaluation
from ...measure.runs.families import best_at, family_of
from ...measure.runs.sweep import Run
from ...measure.words import in_words

HALF = 0.5  # of the dense MLPs' compute
ROUTER = 0.02  # more, that a router may cost
ROOM = 1.5  # times what the best run at that compute adds to the perplexity: others do it too
THREE_QUARTERS = 0.75
SURE = 2.0  # standard errors
PUBLISHED = PRESETS["Keep 12 of 16 (paper)"]


@dataclass(frozen=True)
class Challenge:
    """A setting is looked for that costs no more of both."""

    share: float  # of the dense MLPs' compute
    ratio: float  # of perplexity to dense


ANY_MODEL = Challenge(THREE_QUARTERS + ROUTER, 1.5)  # without runs to go by


def challenge(runs: Sequence[Run]) -> Challenge:
    """At half of the compute, where one of the runs got, with some room."""
    best = best_at(runs, "compute", HALF)
    return Challenge(HALF + ROUTER, _rounded_up(1 + ROOM * (best.ratio - 1))) if best else ANY_MODEL


def _rounded_up(ratio: float) -> float:
    steps = 100 if ratio < 2 else 10
    return ceil(steps * ratio - 1e-9) / steps


def good_start(runs: Sequence[Run]) -> ConversionSpec:
    """The best run at three quarters of the compute; a preset, where there are no runs."""
    best = best_at(runs, "compute", THREE_QUARTERS)
    return best.spec if best else PRESETS["Keep 12 of 16, least squares *"]


def words(asked: Challenge) -> str:
    """Markdown."""
    return (
        f"Find a setting that runs at most **{100 * asked.share:.0f} %** of the MLP compute and "
        f"keeps perplexity below **× {asked.ratio:g}**. All real controls are yours: method, "
        "branches, K and budget, and the stages under “More”. Two places to start from:"
    )


def verdict(
    asked: Challenge, spec: ConversionSpec, share: float, measured: Evaluation | None
) -> str:
    """Whether a setting meets the challenge, from what was measured so far; HTML.

    share: of the dense MLPs' compute that it runs.
    """
    cost = f"{escape(in_words(spec))}: {100 * share:.1f}{NBSP}% of the MLP compute"
    if family_of(spec) == "oracle":
        return _said("wrong", "An oracle cannot be used: it runs all experts to find the best.")
    if share > asked.share:
        return _said("wrong", f"✗ Too dear. {cost}; at most {100 * asked.share:.0f}{NBSP}% counts.")
    if measured is None:
        return _said("", f"Not measured yet. {cost}. Wait a moment, or press Measure.")
    ratio, error = measured.change.ratio, measured.change.stderr
    sure = isfinite(error) and abs(ratio - asked.ratio) >= SURE * error
    found = f"{cost}, perplexity × {number(ratio)}"
    found += f" ±{NBSP}{number(error, 1)}" if isfinite(error) else ""
    if not sure and not measured.complete:
        return _said("", f"Too close to tell so far. {found}. Measure goes on to the text's end.")
    if ratio >= asked.ratio:
        return _said("wrong", f"✗ Not yet. {found}; below × {asked.ratio:g} counts.")
    return _said("right", f"✓ You have it. {found}. The address of this page is your proof.")


def _said(kind: str, text: str) -> str:
    head, _, rest = text.partition(". ")
    return f'<p role="status" class="{kind}"><strong>{head}.</strong> {rest}</p>'
