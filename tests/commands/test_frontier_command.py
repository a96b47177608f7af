"""`frontier` on a tiny saved model, with a search of a few trials whatever the time."""

import hashlib
import sys

import datasets
import pytest

from mlpmoe.__main__ import main
from mlpmoe.commands import frontier as frontier_command
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.presets import PRESETS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.encoding import encode_stream
from mlpmoe.measure.quality.perplexity import compare, measure, perplexity
from mlpmoe.measure.runs import search as search_module
from mlpmoe.measure.runs import trials as trials_module
from mlpmoe.measure.runs.deadline import Deadline
from mlpmoe.measure.runs.search import Budget
from mlpmoe.measure.words import in_words
from tests.commands.common import STORIES, TEXT, refused, strictly
from tests.tiny import CONTEXT, byte_tokenizer, tiny_model

TRIALS = 4


@pytest.fixture
def searches(monkeypatch):
    """Bounds every search by its trials, not by time; remembers what was asked for."""
    asked = []

    def search(trials, budget, deadline, **more):
        seconds = deadline.end - deadline.clock()
        asked.append((budget, trials.calibration is not None, round(seconds), more["seed"]))
        return search_module.search(trials, budget, Deadline(), TRIALS, **more)

    now = [0.0]  # by which nothing takes time
    monkeypatch.setattr(
        frontier_command, "Deadline", lambda seconds: Deadline(seconds, lambda: now[0])
    )
    monkeypatch.setattr(frontier_command, "search", search)
    monkeypatch.setattr(trials_module, "SCORING_TOKENS", 100)
    monkeypatch.setattr(trials_module, "SEARCH_TOKENS", 1024)  # less than the text has
    return asked


