"""A file of runs: what is read back, what a killed write leaves, and several that write."""

import json
import math
import os
import sys
import time
from dataclasses import replace

import pytest

from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.runs.file import RunsFile
from mlpmoe.measure.runs.sweep import Run
from tests.forked import Forked

SETTING = {
    "model": "demo", "dtype": "float32", "text": "stories 123abc", "calibration": None,
    "protocol": "documents", "window": 512, "stride": 512,
}  # fmt: skip
RUN = Run(ConversionSpec(keep=8), 12.5, 1.25, 0.01, 1.1, 900, 0.9, 0.8, 850, 0.85, 0.7)
RUNS = [replace(RUN, spec=ConversionSpec(branches=b), nonzero=b) for b in range(1, 6)]


@pytest.fixture
def file(tmp_path):
    return RunsFile(tmp_path / "runs.jsonl", SETTING)


def test_what_is_written_is_read(file):
    assert file.read() == {}
    assert not file.path.exists()
    broken = replace(RUN, perplexity=math.inf, ratio=math.inf, stderr=math.inf)
    for run in (*RUNS, broken):
        file.append(run, 62)
    assert file.read() == {run.spec: run for run in (*RUNS, broken)}
    lines = file.path.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # strict JSON
    assert all(entry.items() >= (SETTING | {"tokens": 62}).items() for entry in entries)
    assert entries[-1]["perplexity"] is None


@pytest.mark.parametrize("left", [0.0, 0.3, 0.99, 1.0])
def test_a_write_that_was_killed_costs_one_run(file, left):
    for run in RUNS:
        file.append(run, 62)
    whole = file.path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    cut = start + int(left * (len(whole) - 1 - start))
    file.path.write_bytes(whole[:cut])
    known = RUNS if left == 1 else RUNS[:-1]  # all but the end of the line is whole
    assert file.read() == {run.spec: run for run in known}
    file.append(RUN, 62)
    assert file.read() == {run.spec: run for run in (*known, RUN)}
    assert file.path.read_bytes().startswith(whole[:cut])


def test_lines_that_are_no_runs_are_passed_over(file):
    file.append(RUN, 62)
    good = file.path.read_bytes()
    other = json.loads(good) | {"text": 5}
    bad = [b"", b"5", b"[]", b"null", b'{"model": 1}', b"notes", b"\xff\xfe", b"[" * 100_000,
           b'{"spec": 5}', json.dumps(other).encode()]  # fmt: skip
    file.path.write_bytes(b"\n".join(bad) + b"\n" + good)
    assert file.read() == {RUN.spec: RUN}


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "other"), ("dtype", "bfloat16"), ("text", "stories 999"), ("window", 256),
     ("stride", 128), ("protocol", "stream")],
)  # fmt: skip
def test_other_settings_are_not_mixed_up(file, name, value):
    file.append(RUN, 62)
    other = RunsFile(file.path, SETTING | {name: value})
    assert other.read() == {}
    other.append(replace(RUN, ratio=2.0), 62)
    assert other.read()[RUN.spec].ratio == 2.0
    assert file.read() == {RUN.spec: RUN}


def test_a_text_is_known_by_its_content(file):
    """It may have been renamed."""
    file.append(RUN, 62)
    assert RunsFile(file.path, SETTING | {"text": "my stories.txt 123abc"}).read()
    assert not RunsFile(file.path, SETTING | {"text": "stories 123ab"}).read()


def test_the_calibration_text_matters_to_those_that_look_at_it(file):
    calibrated = replace(RUN, spec=ConversionSpec(keep=8, order="activation"))
    first = RunsFile(file.path, SETTING | {"calibration": "a.txt 1"})
    for run in (RUN, calibrated):
        first.append(run, 62)
    assert first.read() == {run.spec: run for run in (RUN, calibrated)}
    assert RunsFile(file.path, SETTING | {"calibration": "b.txt 2"}).read() == {RUN.spec: RUN}
    assert file.read() == {RUN.spec: RUN}


def test_a_disk_that_takes_a_line_in_pieces(file, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    file.append(RUN, 62)
    file.append(RUNS[0], 62)
    assert file.read() == {run.spec: run for run in (RUN, RUNS[0])}


WRITER = """
import os, sys, time
from pathlib import Path
from tests.measure.test_runs_file import RUN, SETTING, ConversionSpec, RunsFile, replace
write = os.write
os.write = lambda file, data: write(file, data[:100])  # many pieces, to be mixed up
file = RunsFile(Path(sys.argv[1]), SETTING)
Path(f"ready-{sys.argv[2]}").touch()
while not Path("go").exists():
    time.sleep(0.001)
for number in range(100):
    spec = ConversionSpec(branches=number + 1, seed=int(sys.argv[2]))
    file.append(replace(RUN, spec=spec), 62)
"""


def test_processes_that_write_at_a_time_do_not_mix(file, tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    with open(tmp_path / "said", "wb") as said:
        command = [sys.executable, tmp_path / "writer.py", file.path]
        room = {"cwd": tmp_path, "env": os.environ, "stdout": said, "stderr": said}
        writers = [Forked([*command, seed], **room) for seed in (1, 2)]
        try:
            while len(list(tmp_path.glob("ready-*"))) < 2:
                assert all(writer.poll() is None for writer in writers), failed(tmp_path)
                time.sleep(0.01)
            (tmp_path / "go").touch()
            for writer in writers:
                assert writer.wait(timeout=120) == 0, failed(tmp_path)
        finally:
            for writer in writers:
                writer.kill()
    assert len(file.path.read_bytes().splitlines()) == 200
    assert {(spec.branches, spec.seed) for spec in file.read()} == {
        (branches, seed) for branches in range(1, 101) for seed in (1, 2)
    }


def failed(tmp_path):
    return (tmp_path / "said").read_text()


def test_a_place_where_no_file_can_be(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "runs.jsonl"):
        with pytest.raises(UserError, match="name one in a folder that exists"):
            RunsFile(path, SETTING)
