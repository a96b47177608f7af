"""Training after the conversion, asked for on the command line."""

import json

import pytest

from mlpmoe.__main__ import main
from mlpmoe.core.recovery import course as courses
from tests.commands.common import refused, strictly

FLAGS = ("--branches", "4", "--keep", "2", "--seqlen", "64", "--recover", "lora",
         "--recover-steps", "4")  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_evaluate_says_what_it_brought(evaluate, stories):
    status, out, err = evaluate(*FLAGS, "--calibration", str(stories))
    assert (status, err) == (0, "")
    out_lines = out.splitlines()
    line = next(line for line in out_lines if line.startswith("trained lora"))
    assert "held-out KL " in line and " 4 steps" in line
    status, out, _ = evaluate(*FLAGS, "--calibration", str(stories), "--json")
    found = strictly(out)["recovery"]
    assert found["steps"] == 4 and found["looks"][0]["step"] == 0
    assert f"{found['looks'][0]['held_out']:.4g} → " in line
    assert line.endswith(f" s, result {found['result']}")
    header = next(n for n, line in enumerate(out_lines) if line.startswith("step"))
    rows = [line.split() for line in out_lines[header + 1 :][: len(found["looks"])]]
    assert [row[0] for row in rows] == [str(look["step"]) for look in found["looks"]]
    assert [row[-1] for row in rows if row[-1] == "kept"] == ["kept"]
    (kept,) = (row for row in rows if row[-1] == "kept")
    assert kept[0] == str(found["best"]) and float(kept[-2]) == min(
        float(f"{look['held_out']:.4g}") for look in found["looks"]
    )
    status, out, _ = evaluate("--branches", "4", "--json")
    assert strictly(out)["recovery"] is None


def test_trained_masks_say_what_a_token_runs(evaluate, stories):
    flags = ("--method", "tokenclusters", "--experts", "3", "--active", "0.5", "--recover", "masks",
             "--recover-steps", "4", "--seqlen", "64", "--calibration", str(stories))  # fmt: skip
    status, out, err = evaluate(*flags)
    assert (status, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("trained masks"))
    assert ", a token runs 0.5 of the neurons" in line
    assert strictly(evaluate(*flags, "--json")[1])["recovery"]["active"] == 0.5


def test_a_command_that_was_stopped_goes_on(evaluate, stories, cache, monkeypatch):
    flags = (*FLAGS[:-1], "30", "--calibration", str(stories), "--json")
    whole = strictly(evaluate(*flags)[1])
    train = courses.Course._train

    def interrupted(course):
        if course.step == 25:
            raise KeyboardInterrupt
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", interrupted)
    assert evaluate(*flags)[0] == 130
    assert len(list((cache / "recovery").glob("*"))) == 1
    seen = []
    monkeypatch.setattr(courses.Course, "_train", lambda c: seen.append(c.step) or train(c))
    again = strictly(evaluate(*flags)[1])
    assert seen == list(range(25, 30))
    assert again["recovery"]["looks"] == whole["recovery"]["looks"]
    assert again["converted"] == whole["converted"]
    assert not list((cache / "recovery").glob("*"))


def test_sweeps_take_it(sweep, tmp_path):
    out = str(tmp_path / "runs.jsonl")
    flags = ("--branches", "4", "--keep", "2", "--recover", "none,alpha", "--recover-steps",
             "2,3", "--seqlen", "64", "--out", out, "--json")  # fmt: skip
    runs = strictly(sweep(*flags)[1])["runs"]
    asked = [(r["spec"]["recover"], r["spec"]["recover_steps"]) for r in runs]
    assert asked == [("none", 2), ("alpha", 2), ("alpha", 3)]
    assert runs[0]["perplexity"] != runs[1]["perplexity"]
    lines = [json.loads(line) for line in open(out, encoding="utf-8")]
    assert [line["spec"]["recover"] for line in lines] == ["none", "alpha", "alpha"]
    assert strictly(sweep(*flags)[1])["runs"] == runs  # from the file


