"""What all commands have in common: usage, help, exit status; and `models`."""

import math
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from mlpmoe.__main__ import _parser, main
from mlpmoe.commands import evaluate as evaluate_command
from mlpmoe.commands import models as models_command
from mlpmoe.commands.models import NOT_HERE
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.models import CATALOGUE, hub
from tests.commands.common import ROOT, row, strictly
from tests.interrupts import take_interrupts
from tests.tiny import save_tiny_model

# models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("online", "elsewhere"), [(True, hub.FROM_HUB), (False, NOT_HERE)])
def test_models(capsys, monkeypatch, online, elsewhere):
    """Where each comes from: this machine, a package, the hub, or nowhere."""
    here = {"demo": hub.SHIPPED, "smollm2-135m": hub.PACKAGED, "qwen2.5-0.5b": hub.IN_CACHE}
    places = {entry.key: here.get(entry.key, elsewhere) for entry in CATALOGUE}
    monkeypatch.setattr(
        models_command, "whereabouts", lambda entry: here.get(entry.key, hub.FROM_HUB)
    )
    monkeypatch.setattr(models_command, "answers", lambda seconds: online)
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + len(CATALOGUE)
    for entry in CATALOGUE:
        key, parameters, place, *_ = row(out, entry.key)
        assert (key, parameters) == (entry.key, f"{entry.parameters:,}")
        assert place == places[key]
        assert entry.note in out
    assert row(out, "r1-distill-llama-8b")[3] == "needed"
    assert main(["models", "--json"]) == 0
    listed = strictly(capsys.readouterr().out)["models"]
    assert {model["key"]: model["where"] for model in listed} == places
    assert {"label", "parameters", "note", "needs_gpu", "source"} <= listed[0].keys()


def test_a_model_that_is_made_ready(capsys, tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    assert main(["models", "--prepare", str(folder)]) == 0
    assert re.fullmatch(r"tiny: ready, \d+ kB\n", capsys.readouterr().out)
    assert main(["models", "--prepare", "demo", "--json"]) == 0
    assert strictly(capsys.readouterr().out)["model"] == "demo"
    assert main(["models", "--prepare", str(tmp_path / "none")]) == 1
    assert "There is no folder" in capsys.readouterr().err


# All commands ------------------------------------------------------------------------------


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
        ["evaluate", "demo", "--fade_schedule", "uniform"],  # flags are written with dashes
        ["frontier"],
        ["frontier", "demo", "--budget"],
        ["frontier", "demo", "--budget", "0.5", "--ratio", "1.1"],
        ["frontier", "demo", "--ratio", "little"],
        ["frontier", "demo", "--cost", "time"],
        ["frontier", "demo", "--seconds", "0"],
        ["frontier", "demo", "--seed", "-1"],
        ["frontier", "demo", "--keep", "12"],
        ["study"],
        ["study", "apart", "--steps", "many"],
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
    "command",
    [[], ["models"], ["evaluate"], ["sweep"], ["frontier"], ["study"], ["bench"]],
    ids=" ".join,
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
            assert f"--{name.replace('_', '-')} " in out
            assert "_" not in name or f"--{name}" not in out


def examples_of(text):
    return re.findall(r"^ *python -m mlpmoe (.*?)(?:\s+#.*)?$", text, re.M)


@pytest.mark.parametrize("command", ["", "evaluate", "sweep", "frontier"])
def test_examples_are_commands(capsys, command):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    found = examples_of(capsys.readouterr().out)
    assert found
    for example in found:
        _parser().parse_args(example.split())


def test_commands_of_the_readme_are_commands():
    found = examples_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 5
    for example in found:
        _parser().parse_args(example.split())


def test_control_c_leaves_no_traceback(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_command, "load", interrupt)
    assert main(["evaluate", "demo"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mlpmoe: interrupted\n")


def test_an_output_that_takes_nothing(capsys, monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "mlpmoe: the output cannot be written: the disk is full.\n"
    with suppress(OSError):
        full.close()


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


SLOW = "import time\nprint('read', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize("command", [["-m", "mlpmoe", "models"], ["app.py"]])
def test_an_interrupt_while_the_libraries_are_read(command, tmp_path):
    """No traceback, whichever library is under way."""
    for name in ("torch", "transformers"):  # which take seconds, and here as long as it takes
        (tmp_path / f"{name}.py").write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_interrupts,
    ) as process:
        assert process.stdout.readline() == "read\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        assert process.stderr.read() == ""
