"""Sweeps of several processes into one file measure each spec once."""

import os
import sys
import time
from dataclasses import replace

import pytest

from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.runs import sharing
from mlpmoe.measure.runs.file import RunsFile
from mlpmoe.measure.runs.pace import Pace
from mlpmoe.measure.runs.sharing import Sharing, measured_together
from tests.forked import Forked
from tests.measure.test_runs_file import RUN, SETTING

SPECS = [ConversionSpec(branches=number) for number in range(1, 25)]


@pytest.fixture
def file(tmp_path):
    return RunsFile(tmp_path / "runs.jsonl", SETTING)


def measuring(pause, seen):
    """Stands for a sweep that takes groups of three."""

    def measure(specs, take):
        for start in range(0, len(specs), 3):
            for spec in take(specs[start : start + 3]):
                time.sleep(pause)
                seen.append(spec)
                yield replace(RUN, spec=spec)

    return measure


SWEEPER = """
import sys, time
from pathlib import Path
from tests.measure.test_sharing import SPECS, SETTING, RunsFile, measured_together, measuring
number, file = sys.argv[1], RunsFile(Path("runs.jsonl"), SETTING)
Path(f"ready-{number}").touch()
while not Path("go").exists():
    time.sleep(0.001)
mine = list(measured_together(measuring(0.02, []), SPECS, file, 62, lambda message: None))
print(len(mine))
"""


def start(tmp_path, number):
    (tmp_path / "sweeper.py").write_text(SWEEPER)
    said = open(tmp_path / f"said-{number}", "wb")
    with said:
        return Forked(
            [sys.executable, tmp_path / "sweeper.py", number],
            cwd=tmp_path, env=os.environ, stdout=said, stderr=said,
        )  # fmt: skip


def wait_for(count, tmp_path, pattern):
    while len(list(tmp_path.glob(pattern))) < count:
        time.sleep(0.01)


def test_two_sweeps_share_the_work(file, tmp_path):
    sweepers = [start(tmp_path, number) for number in (1, 2)]
    wait_for(2, tmp_path, "ready-*")
    (tmp_path / "go").touch()
    said = [(s.wait(60), (tmp_path / f"said-{n}").read_text()) for n, s in enumerate(sweepers, 1)]
    assert [status for status, _ in said] == [0, 0], said
    counts = [int(text) for _, text in said]
    assert sum(counts) == len(SPECS) and min(counts) >= 6
    assert len(file.path.read_bytes().splitlines()) == len(SPECS)
    assert set(file.read()) == set(SPECS)
    assert not list(tmp_path.glob("*.claims"))


def test_what_a_killed_sweep_had_claimed_is_measured(file, tmp_path, monkeypatch):
    other = start(tmp_path, 1)
    (tmp_path / "go").touch()
    wait_for(1, tmp_path, "runs.jsonl")
    seen, said = [], []

    def report(message):
        said.append(message)
        other.kill()
        other.wait(10)

    monkeypatch.setattr(sharing, "POLL", 0.01)
    with Sharing(file) as mine:
        first = mine.take(SPECS)
    assert first and set(first) < set(SPECS)  # it measures some
    list(measured_together(measuring(0.0, seen), SPECS, file, 62, report))
    assert set(file.read()) == set(SPECS)
    assert len(file.path.read_bytes().splitlines()) == len(SPECS)


def test_other_settings_are_other_work(file, tmp_path):
    other = RunsFile(file.path, SETTING | {"model": "other"})
    assert other.key(SPECS[0]) != file.key(SPECS[0])
    renamed = RunsFile(file.path, SETTING | {"text": "renamed 123abc", "calibration": "b 2"})
    assert renamed.key(SPECS[0]) == file.key(SPECS[0])
    calibrated = ConversionSpec(keep=8, order="activation")
    assert renamed.key(calibrated) != file.key(calibrated)


def test_a_folder_that_takes_no_claims(file, monkeypatch):
    monkeypatch.setattr(sharing.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with Sharing(file) as mine:
        assert mine.take(SPECS) == SPECS


def test_what_others_measure_is_not_waited_for_in_the_pace():
    pace = Pace(6)
    take = pace.leaving_out(lambda group: group[:1])
    assert take([1, 2, 3]) == [1]
    assert str(pace) == "0 of 4 measured"
