"""Training after the conversion, asked for on the command line."""

import json

import pytest

from mlpmoe.__main__ import main
from mlpmoe.core.recovery import recover as recovering
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
    line = next(line for line in out.splitlines() if line.startswith("trained lora"))
    assert "held-out KL " in line and " 4 steps" in line and line.endswith(" s")
    status, out, _ = evaluate(*FLAGS, "--calibration", str(stories), "--json")
    found = strictly(out)["recovery"]
    assert found["steps"] == 4 and found["looks"][0]["step"] == 0
    assert f"{found['looks'][0]['held_out']:.4g} → " in line
    status, out, _ = evaluate("--branches", "4", "--json")
    assert strictly(out)["recovery"] is None


def test_trained_masks_say_what_a_token_runs(evaluate, stories):
    flags = ("--method", "tokenclusters", "--experts", "3", "--active", "0.5", "--recover", "masks",
             "--recover-steps", "4", "--seqlen", "64", "--calibration", str(stories))  # fmt: skip
    status, out, err = evaluate(*flags)
    assert (status, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("trained masks"))
    assert line.endswith(", a token runs 0.5 of the neurons")
    assert strictly(evaluate(*flags, "--json")[1])["recovery"]["active"] == 0.5


def test_a_command_that_was_killed_goes_on(evaluate, stories, cache, monkeypatch):
    flags = (*FLAGS[:-1], "30", "--calibration", str(stories), "--json")
    whole = strictly(evaluate(*flags)[1])
    train = recovering._Course._train

    class Killed(BaseException):
        pass

    def killed(course):
        if course.step == 25:
            raise Killed
        return train(course)

    monkeypatch.setattr(recovering._Course, "_train", killed)
    with pytest.raises(Killed):
        evaluate(*flags)
    assert len(list((cache / "recovery").glob("*"))) == 1
    seen = []
    monkeypatch.setattr(recovering._Course, "_train", lambda c: seen.append(c.step) or train(c))
    again = strictly(evaluate(*flags)[1])
    assert seen == list(range(20, 30))
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
    assert refused(evaluate("--recover", "router", *text), "has no router")
    assert refused(evaluate("--recover", "gate", *text), "recover must be one of")
    assert refused(evaluate("--recover", "masks", *text), "for the method tokenclusters")
    assert refused(evaluate(*FLAGS, *text, "--nsamples", "8"), "needs 576 calibration tokens")
