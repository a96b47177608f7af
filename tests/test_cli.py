"""The command line, on a tiny saved model."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlpmoe.__main__ as command_line
from mlpmoe.__main__ import main
from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure import speed
from mlpmoe.measure.bench import BenchLine
from mlpmoe.measure.parameters import parameter_report
from mlpmoe.measure.perplexity import compare, perplexity
from mlpmoe.measure.speed import Ratio
from mlpmoe.models import CATALOGUE
from tests.tiny import CONTEXT, byte_tokenizer, save_tiny_model, tiny_model

TEXT = "One day, a fox – a grey one – slept.\n<|endoftext|>\nA cat sat on the wall."
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("command-line") / "tiny")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def evaluate(folder, text, capsys):
    """Run `evaluate` with these flags; gives exit status, stdout and stderr."""

    def run(*flags, speed=False):
        flags = [*flags, *([] if speed else ["--no-speed"])]
        status = main(["evaluate", str(folder), "--text", str(text), *flags])
        return status, *capsys.readouterr()

    return run


def strictly(out):
    """The one JSON value that `out` is; NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(out, parse_constant=refuse)


def row(out, name):
    """The cells of a table's row."""
    line = next(line for line in out.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


# models ------------------------------------------------------------------------------------


def test_models(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + len(CATALOGUE)
    for entry in CATALOGUE:
        key, parameters, *_ = row(out, entry.key)
        assert key == entry.key
        assert parameters == f"{entry.parameters:,}"
        assert entry.note in out
    assert row(out, "r1-distill-llama-8b")[2] == "needed"


def test_models_as_json(capsys):
    assert main(["models", "--json"]) == 0
    models = strictly(capsys.readouterr().out)["models"]
    assert [model["key"] for model in models] == [entry.key for entry in CATALOGUE]
    assert {"parameters", "note", "needs_gpu", "source"} <= models[0].keys()


# evaluate ----------------------------------------------------------------------------------


def test_json_holds_what_the_library_says(evaluate):
    status, out, err = evaluate("--branches", "6", "--fade", "0.9", "--keep", "4", "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    dense, spec = tiny_model(), ConversionSpec(branches=6, fade=0.9, keep=4)
    converted = convert(dense, spec)
    assert found["spec"] == spec.to_dict()
    measured = [perplexity(model, byte_tokenizer(), TEXT) for model in (dense, converted)]
    for name, model, expected in zip(
        ("dense", "converted"), (dense, converted), measured, strict=True
    ):
        report = parameter_report(model)
        assert found[name]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert found[name]["stderr"] == pytest.approx(expected.stderr, rel=1e-5)
        assert found[name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        for field in ("total", "nonzero", "mlp_total", "mlp_nonzero", "macs_per_token"):
            assert found[name][field] == getattr(report, field)
    change = compare(*measured)
    assert found["perplexity_change"]["ratio"] == pytest.approx(change.ratio, rel=1e-6)
    assert found["perplexity_change"]["measurable"] == change.measurable
    assert (
        found["setting"]
        | {
            "dtype": "float32",
            "device": "cpu",
            "text": "mine.txt",
            "documents": 2,
            "bytes": measured[0].tokens,
            "tokens": measured[0].tokens,
            "window": CONTEXT,
            "stride": CONTEXT // 2,
            "layers": 2,
        }
        == found["setting"]
    )
    assert found["speed"] is None


def test_table(evaluate):
    status, out, err = evaluate("--branches", "4", "--fade", "0.9", "--dtype", "float32")
    assert (status, err) == (0, "")
    dense, converted = tiny_model(), convert(tiny_model(), ConversionSpec(branches=4, fade=0.9))
    reports = [parameter_report(model) for model in (dense, converted)]
    values = [perplexity(model, byte_tokenizer(), TEXT) for model in (dense, converted)]
    assert "2 documents" in out
    assert "--branches 4 --fade 0.9" in out
    assert "±" in row(out, "perplexity")[1]
    assert row(out, "perplexity")[1:3] == [f"{m.value:,.2f} ± {m.stderr:,.2f}" for m in values]
    assert row(out, "bits per byte")[1:3] == [f"{m.bits_per_byte:.3f}" for m in values]
    assert row(out, "parameters")[1:] == [
        f"{reports[0].total:,}",
        f"{reports[0].total + 2 * 4:,}",
        "+8 (±0.0 %)",
    ]
    zeros = reports[0].nonzero - reports[1].nonzero
    assert row(out, "not zero")[3].startswith(f"−{zeros:,} (−")
    assert row(out, "in MLPs, not zero")[2] == f"{reports[1].mlp_nonzero:,}"
    assert row(out, "multiply-adds per token")[3] == "0"
    assert "save neither multiply-adds nor time" in out
    assert "tokens written" not in out
    header, *body = out.split("\n\n")[1].splitlines()
    assert header.split() == ["dense", "converted", "difference"]
    start = header.index("difference")
    assert all(line[start - 1] == " " != line[start] for line in body)


def test_without_fade_nothing_is_said_about_zeros(evaluate):
    _, out, _ = evaluate("--keep", "12", "--compensation", "none")
    assert "--keep 12 --compensation none" in out
    assert "Fade" not in out


def test_the_same_model_has_no_measurable_change(evaluate):
    _, out, _ = evaluate("--branches", "1")
    assert row(out, "perplexity")[3] == "no measurable change"
    assert row(out, "bits per byte")[3] == "+0.000"


def test_speed(evaluate, monkeypatch):
    moments = iter(range(10**6))
    monkeypatch.setattr(speed, "perf_counter", lambda: next(moments))  # each takes a second
    _, out, _ = evaluate(speed=True)
    assert row(out, "tokens written per second")[1:] == ["16.0", "16.0", "no measurable change"]
    _, out, _ = evaluate("--json", speed=True)
    assert strictly(out)["speed"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_windows(evaluate):
    _, out, _ = evaluate("--window", "16", "--stride", "3", "--json")
    found = strictly(out)
    assert (found["setting"]["window"], found["setting"]["stride"]) == (16, 3)
    expected = perplexity(tiny_model(), byte_tokenizer(), TEXT, window=16, stride=3)
    assert found["dense"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)


def test_infinite_numbers_become_null(evaluate, text):
    """One scored token has no standard error."""
    text.write_text("a", encoding="utf-8")
    status, out, _ = evaluate("--json")
    assert status == 0
    assert strictly(out)["dense"]["stderr"] is None
    status, out, _ = evaluate()
    assert status == 0
    assert "nan" not in out


def test_the_shipped_text_is_the_default(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "evaluation.txt").write_text("Hello.", encoding="utf-8")
    monkeypatch.setattr(command_line, "assets_folder", lambda: tmp_path)
    assert main(["evaluate", str(folder), "--no-speed", "--json"]) == 0
    setting = strictly(capsys.readouterr().out)["setting"]
    assert (setting["text"], setting["tokens"]) == ("evaluation.txt", 6)


def test_a_byte_order_mark_is_no_text(evaluate, text):
    text.write_text(TEXT, encoding="utf-8-sig")
    _, out, _ = evaluate("--json")
    assert strictly(out)["setting"]["bytes"] == len(TEXT.replace("\n<|endoftext|>\n", "").encode())


def test_progress_is_shown_to_people_only(evaluate, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = evaluate()
    assert status == 0
    assert "perplexity, converted 100%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")  # nothing is left of it
    assert "100%" not in out


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fade", "7"], "between 0 and 2"),
        (["--fade", "much"], "must be a number"),
        (["--fade", "-1"], "between 0 and 2"),
        (["--keep", "17"], "branches (B) = 16"),
        (["--keep", "all"], "must be a number"),
        (["--branches", "0"], "at least 1"),
        (["--branches", "500"], "between 1 and 48"),
        (["--method", "magic"], "must be one of"),
        (["--compensation", "magic"], "sqrt, none"),
        (["--window", "999"], f"context of {CONTEXT} tokens"),
        (["--stride", "0"], "stride must lie"),
        (["--dtype", "int4"], "bfloat16"),
        (["--device", "abacus"], "cpu"),
    ],
)
def test_wrong_values_are_refused_in_one_line(evaluate, flags, words):
    status, out, err = evaluate(*flags)
    assert status == 2
    assert out == ""
    assert err.startswith("mlpmoe: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_text_of_nothing_is_refused(evaluate, text):
    text.write_text(" \n", encoding="utf-8")
    status, out, err = evaluate()
    assert (status, out) == (2, "")
    assert "too short" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read: No such file"), (b"caf\xe9", "is not UTF-8 text (byte 3)")],
)
def test_texts_that_cannot_be_read_fail_in_one_line(evaluate, text, content, words):
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    status, out, err = evaluate()
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_folder_is_no_text(evaluate, text):
    text.unlink()
    text.mkdir()
    assert evaluate()[0] == 1


def test_models_that_cannot_be_loaded_fail_in_one_line(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "config.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["evaluate"],
        ["evaluate", "demo", "--branche", "4"],  # no guessing of abbreviations
        ["evaluate", "demo", "--window", "wide"],
        ["evaluate", "demo", "--branches"],
        ["bench", "--rounds", "2"],
        ["bench", "--layers", "0"],
        ["bench", "--layers", "x"],
        ["bench", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ")


@pytest.mark.parametrize("command", [[], ["models"], ["evaluate"], ["bench"]], ids=" ".join)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m mlpmoe")
    if command in ([], ["evaluate"]):
        assert "python -m mlpmoe evaluate demo --branches 16 --fade 0.9" in out
    if command == ["evaluate"]:
        for name in ConversionSpec().to_dict():
            assert f"--{name} " in out


def test_control_c_leaves_no_traceback(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "load", interrupt)
    assert main(["evaluate", "demo"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mlpmoe: interrupted\n")


# bench -------------------------------------------------------------------------------------


@pytest.fixture
def fake_bench(monkeypatch):
    """Three lines instead of minutes of work; remembers what was asked for."""
    asked = []

    def bench(dtype, layers, rounds, report):
        asked.append((dtype, layers, rounds))
        name = str(dtype).removeprefix("torch.")
        yield BenchLine(name, "fused, to dense", Ratio(1.0123, 0.99, 1.04), target=1.05)
        yield BenchLine(name, "fade", Ratio(48.5, 47, 49), target=50, at_least=True, note="short")
        yield BenchLine(name, "new memory", Ratio(2e-5, 2e-5, 2e-5), unit="%", target=0.001)
        yield BenchLine(name, "convert", Ratio(0.0123, 0.01, 0.02), unit="s")

    monkeypatch.setattr(command_line, "bench", bench)
    return asked


def test_bench_table(fake_bench, capsys):
    assert main(["bench"]) == 0
    assert fake_bench == [(torch.float32, 24, 7), (torch.bfloat16, 24, 7)]
    header, float32, bfloat16 = capsys.readouterr().out.split("\n\n")
    assert f"torch {torch.__version__}" in header
    assert "7 rounds" in header
    title, fused, fade, memory, seconds = float32.splitlines()
    assert title == "float32"
    assert bfloat16.startswith("bfloat16\n")
    assert "× 1.01 (0.990 to 1.04)" in fused
    assert fused.endswith("target ≤ × 1.05: met")
    assert "target ≥ × 50.0: not met" in fade
    assert fade.endswith("short")
    assert "0.002 %" in memory
    assert memory.endswith("target ≤ 0.1 %: met")
    assert "0.0123 s (0.0100 to 0.0200)" in seconds
    assert "target" not in seconds


def test_bench_as_json(fake_bench, capsys):
    arguments = ["bench", "--dtype", "bfloat16", "--layers", "2", "--rounds", "3", "--json"]
    assert main(arguments) == 0
    assert fake_bench == [(torch.bfloat16, 2, 3)]
    found = strictly(capsys.readouterr().out)
    assert (found["rounds"], found["layers"]) == (3, 2)
    assert [line["met"] for line in found["lines"]] == [True, False, True, None]
    assert found["lines"][0]["measured"] == {"median": 1.0123, "low": 0.99, "high": 1.04}


# The real thing ----------------------------------------------------------------------------


def test_in_a_process_of_its_own(folder, text):
    """Whatever the terminal can show: nothing but the table, and nothing on stderr."""
    flags = ["--text", str(text), "--no-speed", "--branches", "4", "--fade", "0.9"]
    done = subprocess.run(
        [sys.executable, "-m", "mlpmoe", "evaluate", str(folder), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        encoding="ascii",
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    values = row(done.stdout, "perplexity")[1:3]
    assert all(math.isfinite(float(value.split(" ? ")[0].replace(",", ""))) for value in values)
