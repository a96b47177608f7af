"""The command `study`: what it prints and writes, of a study that takes no time."""

import errno
import xml.etree.ElementTree as ElementTree

import pytest

from mlpmoe import studies
from mlpmoe.__main__ import main
from mlpmoe.commands import study as study_command
from mlpmoe.studies import STUDIES, Study
from mlpmoe.studies.curves import Axes
from tests.commands.common import refused, row, strictly
from tests.families import build
from tests.tiny import byte_tokenizer


@pytest.fixture
def asked(monkeypatch):
    """Two studies without training: one of curves, one without; with what they were asked."""
    calls = []

    def curves(model, tokenizer, steps, seed, on_progress):
        on_progress("going", 0.5)
        calls.append((model.dtype, len(tokenizer), steps, seed))
        return [
            {"start": start, "tokens": tokens, "loss": 2.5 - tokens / 1000, "loss_stderr": 0.125}
            for start in ("dense", "other", "third")
            for tokens in (0, 1024)
        ]

    axes = Axes("start", "tokens", "loss", "tokens", "loss")
    made = {
        "curves": Study("Curves.", curves, steps=7, axes=axes),
        "plain": Study("No curves.", lambda *_: [{"model": "a", "right": None, "n": 1234}], 3),
    }
    for name, study in made.items():
        monkeypatch.setitem(STUDIES, name, study)
    return calls


@pytest.fixture
def study(folder, capsys, asked):
    """Run `study` with these flags; gives exit status, stdout and stderr."""

    def run(*flags):
        status = main(["study", *flags, "--model", str(folder)])
        return status, *capsys.readouterr()

    return run


def test_json(study, asked, folder):
    status, out, err = study("curves", "--json", "--seed", "3")
    assert (status, err) == (0, "")
    found = strictly(out)
    expected = {"study": "curves", "model": str(folder), "steps": 7, "seed": 3}
    assert found["setting"].items() >= expected.items()
    assert len(found["rows"]) == 6
    assert found["rows"][1] == {
        "start": "dense",
        "tokens": 1024,
        "loss": 1.476,
        "loss_stderr": 0.125,
    }
    assert [(str(dtype), steps, seed) for dtype, _, steps, seed in asked] == [
        ("torch.float32", 7, 3)
    ]


def test_a_table_with_errors_beside_the_figures(study, asked):
    status, out, err = study("curves", "--steps", "5")
    assert (status, err) == (0, "")
    assert asked[0][2] == 5
    assert out.startswith("Curves.\n\nstart ")
    assert row(out, "other")[1:] == ["0", "2.50 ± 0.12"]
    _, out, _ = study("plain")
    assert row(out, "a") == ["a", "1,234"]  # what is unknown is left open


def test_a_disk_that_is_full_costs_the_curves_alone(study, tmp_path, monkeypatch):
    write = study_command.Path.write_text

    def full(self, *values, **named):
        if self.suffix != ".svg":
            return write(self, *values, **named)
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(study_command.Path, "write_text", full)
    file = tmp_path / "curves.svg"
    status, out, err = study("curves", "--plot", str(file))
    assert (status, err) == (1, f"mlpmoe: {file} cannot be written: the disk is full.\n")
    assert row(out, "other")[1:] == ["0", "2.50 ± 0.12"] and "Curves:" not in out
    assert not file.exists()


def test_curves_are_written(study, tmp_path):
    file = tmp_path / "curves.svg"
    status, out, _ = study("curves", "--plot", str(file))
    assert status == 0 and f"Curves: {file}" in out
    root = ElementTree.parse(file).getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["fly"], "no study is called 'fly'; allowed: apart, downcycling"),
        (["curves", "--steps", "0"], "steps must lie between 1 and"),
        (["curves", "--steps", "-2"], "not -2"),
        (["curves", "--steps", "1000000"], "not 1,000,000"),
        (["curves", "--seed", "-1"], "seed must lie between 0 and"),
        (["plain", "--plot", "x.svg"], "has no curves; --plot is for downcycling"),
        (["curves", "--plot", "no/such/folder/x.svg"], "name one in a folder that exists"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(study, monkeypatch, flags, words):
    monkeypatch.setattr(study_command, "load", None)
    assert refused(study(*flags), words)


def test_a_study_is_found_by_name(monkeypatch, asked):
    made = studies.run_study("plain", None, None)
    assert made == [{"model": "a", "right": None, "n": 1234}]
    with pytest.raises(studies.UserError, match="steps"):
        studies.run_study("plain", None, None, steps=0)


def test_a_model_that_has_no_gates(tmp_path, capsys):
    build("gpt2", vocab_size=257).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    status = main(["study", "downcycling", "--model", str(tmp_path), "--steps", "1"])
    assert refused((status, *capsys.readouterr()), "have none")
