"""CSV of runs, read back by csv and by pandas, and cells that a spreadsheet would run."""

import csv
import io
import math
from dataclasses import replace

import pytest

from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.tasks import TaskScore
from mlpmoe.measure.runs.sweep import Run
from mlpmoe.measure.runs.tables import to_csv

RUNS = [
    Run(ConversionSpec(keep=8), 12.5, 1.25, 0.01, 1.1, 900, 0.9, 0.8, 850, 0.85, 0.7),
    Run(ConversionSpec(method="cmoe", progressive=True), math.inf, math.inf, math.inf, math.inf,
        2**60, 1 / 3, 0.8, 850, 0.85, 0.7),
]  # fmt: skip


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_a_table_of_runs():
    text = to_csv([{"name": "", "tokens": 62, **run.to_dict()} for run in RUNS])
    assert text.count("\n") == 3
    first, second = read(text)
    names = ["name", "tokens", *ConversionSpec().to_dict(), *list(RUNS[0].to_dict())[1:]]
    assert list(first) == list(second) == names
    for row, run in zip((first, second), RUNS, strict=True):
        values = run.to_dict()
        values |= values.pop("spec")
        for name, value in values.items():
            assert row[name] == ("" if value is None else str(value))
    assert float(second["nonzero_share"]) == 1 / 3  # to the last bit


def test_scores_of_tasks_have_columns_of_their_own():
    score = TaskScore("arc_easy", "acc_norm", 0, 500, True, 0.58, None, 0.02, None, None, True)
    one, other = read(to_csv([run.to_row() for run in (replace(RUNS[0], tasks=(score,)), RUNS[1])]))
    assert (one["arc_easy acc_norm dense"], other["arc_easy acc_norm dense"]) == ("0.58", "")
    figures = {name: value for name, value in one.items() if name.startswith("arc_easy")}
    assert list(figures) == [
        f"arc_easy acc_norm {name}"
        for name in list(score.to_dict())
        if name not in ("task", "metric")
    ]
    assert figures["arc_easy acc_norm converted"] == ""
    assert "tasks" not in one
    assert RUNS[0].to_row() == RUNS[0].to_dict()


def test_pandas_reads_numbers_as_numbers():
    pandas = pytest.importorskip("pandas")
    text = to_csv([{"change": -0.5, "count": -3, "name": "-5 % and more", "ratio": None}] * 2)
    table = pandas.read_csv(io.StringIO(text))
    assert table["change"].tolist() == [-0.5, -0.5]
    assert table["count"].tolist() == [-3, -3]
    assert table["name"].tolist() == ["'-5 % and more"] * 2
    assert table["ratio"].isna().all()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_what_a_spreadsheet_would_run(start):
    hostile = f'{start}HYPERLINK("http://example.org";"x")'
    (row,) = read(to_csv([{hostile: hostile}]))
    assert row == {f"'{hostile}": f"'{hostile}"}


def test_any_text_stays_in_its_cell():
    texts = ['say "no"', "a,b", "two\nlines", "semi;colon", "1=1", "é – ü", "", "'quoted'"]
    rows = read(to_csv([{"a": text, "b": 1} for text in texts]))
    assert [row["a"] for row in rows] == texts
    assert {row["b"] for row in rows} == {"1"}


def test_rows_of_different_kinds():
    text = to_csv([{"a": 1, "spec": {"b": 2}}, {"c": True, "a": 4}])
    assert text == "a,b,c\n1,2,\n4,,True\n"
    assert to_csv([]) == "\n"


def test_columns_have_different_names():
    with pytest.raises(ValueError, match="two columns are called a"):
        to_csv([{"a": 1, "spec": {"a": 2}}])
