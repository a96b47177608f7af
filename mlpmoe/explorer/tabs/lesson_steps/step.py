"""Step: one idea of the lesson, with one control, one figure and one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from ....core.spec import ConversionSpec
from .reading import Reading

BRANCHES = 16  # B of the steps that do not choose it


@dataclass(frozen=True)
class View:
    """What a step shows for one value of its control."""

    figure: go.Figure | str  # str: a drawing, as HTML
    numbers: str  # HTML: the measured figures in a sentence or a few rows


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, str, str]


@dataclass(frozen=True)
class Step:
    key: str  # in ids of components
    title: str
    words: Callable[[Reading], str]  # Markdown: formula, then at most 60 words
    control: dict[str, Any]  # of the slider
    # For a value of the control. bool: whether the question was answered; before, nothing that is
    # shown or sent may contain the answer.
    view: Callable[[Reading, float, bool], View]
    spec: Callable[[Reading, float], ConversionSpec]  # what the same is on the whole model
    question: Question
    judge: Callable[[Reading], tuple[int, str]]  # which answer is right, and why: HTML
    plots: bool = True  # whether the figure is a plot


def feedback(step: Step, reading: Reading, answer: int | None) -> str:
    """What is said to an answer, as HTML; nothing before there is one."""
    if answer is None:
        return ""
    right, why = step.judge(reading)
    if answer == right:
        return f'<p role="status" class="right"><strong>✓ Right.</strong> {why}</p>'
    wanted = escape(step.question.answers[right])
    return (
        f'<p role="status" class="wrong"><strong>✗ Not here.</strong> Right is: “{wanted}”. '
        f"{why}</p>"
    )
