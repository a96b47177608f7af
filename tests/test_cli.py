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
from mlpmoe import sweeping
from mlpmoe.__main__ import main
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure import speed
from mlpmoe.measure.bench import BenchLine
from mlpmoe.measure.parameters import parameter_report
from mlpmoe.measure.perplexity import compare, perplexity
from mlpmoe.measure.speed import Ratio
from mlpmoe.measure.sweep import comparison
from mlpmoe.models import CATALOGUE
from tests.tiny import CONTEXT, byte_tokenizer, save_tiny_model, tiny_model

TEXT = "One day, a fox – a grey one – slept.\n<|endoftext|>\nA cat sat on the wall."
ANIMALS = ("heron", "badger", "newt", "mole", "wren")
# other text than is measured, of 1,024 bytes and more: tokens of the tiny model
STORIES = "\n<|endoftext|>\n".join(
    f"Stone {number}: the {ANIMALS[number % 5]} took it along and put "
    f"{number % 7} dots on its flat back."
    for number in range(30)
)
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
    (tmp_path / "texts" / "calibration.txt").write_text(STORIES, encoding="utf-8")
    monkeypatch.setattr(sweeping, "assets_folder", lambda: tmp_path)
    assert main(["evaluate", str(folder), "--no-speed", "--json", "--method", "cmoe"]) == 0
    setting = strictly(capsys.readouterr().out)["setting"]
    assert (setting["text"], setting["tokens"]) == ("evaluation.txt", 6)
    assert setting["calibration"] == "calibration.txt"


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


# Calibration -------------------------------------------------------------------------------


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text(STORIES, encoding="utf-8")
    return file


