"""Training on the page: how long it takes, and its curve once it is done."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from ...core.calibration import MAX_TOKENS
from ...core.recovery.kinds import NOTHING
from ...core.recovery.recover import LOOKS
from ...core.recovery.report import RecoveryReport
from ...core.recovery.samples import BATCH_TOKENS, HELD_OUT_SHARE
from ...measure.runs.pace import about
from ..plots.training_plot import training_plot
from ..server.asked import spec_of
from ..server.loaded import LoadedModel
from ..server.workbench import Workbench
from .settings import CONTROLS, read_asked

PASSES = 4  # forward passes that a step takes as long as: of both models, and backwards


class TrainingHandlers:
    """The events of the section over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def show(self, model: str, *values: Any) -> tuple[str, dict]:
        """A sentence, and the curve of what was trained; no curve before."""
        loaded, hidden = self.workbench.loaded(model), gr.update(visible=False)
        asked = read_asked(loaded, values)
        spec = spec_of(asked)
        if dict(zip(CONTROLS, values, strict=False))["recover"] == NOTHING:
            return "", hidden
        if not spec.recovers:
            return "<p>Nothing is lost yet, so there is nothing to train.</p>", hidden
        report = loaded.recovery(asked)
        if report is None:
            return f"<p>{time_needed(loaded, spec.recover_steps)}</p>", hidden
        return f"<p>{escape(outcome(report))}</p>", gr.update(
            value=training_plot(report), visible=True
        )


def time_needed(loaded: LoadedModel, steps: int) -> str:
    """How long so many steps take here, roughly."""
    tokens = PASSES * steps * BATCH_TOKENS
    tokens += 2 * (min(LOOKS, steps) + 1) * (MAX_TOKENS // HELD_OUT_SHARE)  # with both models
    seconds = tokens / loaded.tokens_per_second
    return (
        f"Measure begins the training: {steps:,} steps take {about(seconds)} here. Others who "
        "train wait for it."
    )


def outcome(report: RecoveryReport) -> str:
    """What training brought, and why it ended where it did not come to its end."""
    kept = "" if report.best == report.steps else f" The weights of step {report.best} are kept."
    ended = f" Stopped: {report.stopped}" if report.stopped else ""
    return (
        f"KL divergence from the dense model on text that was not trained on: {report.before:.3g} "
        f"before, {report.after:.3g} after {report.steps:,} steps of {report.parameters:,} "
        f"parameters, in {about(report.seconds).removeprefix('about ')}.{kept}{ended}"
    )
