"""Zero-shot and few-shot tasks of EleutherAI's lm-eval, a second judge beside perplexity.

What lm-eval says of two models (`judge`), laid side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import hypot, isclose, isfinite, sqrt
from numbers import Real
from pathlib import Path
from statistics import stdev
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.checks import shown
from ...core.errors import UserError
from .judge import LoadedTasks, Progress, judge, load_tasks

LONGEST_NAME = 300  # characters of a task or a metric


@dataclass(frozen=True)
class TaskScore:
    """What two models reach on a task, by one metric. None is what is undefined or unknown."""

    task: str  # or a group of tasks
    metric: str  # acc, acc_norm, ...; what filters answers, if anything does, after a comma
    shots: int | None  # solved examples before each question; None: tasks of a group differ
    samples: int  # questions
    share: bool  # a mean of values from 0 to 1, shown in percent
    dense: float | None
    converted: float | None
    dense_stderr: float | None
    converted_stderr: float | None
    difference_stderr: float | None
    # whether the error of the difference is that of the differences question by question; else it
    # is taken as if the models were independent, which makes it too large
    paired: bool

    @property
    def difference(self) -> float | None:
        if self.dense is None or self.converted is None:
            return None
        return self.converted - self.dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TaskScore:
        """The inverse of `to_dict`; UserError for what is not a score."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or any(name not in values for name in names):
            raise UserError(f"this is not a score of a task: {shown(values)}.")
        for name in names:
            if not _fits(name, values[name]):
                raise UserError(f"this is not a score of a task: {name} is {shown(values[name])}.")
        return cls(**{name: values[name] for name in names})


def _fits(name: str, value: Any) -> bool:
    """Whether a field of a TaskScore may hold this."""
    if name in ("task", "metric"):
        return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()
    if name in ("share", "paired"):
        return isinstance(value, bool)
    if name == "samples" or (name == "shots" and value is not None):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= 1e300 and (value >= 0 or not name.endswith("stderr"))


def task_scores(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | LoadedTasks,
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    on_progress: Progress = lambda message, share: None,
) -> tuple[TaskScore, ...]:
    """What both models reach on tasks of lm-eval, a score for each task and metric.

    tasks: names, see `load_tasks`, or what it gave. limit: questions of each task, the first ones;
    all by default. shots: solved examples before each question; by default what the task says,
    mostly none. Tasks that say 0 keep it. on_progress: told what is done, and a share of it.

    lm-eval seeds the random numbers of Python, numpy and torch. Log-probabilities are taken in
    float32 whatever the model's dtype, which lm-eval by itself does not do. Raises UserError as
    `load_tasks` does, for a limit below 1 or shots below 0, and where lm-eval refuses the work.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 question of each task, not {limit}.")
    if shots is not None and shots < 0:
        raise UserError(f"shots must be at least 0 solved examples, not {shots}.")
    if not isinstance(tasks, LoadedTasks):
        tasks = load_tasks(tasks, folder, on_progress)
    found = []
    for name, model in (("dense", dense), ("converted", converted)):
        found.append(judge(model, tokenizer, tasks, limit, shots, name, on_progress))
    return tuple(_scores(*found))


def _scores(dense: Mapping[str, Any], converted: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The figures of both, in lm_eval's order: tasks, then groups."""
    shares: dict[str, bool] = {}  # metric -> whether it is a share in all tasks that have it
    for task, figures in dense["results"].items():
        for key in figures:
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            both = [result["results"][task] for result in (dense, converted)]
            values = [_number(each[key]) for each in both]
            errors = [_number(each.get(f"{metric}_stderr,{kept}")) for each in both]
            of_each = [
                _of_each(result, task, metric, kept, value)
                for result, value in zip((dense, converted), values, strict=True)
            ]
            paired = None not in of_each and of_each[0].keys() == of_each[1].keys()
            if paired:
                share = all(0 <= v <= 1 for some in of_each for v in some.values())
                shares[key] = shares.get(key, True) and share
                error = _error(
                    [of_each[1][question] - value for question, value in of_each[0].items()]
                )
            else:
                share = task not in dense["samples"] and shares.get(key, False)
                error = None if None in errors else hypot(*errors)
            yield TaskScore(
                task=task,
                metric=metric if kept == "none" else key,
                shots=dense["n-shot"].get(task),
                samples=figures.get("sample_len", 0),
                share=share,
                dense=values[0],
                converted=values[1],
                dense_stderr=errors[0],
                converted_stderr=errors[1],
                difference_stderr=error,
                paired=paired,
            )


def _of_each(
    result: Mapping[str, Any], task: str, metric: str, kept: str, value: float | None
) -> dict[Any, float] | None:
    """Question -> its value by the metric, if their mean is the task's; None else."""
    samples = [each for each in result["samples"].get(task, ()) if each["filter"] == kept]
    found = {each["doc_id"]: each.get(metric) for each in samples}
    if not found or value is None or not all(isinstance(v, Real) for v in found.values()):
        return None
    found = {question: float(v) for question, v in found.items()}
    mean = sum(found.values()) / len(found)
    return found if isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else None


def _error(values: Sequence[float]) -> float | None:
    """The standard error of a mean."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def _number(value: Any) -> float | None:
    """A figure of lm_eval, which writes "N/A" for some."""
    return float(value) if isinstance(value, Real) and isfinite(value) else None
