"""`evaluate --tasks` and `evaluate --out` on a tiny saved model: table, JSON, file, refusals."""

import csv
import io
import json
import sys

import pytest

from mlpmoe.__main__ import main
from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.notation import score_difference, scores
from mlpmoe.measure.quality.tasks import TaskScore, task_scores
from mlpmoe.measure.runs.sweep import Run
from tests.commands.common import refused, row, strictly
from tests.tiny import byte_tokenizer, tiny_model
from tests.tiny_tasks import write_tasks

SPEC = ConversionSpec(keep=4)
FLAGS = ["--keep", "4"]


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def judge(lm_eval, evaluate, tasks_folder):
    """Run `evaluate` with these flags and the tasks of the folder."""
    return lambda *flags: evaluate(*flags, "--tasks-folder", str(tasks_folder))


@pytest.fixture
def expected(lm_eval, tasks_folder):
    """The scores of tasks by the library."""

    def found(names, **options):
        dense = tiny_model()
        converted = convert(dense, SPEC)
        return task_scores(dense, converted, byte_tokenizer(), names, tasks_folder, **options)

    return found


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs.jsonl"


def test_json_has_the_scores(judge, expected):
    status, out, err = judge(*FLAGS, "--tasks", "animals,endings", "--limit", "4", "--json")
    assert (status, err) == (0, "")
    found = tuple(map(TaskScore.from_dict, strictly(out)["tasks"]))
    assert found == expected(["animals", "endings"], limit=4)
    status, out, _ = judge(*FLAGS, "--tasks", "animals", "--shots", "1", "--json")
    found = tuple(map(TaskScore.from_dict, strictly(out)["tasks"]))
    assert found == expected(["animals"], shots=1)


def test_table_has_a_row_per_task_and_metric(judge, expected):
    status, out, err = judge(*FLAGS, "--tasks", "animals, endings")
    assert (status, err) == (0, "")
    assert row(out, "perplexity")[0] == "perplexity"  # is still there
    table = [line.replace(" ", "") for line in out.splitlines()]
    for score in expected(["animals", "endings"]):
        shown = [
            score.task, score.metric, "14 × 0-shot", *scores(score), score_difference(score),
            *([] if score.paired else ["not paired"]),
        ]  # fmt: skip
        assert "".join(shown).replace(" ", "").replace("\N{NBSP}", "") in table
    assert "in points of percent" in out


def test_without_tasks_there_is_no_word_of_them(evaluate):
    _, out, _ = evaluate(*FLAGS)
    assert "points" not in out and "acc" not in out
    _, out, _ = evaluate(*FLAGS, "--json")
    assert strictly(out)["tasks"] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "animals,fishes"], "lm-eval knows no task 'fishes'"),
        (["--tasks", ""], "name at least one task"),
        (["--tasks", "fetched"], "the data of the task fetched cannot be had"),
    ],
)
def test_tasks_are_looked_at_before_anything_is_loaded(lm_eval, tasks_folder, capsys, flags, words):
    status = main(["evaluate", "no-such-model", *flags, "--tasks-folder", str(tasks_folder)])
    assert refused((status, *capsys.readouterr()), words)


def test_a_missing_lm_eval_is_said_at_once(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    status = main(["evaluate", "no-such-model", "--tasks", "arc_easy"])
    assert refused((status, *capsys.readouterr()), 'pip install "lm-eval')


@pytest.mark.parametrize("flag", ["--tasks-folder", "--limit", "--shots"])
def test_flags_of_tasks_need_tasks(evaluate, flag):
    assert refused(evaluate(flag, "3"), f"{flag} is for --tasks: name some")


def test_out_is_what_a_sweep_goes_on_from(evaluate, sweep, runs):
    status, _, err = evaluate(*FLAGS, "--out", str(runs))
    assert (status, err) == (0, "")
    _, out, _ = sweep("--keep", "4,8", "--out", str(runs))
    assert "1 measured now, 1 before" in out
    first, second = map(json.loads, runs.read_text(encoding="utf-8").splitlines())
    setting = first.keys() - second["spec"].keys()
    assert setting == second.keys() - second["spec"].keys()  # the same entries
    for name in ("model", "dtype", "text", "calibration", "protocol", "window", "tokens"):
        assert first[name] == second[name]
    _, swept, _ = sweep("--keep", "4", "--json")
    (again,) = strictly(swept)["runs"]
    assert Run.from_dict(first) == Run.from_dict(again)


def test_out_of_what_looks_at_a_calibration_text(evaluate, sweep, runs, stories):
    flags = ["--method", "cmoe", "--active", "0.5"]
    evaluate(*flags, "--calibration", str(stories), "--out", str(runs))
    _, out, _ = sweep(*flags, "--out", str(runs))
    assert "0 measured now, 1 before" in out


def test_out_holds_the_scores(judge, sweep, expected, runs):
    status, _, _ = judge(*FLAGS, "--tasks", "animals", "--limit", "4", "--out", str(runs))
    assert status == 0
    (line,) = runs.read_text(encoding="utf-8").splitlines()
    assert Run.from_dict(json.loads(line)).tasks == expected(["animals"], limit=4)
    _, out, _ = sweep(*FLAGS, "--out", str(runs), "--json")
    (known,) = strictly(out)["runs"]
    assert Run.from_dict(known).tasks == expected(["animals"], limit=4)
    _, out, _ = sweep(*FLAGS, "--out", str(runs), "--csv")
    (table,) = csv.DictReader(io.StringIO(out))
    assert table["animals acc dense"] == str(expected(["animals"], limit=4)[0].dense)


def test_tasks_of_the_same_run_come_together(judge, evaluate, expected, runs):
    """Those scored before stay, one scored again is as it is now."""
    judge(*FLAGS, "--tasks", "animals", "--limit", "4", "--out", str(runs))
    evaluate(*FLAGS, "--out", str(runs))
    judge(*FLAGS, "--tasks", "endings", "--out", str(runs))
    judge(*FLAGS, "--tasks", "endings", "--limit", "3", "--out", str(runs))
    lines = runs.read_text(encoding="utf-8").splitlines()
    found = [Run.from_dict(json.loads(line)).tasks for line in lines]
    animals = expected(["animals"], limit=4)
    assert found[0] == found[1] == animals
    assert found[2] == (*animals, *expected(["endings"]))
    assert found[3] == (*animals, *expected(["endings"], limit=3))


def test_a_file_that_cannot_be_written(evaluate, tmp_path):
    assert refused(evaluate("--out", str(tmp_path)), "cannot be a file")
