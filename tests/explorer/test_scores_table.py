"""The table of tasks: the figures of the runs that have some, nothing but our own HTML."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pandas
import pytest

from mlpmoe import ConversionSpec
from mlpmoe.explorer.shell.records import Record, read_records
from mlpmoe.explorer.shell.run_words import model_name, short_recipe
from mlpmoe.explorer.tabs import scores_table as module
from mlpmoe.explorer.tabs.scores_table import scores_table
from mlpmoe.explorer.tabs.trade_offs import TradeOffHandlers
from mlpmoe.measure.quality.tasks import TaskScore
from tests.explorer.made import made_record
from tests.explorer.test_runs_table import HOSTILE, Cells

SCORES = (
    TaskScore("arc_easy", "acc", 0, 2376, True, 0.584, 0.571, 0.0101, 0.0102, 0.0042, True),
    TaskScore("wiki", "word_perplexity", None, 62, False, 40.25, 44.5, None, None, None, False),
    TaskScore("mmlu", "acc", 5, 14042, True, 0.3, 0.31, 0.004, 0.004, 0.0057, False),
)  # fmt: skip


def test_nothing_without_tasks():
    assert scores_table([]) == scores_table([made_record()]) == ""


def test_rows_have_the_figures():
    record = made_record(ConversionSpec(keep=12), tasks=SCORES)
    rows = Cells(scores_table([made_record(ConversionSpec(keep=3)), record])).rows[:-1]
    assert rows == [
        ["task", "metric", "questions", "dense", "converted", "difference"],
        [short_recipe(record.run.spec)],
        ["arc_easy", "acc", "2,376 × 0-shot", "58.4 ± 1.0 %", "57.1 ± 1.0 %", "−1.3 ± 0.4"],
        ["wiki", "word_perplexity", "62 × shots differ", "40.250", "44.500", "+4.250"],
        ["mmlu", "acc", "14,042 × 5-shot", "30.0 ± 0.4 %", "31.0 ± 0.4 %", "+1.0 ± 0.6 †"],
    ]


def test_models_are_named_where_there_are_several():
    one = made_record(tasks=SCORES[:1])
    other = made_record(model="owner/name", tasks=SCORES[:1])
    rows = Cells(scores_table([one, other])).rows
    titles = [f"{short_recipe(r.run.spec)} · {model_name(r.model)}" for r in (one, other)]
    assert [rows[1][0], rows[3][0]] == titles


def test_names_of_tasks_are_text():
    hostile = replace(SCORES[0], task=HOSTILE, metric=HOSTILE)
    usual, odd = (
        Cells(scores_table([made_record(tasks=(score,))])) for score in (SCORES[0], hostile)
    )
    assert [tag for tag, _ in odd.tags] == [tag for tag, _ in usual.tags]
    assert odd.rows[2][:2] == [HOSTILE, HOSTILE]


def test_many_runs_are_counted(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 7)
    records = [made_record(ConversionSpec(keep=k), tasks=SCORES) for k in (1, 2, 3, 4)]
    table = scores_table(records)
    assert len([r for r in Cells(table).rows if len(r) == 1]) == 2  # the first whole runs
    assert "2 older runs with tasks not shown" in table
    assert "not shown" not in scores_table(records[:2])


def test_tasks_come_back_from_the_browser(workbench):
    """And stand below the runs, in the files too."""
    record = made_record(tasks=SCORES)
    stored = json.dumps({"runs": [made_record(ConversionSpec(keep=3)).to_dict(), record.to_dict()]})
    assert read_records(stored)[0][1] == record
    tab = TradeOffHandlers(workbench)
    table = tab.show(stored, "demo", "stories", "nonzero", "perplexity", ["runs"])[2]
    assert table.endswith(scores_table([record]))
    content, _ = tab.json(stored)
    assert [Record.from_dict(run) for run in json.loads(content)["runs"]][1] == record
    content, _ = tab.csv(stored)
    row = pandas.read_csv(io.StringIO(content)).iloc[1]
    assert row["arc_easy acc dense"] == SCORES[0].dense
    assert row["wiki word_perplexity difference_stderr"] != row["arc_easy acc difference_stderr"]


@pytest.mark.parametrize("tasks", [5, [5], [SCORES[0].to_dict() | {"dense": "1"}]], ids=repr)
def test_broken_scores_are_no_run(tasks):
    values = made_record().to_dict()
    values["run"]["tasks"] = tasks
    assert read_records(json.dumps({"runs": [values]}))[0] == []