@pytest.fixture
def frontier(folder, text, stories, capsys, searches):
    """Run `frontier` with these flags; gives exit status, stdout and stderr."""

    def run(*flags):
        texts = ["--text", str(text), "--calibration", str(stories)]
        status = main(["frontier", str(folder), *texts, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def measured():
    """A function from a spec to its change of perplexity and its shares of the dense cost."""
    dense = tiny_model()
    calibration = Calibration.from_text(byte_tokenizer(), STORIES)
    before, counted = perplexity(dense, byte_tokenizer(), TEXT), parameter_report(dense)

    def of(spec):
        converted = convert(dense, spec, calibration)
        after, report = perplexity(converted, byte_tokenizer(), TEXT), parameter_report(converted)
        nonzero = report.mlp_nonzero / counted.mlp_nonzero
        compute = report.mlp_macs_per_token / counted.mlp_macs_per_token
        return compare(before, after), {"nonzero": nonzero, "compute": compute}

    return of


@pytest.mark.parametrize("cost", ["nonzero", "compute"])
def test_what_is_suggested_is_measured_and_not_worse_than_a_preset(
    frontier, searches, measured, cost
):
    status, out, err = frontier("--cost", cost, "--budget", "0.9,0.6", "--json", "--seed", "3")
    assert (status, err) == (0, "")
    found = strictly(out)
    # of what is left, which is all: no time passes
    assert searches == [(Budget(cost, 0.9), True, 30, 3), (Budget(cost, 0.6), True, 60, 3)]
    expected = {
        "text": "mine.txt",
        "text_digest": hashlib.sha256(TEXT.encode()).hexdigest()[:12],
        "protocol": "documents",
        "tokens": perplexity(tiny_model(), byte_tokenizer(), TEXT).tokens,
        "searched_on": "stories.txt",
        "calibrated": True,
        "seconds": 60,
        "seed": 3,
        "window": CONTEXT,
        "stride": CONTEXT,
    }
    assert found["setting"].items() >= expected.items()
    assert 100 <= found["setting"]["searched_tokens"] < 200
    assert found["setting"]["tried"] > 2 * TRIALS
    assert [s["budget"] for s in found["suggested"]] == [
        {"cost": cost, "share": share, "ratio": None} for share in (0.9, 0.6)
    ]
    runs = [*found["front"], *(suggested["run"] for suggested in found["suggested"])]
    specs = [ConversionSpec.from_dict(run["spec"]) for run in runs]
    assert any(spec.looks_at_activations for spec in specs)
    for run, spec in zip(runs, specs, strict=True):
        changed, costs = measured(spec)  # with all of the calibration text
        assert run["ratio"] == pytest.approx(changed.ratio, rel=1e-5)
        assert run["mlp_nonzero_share"] == pytest.approx(costs["nonzero"])
        assert run["mlp_macs_share"] == pytest.approx(costs["compute"])
    field = "mlp_nonzero_share" if cost == "nonzero" else "mlp_macs_share"
    for suggested, share in zip(found["suggested"], (0.9, 0.6), strict=True):
        run = suggested["run"]
        assert run[field] <= share + 5e-4
        for preset in PRESETS.values():
            # one that is clearly worse on the text of the search may not be measured on this one
            changed, costs = measured(preset)
            assert costs[cost] > share or run["ratio"] <= changed.ratio + 3 * changed.stderr
    shown = [(run[field], run["ratio"]) for run in found["front"]]
    assert shown == sorted(shown)
    assert [ratio for _, ratio in shown] == sorted({ratio for _, ratio in shown}, reverse=True)


def test_windows_without_overlap(frontier, folder, stories, monkeypatch, capsys):
    words = " ".join(f"goose {n}" for n in range(60))
    rows = datasets.Dataset.from_dict({"text": [words]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    flags = ["--text", "c4", "--window", "64", "--budget", "0.6", "--no-calibration"]
    flags = ["frontier", str(folder), "--calibration", str(stories), *flags]
    assert main([*flags, "--json"]) == 0
    found = strictly(capsys.readouterr().out)
    encoded = encode_stream(byte_tokenizer(), words, window=64)
    tokens = len(encoded.documents) * 63
    expected = {"text": "c4", "protocol": "stream", "window": 64, "tokens": tokens}
    assert found["setting"].items() >= expected.items()
    run = found["front"][0]
    converted = convert(tiny_model(), ConversionSpec.from_dict(run["spec"]))
    assert run["perplexity"] == pytest.approx(measure(converted, encoded).value, rel=1e-5)
    assert main(flags) == 0
    assert "windows of 64 tokens without overlap" in capsys.readouterr().out
    assert refused((main([*flags, "--stride", "3"]), *capsys.readouterr()), "leave out --stride")


def test_the_same_seed_gives_the_same(frontier):
    flags = ["--budget", "0.6", "--no-calibration", "--json", "--seed"]
    first, again = frontier(*flags, "1"), frontier(*flags, "1")
    assert first == again
    assert first[0] == 0


def test_as_text(frontier):
    _, out, _ = frontier("--budget", "0.9,0.6", "--json")
    found = strictly(out)
    status, out, err = frontier("--budget", "0.9,0.6")
    assert (status, err) == (0, "")
    setting, table, *goals = out.split("\n\n")
    assert f"{found['setting']['tried']} recipes tried" in setting
    assert "stories.txt" in setting
    assert "measured on mine.txt" in setting
    assert setting.endswith(f"tokens, windows of {CONTEXT} tokens without overlap")
    header, *rows = table.splitlines()
    assert header.split("  ")[-1] == "conversion"
    specs = [ConversionSpec.from_dict(run["spec"]) for run in found["front"]]
    assert [line.split("  ")[-1] for line in rows] == [spec.to_flags() for spec in specs]
    assert len(goals) == 2
    for goal, share, suggested in zip(goals, ("0.9", "0.6"), found["suggested"], strict=True):
        sentence, flags = goal.splitlines()
        spec = ConversionSpec.from_dict(suggested["run"]["spec"])
        assert sentence.startswith(
            f"At most {share} of the MLP parameters that are not zero: {in_words(spec)} ("
        )
        assert flags == f"  {spec.to_flags()}"


def test_without_calibration_no_recipe_needs_one(frontier, searches):
    status, out, err = frontier("--no-calibration", "--json")
    assert (status, err) == (0, "")
    parts = ((0.9, 20), (0.75, 30), (0.5, 60))
    assert searches == [(Budget("nonzero", share), False, part, 0) for share, part in parts]
    found = strictly(out)
    assert found["setting"]["calibrated"] is False
    runs = [*found["front"], *(suggested["run"] for suggested in found["suggested"])]
    assert all(not ConversionSpec.from_dict(run["spec"]).needs_calibration for run in runs)


def test_the_least_cost_at_a_perplexity(frontier, searches):
    flags = ["--cost", "compute", "--ratio", "1.2"]
    status, out, err = frontier(*flags, "--json")
    assert (status, err) == (0, "")
    assert searches == [(Budget("compute", None, 1.2), True, 60, 0)]
    found = strictly(out)
    (suggested,) = found["suggested"]
    assert suggested["budget"] == {"cost": "compute", "share": None, "ratio": 1.2}
    assert suggested["run"]["ratio"] <= 1.2
    cheaper = [
        r for r in found["front"] if r["mlp_macs_share"] < suggested["run"]["mlp_macs_share"]
    ]
    assert all(run["ratio"] > 1.2 for run in cheaper)
    _, out, _ = frontier(*flags)
    assert "\nPerplexity at most × 1.2, least MLP multiply-adds per token: " in out


def test_nothing_found(frontier, monkeypatch):
    monkeypatch.setattr(frontier_command, "search", lambda *_, **__: iter(()))
    status, out, err = frontier("--budget", "0.2")
    assert (status, err) == (0, "")
    assert "0 recipes tried" in out
    assert "nothing found; give the search more seconds or a larger budget" in out
    _, out, _ = frontier("--budget", "0.2", "--json")
    found = strictly(out)
    assert (found["front"], found["suggested"][0]["run"]) == ([], None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "much"], "must be a number, not 'much'"),
        (["--budget", ""], "must be a number, not ''"),
        (["--budget", "0.9,"], "must be a number, not ''"),
        (["--budget", "0.1"], "between 0.2 and 0.98"),
        (["--budget", "0.9,1"], "between 0.2 and 0.98"),
        (["--budget", "75"], "between 0.2 and 0.98"),
        (["--budget", "nan"], "between 0.2 and 0.98"),
        (["--budget", "-0.5"], "between 0.2 and 0.98"),
        (["--cost", "compute", "--budget", "1.5"], "multiply-adds per token"),
        (["--ratio", "1"], "more than 1"),
        (["--ratio", "nan"], "more than 1"),
        (["--ratio", "inf"], "more than 1"),
    ],
)
def test_wrong_budgets_are_refused_before_anything_is_loaded(frontier, monkeypatch, flags, words):
    monkeypatch.setattr(frontier_command, "load", None)
    assert refused(frontier(*flags), words)


def test_a_wrong_window_is_refused(frontier):
    assert refused(frontier("--window", "999"), f"context of {CONTEXT} tokens")


def test_without_time_nothing_is_found(frontier, monkeypatch):
    now = iter(range(0, 10**9, 100))
    monkeypatch.setattr(
        frontier_command, "Deadline", lambda seconds: Deadline(seconds, lambda: next(now))
    )
    status, out, err = frontier("--budget", "0.6")
    assert (status, err) == (0, "")
    assert "0 recipes tried on 0 tokens" in out
    assert "nothing found; give the search more seconds" in out


def test_searching_on_what_is_measured_is_refused(frontier, stories, text):
    for flags in ([], ["--no-calibration"]):
        text.write_text(STORIES, encoding="utf-8")
        assert refused(frontier(*flags), "share a passage")


def test_a_short_calibration_text_serves_what_needs_none(frontier, stories):
    stories.write_text("A newt sat.", encoding="utf-8")
    assert refused(frontier("--budget", "0.6"), "at least 1,024 are needed")
    status, _, err = frontier("--budget", "0.6", "--no-calibration")
    assert (status, err) == (0, "")


def test_an_empty_calibration_text_is_refused(frontier, stories):
    stories.write_text("\n", encoding="utf-8")
    assert refused(frontier("--budget", "0.6", "--no-calibration"), "too short")


def test_a_seed_too_large_is_refused(frontier):
    assert refused(frontier("--budget", "0.6", "--no-calibration", "--seed", str(2**32)), "seed")


def test_without_optuna(frontier, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert refused(frontier("--budget", "0.6", "--no-calibration"), "pip install optuna")
