"""Scores of tasks as values, as parts of runs, and in words."""

import json
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.errors import UserError
from mlpmoe.measure.notation import score_difference, scores
from mlpmoe.measure.quality.tasks import TaskScore
from mlpmoe.measure.runs.sweep import Run
from tests.measure.test_sweep import RUN, as_json

SCORE = TaskScore(
    "arc_easy", "acc", 0, 2376, True, 0.584, 0.571, 0.0101, 0.0102, 0.0042, True
)  # fmt: skip


def test_scores_survive_json():
    for score in (SCORE, replace(SCORE, shots=None, dense=None, difference_stderr=None)):
        assert TaskScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score


@given(st.sampled_from([f.name for f in fields(TaskScore)]), st.none() | st.booleans()
       | st.integers() | st.floats() | st.text() | st.lists(st.none()))  # fmt: skip
def test_other_values_make_no_score(name, value):
    """Whatever is read can be written again."""
    values = SCORE.to_dict() | {name: value}
    try:
        score = TaskScore.from_dict(values)
    except UserError as error:
        assert str(error).startswith(f"this is not a score of a task: {name} is ")
    else:
        assert json.loads(json.dumps(score.to_dict(), allow_nan=False)) == values


@pytest.mark.parametrize("values", [None, 5, [], {}, {"task": "arc_easy"}], ids=repr)
def test_what_is_no_score(values):
    with pytest.raises(UserError, match="this is not a score of a task"):
        TaskScore.from_dict(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ("58.4 ± 1.0 %", "57.1 ± 1.0 %", "−1.3 ± 0.4")),
        ({"converted": 0.6}, ("58.4 ± 1.0 %", "60.0 ± 1.0 %", "+1.6 ± 0.4")),
        ({"converted": 0.58399}, ("58.4 ± 1.0 %", "58.4 ± 1.0 %", "±0.0 ± 0.4")),
        (
            {"dense_stderr": None, "difference_stderr": None},
            ("58.4 %", "57.1 ± 1.0 %", "−1.3"),
        ),
        ({"dense": None}, ("undefined", "57.1 ± 1.0 %", "undefined")),
        (
            {"share": False, "dense": 143.2, "converted": 93.3, "dense_stderr": 60.25,
             "converted_stderr": 4.588, "difference_stderr": None},
            ("143 ± 60", "93.3 ± 4.6", "−49.900"),
        ),
        ({"share": False, "converted": 2e9}, ("0.584 ± 0.010", "2.00 × 10⁹", "+2.00 × 10⁹")),
    ],
)  # fmt: skip
def test_words(change, words):
    score = replace(SCORE, **change)
    shown = (*scores(score), score_difference(score))
    assert tuple(text.replace("\N{NBSP}", " ") for text in shown) == words


SCORES = (
    TaskScore("arc_easy", "acc", 0, 500, True, 0.584, 0.571, 0.022, 0.022, 0.004, True),
    TaskScore("arc_easy", "acc_norm", 0, 500, True, 0.5, 0.5, 0.022, 0.022, 0.0, True),
    TaskScore("endings", "perplexity", None, 500, False, 12.5, None, None, None, None, False),
)


def test_runs_with_tasks_survive_json():
    run = replace(RUN, tasks=SCORES)
    assert Run.from_dict(as_json(run)) == run
    assert Run.from_dict(asdict(run) | {"spec": run.spec.to_dict()}) == run
    assert hash(Run.from_dict(as_json(run))) == hash(run)


def test_runs_without_tasks_are_written_as_before():
    """So earlier versions read them, and theirs are read."""
    assert "tasks" not in RUN.to_dict()
    assert Run.from_dict(RUN.to_dict()).tasks == ()
    assert Run.from_dict(RUN.to_dict() | {"tasks": []}) == RUN


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (None, "not a run: tasks is None"),
        ("acc", "not a run: tasks is 'acc'"),
        ({}, "not a run: tasks is {}"),
        ([SCORES[0].to_dict()] * 2, "not a run: tasks holds one score twice"),
        ([SCORES[0].to_dict()] * 1001, "not a run: tasks is "),
        ([5], "not a score of a task: 5"),
        ([SCORES[0].to_dict() | {"dense": "much"}], "not a score of a task: dense is 'much'"),
    ],
)  # fmt: skip
def test_other_tasks_make_no_run(tasks, words):
    with pytest.raises(UserError, match=words):
        Run.from_dict(RUN.to_dict() | {"tasks": tasks})
