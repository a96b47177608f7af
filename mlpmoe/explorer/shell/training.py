"""Training on the page: how long it takes, and its curve, as it grows and once it is done."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ...core.calibration import MAX_TOKENS, SAMPLE_TOKENS
from ...core.recovery.course import PLANNED, forward_tokens
from ...core.recovery.kinds import NOTHING
from ...core.recovery.report import RecoveryReport
from ...measure.runs.pace import about
from ...models import host_training_seconds
from ..plots.training_plot import training_plot
from ..server.asked import Conversion, spec_of
from ..server.loaded import LoadedModel
from ..server.workbench import Workbench
from .settings import CONTROLS, read_asked

TRAINING = 3  # outputs: what is said in the section, and beside the curve; the curve
HEAD = "<h3>A little training</h3>"
ABOUT = (
    '<p class="note">The converted model learns to predict what the dense model predicts. KL '
    "divergence is how far its predictions are from those: 0 where both say the same. It counts "
    "on text that is held out, which is never trained on.</p>"
)
BEGUN = "The curve stands under the cards."


@dataclass(frozen=True)
class Linked:
    """What training came to where a link was made."""

    asked: Conversion
    result: str  # see RecoveryReport


class TrainingHandlers:
    """The events of the section over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def show(self, model: str, *values: Any) -> tuple[str, str, dict]:
        """How long it takes, or what was done, with its curve, and how that compares with the
        result that a link names."""
        *values, linked = values
        loaded = self.workbench.loaded(model)
        if dict(zip(CONTROLS, values, strict=False))["recover"] == NOTHING:
            return "", "", gr.update(visible=False)
        return training(loaded, read_asked(loaded, values), linked)


class TrainingNews:
    """What the section says of one conversion, as far as it is not on the page yet."""

    def __init__(self, loaded: LoadedModel, asked: Conversion) -> None:
        self.loaded, self.asked = loaded, asked
        self._said: tuple = ()

    def tell(self) -> tuple[Any, ...]:
        report = self.loaded.recovery_so_far(self.asked)
        now = report and report.looks, self.loaded.in_training == self.asked
        if not spec_of(self.asked).recovers or report is None or now == self._said:
            return (gr.skip(),) * TRAINING
        self._said = now
        return training(self.loaded, self.asked)


def training(
    loaded: LoadedModel, asked: Conversion, linked: Linked | None = None
) -> tuple[str, str, dict]:
    """What is known of the training of a conversion."""
    spec = spec_of(asked)
    if not spec.recovers:
        words = "Nothing is lost yet, so there is nothing to train."
        return said(words), "", gr.update(visible=False)
    report = loaded.recovery_so_far(asked)
    if report is None:
        words = time_needed(loaded, spec.recover_steps)
        return said(words), HEAD + said(words) + ABOUT, gr.update(visible=False)
    at = f"step {report.steps:,} of {report.planned:,}"
    result = ""
    if loaded.recovery(asked):
        words = outcome(report)
        result = _result(report, linked if linked and linked.asked == asked else None)
    elif loaded.in_training == asked:
        words = f"Training, last looked at after {at}. Stop keeps what is done."
    else:
        words = f"Stopped, last looked at after {at}. All steps are kept: Measure goes on there."
    curve = gr.update(value=training_plot(report), visible=True)
    return said(BEGUN), HEAD + said(words) + result + ABOUT, curve


def said(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def _result(report: RecoveryReport, linked: Linked | None) -> str:
    """The fingerprint of the result, which page.js writes into the link; settings that a clock
    decided on are not those of the link."""
    words = f"Fingerprint of the result: {report.result}"
    if linked and linked.result == report.result:
        words += ", the same as in the link to the last bit"
    elif linked:
        words += (
            f"; in the link it is {linked.result}. Another kind of processor, or another version "
            "of what computes here, rounds otherwise"
        )
    named = "" if report.limited or report.cut_short else f' data-result="{report.result}"'
    return f'<p class="note"{named}>{escape(words)}.</p>'


def time_needed(loaded: LoadedModel, steps: int) -> str:
    """How long so many steps take here, roughly, and how many of them this host has time for."""
    tokens = forward_tokens(steps, MAX_TOKENS // SAMPLE_TOKENS, SAMPLE_TOKENS)
    seconds, limit = tokens / loaded.tokens_per_second, host_training_seconds()
    words = f"Measure begins the training: {steps:,} steps take {about(seconds)} here."
    if limit and seconds > PLANNED * limit:
        fitting = max(1, int(steps * PLANNED * limit / seconds))
        words += f" This server trains for {_minutes(limit)} at most: about {fitting:,} are done."
    return f"{words} Others who train wait for it."


def _minutes(seconds: float) -> str:
    return about(seconds).removeprefix("about ")


def outcome(report: RecoveryReport) -> str:
    """What training brought, and why it ended where it did not come to its end."""
    steps = f"{report.steps:,} steps"
    if report.limited and not report.stopped:
        steps = f"{report.steps:,} of {report.asked:,} steps, what this server has time for,"
    kept = "" if report.best == report.steps else f" The weights of step {report.best} are kept."
    ended = f" Stopped: {report.stopped}" if report.stopped else ""
    if report.cut_short:
        ended += " No settings give such a result again, so it is not among the runs."
    return (
        f"KL divergence from the dense model on held-out text: {report.before:.3g} before, "
        f"{report.after:.3g} after {steps} of {report.parameters:,} parameters, in "
        f"{_minutes(report.seconds)}.{kept}{ended}"
    )