def test_a_sweep_that_was_stopped_goes_on_within_a_training(sweep, tmp_path, cache, monkeypatch):
    out = tmp_path / "runs.jsonl"
    flags = ("--branches", "4", "--keep", "2", "--recover", "alpha,down", "--recover-steps", "6",
             "--seqlen", "64", "--json")  # fmt: skip
    whole = strictly(sweep(*flags)[1])["runs"]
    train = courses.Course._train

    def interrupted(course):
        if course.spec.recover == "down" and course.step == 4:
            raise KeyboardInterrupt
        return train(course)

    monkeypatch.setattr(courses.Course, "_train", interrupted)
    assert sweep(*flags, "--out", str(out))[0] == 130
    assert len(out.read_text().splitlines()) == 1  # measured before the second was trained
    seen = []
    monkeypatch.setattr(
        courses.Course, "_train", lambda c: seen.append((c.spec.recover, c.step)) or train(c)
    )
    assert strictly(sweep(*flags, "--out", str(out))[1])["runs"] == whole
    assert seen == [("down", 4), ("down", 5)]


def test_a_limit_makes_it_the_result_of_fewer_steps(evaluate, stories, tmp_path, monkeypatch):
    out, asked = tmp_path / "runs.jsonl", []
    monkeypatch.setattr(
        courses.Course, "_plan", lambda c: asked.append(c.seconds) or setattr(c, "steps", 2)
    )
    flags = (*FLAGS, "--calibration", str(stories), "--json")
    limited = strictly(evaluate(*flags, "--recover-limit", "1.5", "--out", str(out))[1])
    assert asked == [90.0]
    assert limited["spec"]["recover_steps"] == 2 and limited["recovery"]["asked"] == 4
    assert json.loads(out.read_text())["spec"] == limited["spec"]
    monkeypatch.undo()
    plain = strictly(evaluate(*flags, "--recover-steps", "2")[1])
    assert plain["converted"] == limited["converted"] and plain["spec"] == limited["spec"]


def test_what_the_limit_cut_short_is_no_run(evaluate, stories, tmp_path, monkeypatch):
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(courses.Course, "_plan", lambda course: None)
    monkeypatch.setattr(courses.Course, "_is_late", lambda course: course.step == 3)
    flags = (*FLAGS, "--calibration", str(stories), "--recover-limit", "1", "--out", str(out))
    status, said, err = evaluate(*flags)
    assert status == 0 and "the time limit of 60 s ended it at step 3." in said
    assert "not added" in err and not out.exists()


def test_convert_writes_it_and_reads_it_back(folder, text, stories, tmp_path, capsys):
    flags = [*FLAGS, "--text", str(text), "--calibration", str(stories), "--json"]
    assert main(["convert", str(folder), str(tmp_path / "a"), *flags]) == 0
    found = strictly(capsys.readouterr().out)
    assert found["spec"]["recover"] == "lora" and found["recovery"]["what"] == "lora"
    assert json.loads((tmp_path / "a" / "conversion.json").read_text())["recovery"]["steps"] == 4
    spec = ["--spec-file", str(tmp_path / "a" / "conversion.json"), "--recover-steps", "3"]
    more = ["--text", str(text), "--calibration", str(stories), "--seqlen", "64", "--json"]
    assert main(["evaluate", str(folder), "--no-speed", *spec, *more]) == 0
    assert strictly(capsys.readouterr().out)["recovery"]["steps"] == 3


def test_what_cannot_be_trained_is_refused(evaluate, stories):
    text = ("--calibration", str(stories))
    assert refused(evaluate("--keep", "8", "--recover-limit", "1"), "is for --recover")
    for minutes in ("0", "-1", "nan", "inf"):
        assert refused(evaluate(*FLAGS, *text, "--recover-limit", minutes), "minutes above 0")
    assert refused(evaluate("--recover", "router", *text), "has no router")
    assert refused(evaluate("--recover", "gate", *text), "recover must be one of")
    assert refused(evaluate("--recover", "masks", *text), "for the method tokenclusters")
    short = ("--nsamples", "8", "--seqlen", "64")
    assert refused(evaluate(*FLAGS, *text, *short), "calibration tokens, a batch and some")
