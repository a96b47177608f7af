"""Studies: what happens to branches and experts that are trained, each a question with a table.

A study is a function of a model, its tokenizer, a number of steps, a seed, and whom to tell how far
it is; it gives the rows of its table, plain values by name. It stands in STUDIES with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.conversion import Progress
from ..core.errors import UserError
from . import apart, downcycling, moore
from .curves import Axes

MAX_STEPS = 100_000
MAX_SEED = 2**32 - 1

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A question, and what answers it."""

    about: str  # a sentence
    run: Callable[[PreTrainedModel, PreTrainedTokenizerBase, int, int, Progress], Rows]
    steps: int  # usual, of each training
    axes: Axes | None = None  # of the curves whose points its rows are


STUDIES: dict[str, Study] = {
    "apart": Study(
        "Copies of branches trained apart, one for each kind of text, as experts of one model.",
        apart.study, steps=100,
    ),
    "downcycling": Study(
        "Training on from ExpertWeaver's experts, from random ones, and from the dense model.",
        downcycling.study, steps=150,
        axes=Axes("start", "tokens", "loss", "tokens trained on", "held-out loss, nats per token"),
    ),
    "moore": Study(
        "Several tasks in one model: rank-one experts weighed by task (MoORE) beside LoRA.",
        moore.study, steps=100,
    ),
}  # fmt: skip


def find_study(name: str) -> Study:
    """The study of that name; UserError for others."""
    if name not in STUDIES:
        raise UserError(f"no study is called {name!r:.60}; allowed: {', '.join(STUDIES)}.")
    return STUDIES[name]


def run_study(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Rows:
    """The table of a study. `model` is dense, and unchanged. steps: of each training; None: as
    usual. Deterministic by `seed` on a CPU. Raises UserError for a name, steps or a seed that are
    not allowed, and where the study cannot use the model or the text."""
    study = find_study(name)
    steps = study.steps if steps is None else steps
    check_course(steps, seed)
    return study.run(model, tokenizer, steps, seed, on_progress or (lambda message, share: None))


def check_course(steps: int | None, seed: int) -> None:
    """Raise UserError for steps or a seed out of range; steps may be left open."""
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps must lie between 1 and {MAX_STEPS:,}, not {steps:,}.")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed must lie between 0 and {MAX_SEED:,}, not {seed:,}.")
