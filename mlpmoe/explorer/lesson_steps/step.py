"""Step: one idea of the lesson, with one control, one figure and one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from .reading import Reading

BRANCHES = 16  # B of the steps that do not choose it


@dataclass(frozen=True)
class View:
    """What a step shows for one value of its control."""

    figure: go.Figure | str  # str: a table, as HTML
    numbers: str  # HTML: the measured figures in a sentence or a few rows


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, str, str]


@dataclass(frozen=True)
class Step:
    key: str  # in ids of components
    title: str
    words: Callable[[Reading], str]  # Markdown: formula, then at most 90 words
    control: dict[str, Any]  # of the slider
    view: Callable[[Reading, float], View]
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