def test_a_routed_conversion(evaluate, stories):
    flags = ["--method", "cmoe", "--active", "0.5", "--calibration", str(stories)]
    status, out, err = evaluate(*flags, "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    spec = ConversionSpec(method="cmoe", active=0.5)
    calibration = Calibration.from_text(byte_tokenizer(), STORIES)
    converted = convert(tiny_model(), spec, calibration)
    expected, report = perplexity(converted, byte_tokenizer(), TEXT), parameter_report(converted)
    assert found["spec"] == spec.to_dict()
    assert found["converted"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    for field in ("total", "active_per_token", "mlp_macs_per_token"):
        assert found["converted"][field] == getattr(report, field)
    assert found["converted"]["active_per_token"] < found["dense"]["active_per_token"]
    assert found["setting"]["calibration"] == "stories.txt"
    assert found["setting"]["calibration_tokens"] == calibration.samples.numel()
    status, out, err = evaluate(*flags)
    assert (status, err) == (0, "")
    assert f"calibrated on stories.txt, {calibration.samples.numel():,} tokens" in out
    assert "converted with --method cmoe --active 0.5" in out
    assert row(out, "in MLPs")[2] == f"{report.mlp_total:,}"


def test_what_looks_at_nothing_names_no_calibration_text(evaluate, stories):
    _, out, _ = evaluate("--method", "random", "--calibration", str(stories), "--json")
    assert strictly(out)["setting"]["calibration"] is None
    _, out, _ = evaluate("--method", "random", "--calibration", str(stories))
    assert "calibrated" not in out


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_calibrating_on_what_is_measured_is_refused(folder, stories, tmp_path, capsys, command):
    """The same file, and another one that shares a line with it, spaced otherwise."""
    other = tmp_path / "other.txt"
    shared = STORIES.splitlines()[4]
    other.write_text(f"{TEXT}\n  {shared.upper().replace(' ', '  ')}\n", encoding="utf-8")
    for measured in (stories, other):
        flags = ["--method", "cmoe", "--text", str(measured), "--calibration", str(stories)]
        assert main([command, str(folder), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "share a passage" in err
        assert err.count("\n") == 1


def test_a_short_calibration_text_is_refused(evaluate, stories):
    stories.write_text(STORIES[:500], encoding="utf-8")
    status, out, err = evaluate("--method", "cmoe", "--calibration", str(stories))
    assert (status, out) == (2, "")
    assert "at least 1,024 are needed" in err
    assert err.count("\n") == 1
    status, *_ = evaluate("--method", "random", "--calibration", str(stories))
    assert status == 0  # nothing looks at it


def test_a_calibration_text_that_is_not_there(evaluate, tmp_path):
    status, out, err = evaluate("--method", "cmoe", "--calibration", str(tmp_path / "none.txt"))
    assert (status, out) == (1, "")
    assert "none.txt cannot be read: No such file" in err


# sweep -------------------------------------------------------------------------------------


@pytest.fixture
def sweep(folder, text, stories, capsys):
    """Run `sweep` with these flags; gives exit status, stdout and stderr."""

    def run(*flags):
        texts = ["--text", str(text), "--calibration", str(stories)]
        status = main(["sweep", str(folder), *texts, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs.jsonl"


def written(file):
    """The runs in a file, one of strict JSON a line."""
    return [strictly(line) for line in file.read_text(encoding="utf-8").splitlines()]


PRODUCT = ["--branches", "4,8", "--fade", "0,0.9", "--compensation", "none"]
PRODUCT_SPECS = [
    ConversionSpec(branches=branches, fade=fade, compensation="none")
    for branches in (4, 8)
    for fade in (0, 0.9)
]


def test_a_sweep_of_all_combinations(sweep, runs):
    status, out, err = sweep(*PRODUCT, "--out", str(runs), "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    assert [run["spec"] for run in found["runs"]] == [spec.to_dict() for spec in PRODUCT_SPECS]
    for run, spec in zip(found["runs"], PRODUCT_SPECS, strict=True):
        expected = perplexity(convert(tiny_model(), spec), byte_tokenizer(), TEXT)
        assert run["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert run["mlp_macs_share"] == 1
    setting = found["setting"]
    assert (setting["window"], setting["stride"]) == (CONTEXT, CONTEXT // 2)
    assert setting["text"].startswith("mine.txt ")
    lines = written(runs)
    assert len(lines) == 4
    for line, run in zip(lines, found["runs"], strict=True):
        assert line.items() >= setting.items()
        assert line["perplexity"] == run["perplexity"]
        assert line["tokens"] == 62


def test_the_table_of_a_sweep(sweep):
    status, out, err = sweep(*PRODUCT, "--keep", "4")
    assert (status, err) == (0, "")
    header, columns, *body = out.splitlines()
    assert "on mine.txt, 62 tokens" in header
    assert header.endswith("4 measured now, 0 before")
    assert columns.split("  ")[-1] == "conversion"
    assert len(body) == 4
    assert "--branches 4 --fade 0.9 --keep 4 --compensation none" in body[1]
    assert "±0.0 %" in body[1]
    assert "−50.0 %" in body[2]


def test_a_sweep_goes_on_from_its_file(sweep, runs):
    _, first, _ = sweep(*PRODUCT, "--out", str(runs))
    content = runs.read_bytes()
    assert "4 measured now, 0 before" in first
    _, second, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "0 measured now, 4 before" in second
    assert second.splitlines()[1:] == first.splitlines()[1:]
    assert runs.read_bytes() == content
    _, more, _ = sweep("--branches", "4,8,2", *PRODUCT[2:], "--out", str(runs))
    assert "2 measured now, 4 before" in more
    assert runs.read_bytes().startswith(content)


def test_what_was_measured_before_is_in_the_json(sweep, runs):
    _, first, _ = sweep(*PRODUCT, "--out", str(runs), "--json")
    _, second, _ = sweep(*PRODUCT, "--out", str(runs), "--json")
    for old, new in zip(strictly(first)["runs"], strictly(second)["runs"], strict=True):
        assert new.items() >= old.items()


@pytest.mark.parametrize("left", [0.5, 1])
def test_a_line_cut_short_is_measured_again(sweep, runs, left):
    """A sweep was killed while it wrote: half of its last line, or all but its end."""
    sweep(*PRODUCT, "--out", str(runs))
    lines = runs.read_text(encoding="utf-8").splitlines()
    cut = lines[-1][: int(left * len(lines[-1]))]
    runs.write_text("\n".join([*lines[:-1], cut]), encoding="utf-8")
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert ("0 measured now, 4" if left == 1 else "1 measured now, 3") in out
    again = runs.read_text(encoding="utf-8").splitlines()
    assert again == [*lines[:-1], cut, *([] if left == 1 else [lines[-1]])]
    _, out, _ = sweep(*PRODUCT, "--out", str(runs))
    assert "0 measured now, 4 before" in out


def test_lines_that_are_no_runs_are_passed_over(sweep, runs):
    runs.write_text('5\n\n[]\n{"model": 1}\nnull\nnotes\n', encoding="utf-8")
    content = runs.read_text(encoding="utf-8")
    status, out, _ = sweep("--out", str(runs))
    assert status == 0
    assert "1 measured now, 0 before" in out
    assert runs.read_text(encoding="utf-8").startswith(content)


def test_other_settings_are_not_mixed_up(sweep, runs, text, stories):
    """One file may hold them all: another text, calibration text, window or stride."""
    flags = ["--method", "cmoe", "--out", str(runs), "--json"]
    seen = set()

    def changed(*more):
        status, out, _ = sweep(*flags, *more)
        assert status == 0
        (run,) = strictly(out)["runs"]
        assert run["perplexity"] not in seen
        seen.add(run["perplexity"])
        assert len(written(runs)) == len(seen)

    changed()
    changed("--window", "16", "--stride", "8")
    changed("--window", "16", "--stride", "4")
    text.write_text(TEXT.replace("fox", "dog"), encoding="utf-8")
    changed()
    stories.write_text(STORIES[300:].replace("dots", "rings"), encoding="utf-8")
    changed()
    text.write_text(TEXT, encoding="utf-8")
    stories.write_text(STORIES, encoding="utf-8")
    _, out, _ = sweep(*flags)  # the first one again
    assert strictly(out)["runs"][0]["perplexity"] == written(runs)[0]["perplexity"]
    assert len(written(runs)) == len(seen) == 5


def test_values_go_to_the_methods_that_use_them(sweep):
    flags = ["--method", "mlpmoe,contiguous,neurons", "--keep", "8,8", "--active", "0.5,0.25"]
    status, out, err = sweep(*flags, "--experts", "16", "--json")
    assert (status, err) == (0, "")
    assert [run["spec"] for run in strictly(out)["runs"]] == [
        ConversionSpec(keep=8).to_dict(),
        ConversionSpec(method="contiguous", active=0.5).to_dict(),
        ConversionSpec(method="contiguous", active=0.25).to_dict(),
        ConversionSpec(method="neurons", active=0.5).to_dict(),
        ConversionSpec(method="neurons", active=0.25).to_dict(),
    ]


def test_a_sweep_of_every_method(sweep):
    status, out, err = sweep("--compare", "--active", "0.75,0.5", "--json")
    assert (status, err) == (0, "")
    found = [(run["name"], run["spec"]) for run in strictly(out)["runs"]]
    assert found == [
        (name, spec.to_dict())
        for active in (0.75, 0.5)
        for name, (_, spec) in comparison(active).items()
    ]
    assert all(math.isfinite(run["perplexity"]) for run in strictly(out)["runs"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experts", "8"], "experts does not belong to mlpmoe"),
        (["--method", "cmoe,neurons", "--keep", "8"], "keep does not belong to cmoe, neurons"),
        (["--method", "cmoe", "--seed", "1,2"], "seed does not belong to cmoe"),
        (["--method", "magic"], "must be one of"),
        (["--branches", "4,x"], "must be a number, not 'x'"),
        (["--branches", "4,"], "must be a number, not ''"),
        (["--fade", "0,7"], "between 0 and 2"),
        (["--branches", "4,500"], "between 1 and 48"),
        (["--method", "cmoe", "--active", "0.2", "--shared", "0.5"], "at most"),
        (["--compare", "--fade", "0.5"], "--compare takes no other spec flag than --active"),
        (["--compare", "--active", "1.5"], "between"),
        (["--compare", "--active", "0.5", "--method", "cmoe"], "--compare takes no other"),
    ],
)
def test_wrong_values_of_a_sweep_are_refused(sweep, runs, flags, words):
    status, out, err = sweep(*flags, "--out", str(runs))
    assert (status, out) == (2, "")
    assert err.startswith("mlpmoe: ")
    assert words in err
    assert err.count("\n") == 1
    assert not runs.exists()


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
        ["sweep"],
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


@pytest.mark.parametrize(
    "command", [[], ["models"], ["evaluate"], ["sweep"], ["bench"]], ids=" ".join
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m mlpmoe")
    if command in ([], ["evaluate"]):
        assert "python -m mlpmoe evaluate demo --branches 16 --fade 0.9" in out
    if command in (["evaluate"], ["sweep"]):
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
