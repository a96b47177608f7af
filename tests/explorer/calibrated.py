"""Conversions that look at a calibration text, and what the page shows of one in the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gradio as gr
from transformers import PreTrainedModel

from mlpmoe import ConversionSpec, convert
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.models import default_calibration, named_calibration

CALIBRATED = {
    "refitted": {"keep": 12, "order": "least-squares", "compensation": "refit"},
    "faded": {"fade": 0.6, "fade_schedule": "uniform", "fade_score": "sparsegpt"},
    "by neurons": {"fade": 0.9, "fade_unit": "neuron", "fade_score": "wanda"},
    "shared out": {"keep": 9, "allocation": "sensitivity"},
    "layer by layer": {"keep": 6, "compensation": "mean", "progressive": True},
}


def direct(loaded: LoadedModel, spec: ConversionSpec) -> PreTrainedModel:
    """The conversion as the library makes it, with the calibration text of the model's kind."""
    calibration = None
    if spec.needs_calibration:
        text = named_calibration(default_calibration(loaded.key))
        calibration = Calibration.from_text(loaded.tokenizer, text)
    return convert(loaded.model, spec, calibration)


def at_the_end(steps: Iterable[tuple]) -> list[Any]:
    """The last of each output that was not skipped."""
    shown: list[Any] = []
    for step in steps:
        shown = shown or [gr.skip()] * len(step)
        shown = [old if new == gr.skip() else new for old, new in zip(shown, step, strict=True)]
    return shown
