"""Runs of a file that the shell wrote, on the page: what becomes of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import gradio as gr
import pytest

from mlpmoe import ConversionSpec, UserError
from mlpmoe.explorer.shell import imported
from mlpmoe.explorer.shell.imported import imported_records
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.explorer.tabs.trade_offs import TradeOffHandlers
from mlpmoe.measure.runs.file import RunsFile
from mlpmoe.models import assets_folder
from tests.explorer.made import made_run
from tests.explorer.test_scores_table import SCORES

SETTING = {
    "model": "demo", "dtype": "float32", "text": "stories ba8d54c29337",
    "calibration": "stories f12b7fce15e4", "protocol": "documents", "window": 512, "stride": 512,
}  # fmt: skip
RUN = replace(made_run(), tasks=SCORES)
CALIBRATED = ConversionSpec(method="cmoe", active=0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.jsonl"


def written(path, *runs, **setting):
    for run in runs:
        RunsFile(path, SETTING | setting).append(run, 3563)
    return imported_records(path)


def test_a_run_is_a_record(path):
    (record,), left_out = written(path, RUN)
    assert left_out == 0
    assert (record.model, record.text, record.tokens) == ("demo", "stories", 3563)
    assert (record.run, record.source, record.pinned) == (RUN, "sweep", 0)
    assert record.dense == pytest.approx(RUN.perplexity / RUN.ratio)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_files_that_come_with_the_project():
    for model in ("demo", "smollm2-135m"):
        records, left_out = imported_records(assets_folder() / "sweeps" / f"{model}.jsonl")
        assert left_out == 0
        assert {record.run for record in records} == {record.run for record in shipped(model)}


def test_texts_have_the_keys_of_the_page(path):
    """A file of one's own has the key that it gets when it is pasted there."""
    (record,), _ = written(
        path,
        made_run(CALIBRATED),
        text="mine.txt 0123456789ab",
        calibration="my own.txt 123456abcdef",
    )
    assert (record.text, record.calibration) == ("own-0123456789ab", "own-123456abcdef")
    assert "text=own-0123456789ab" in record.query
    assert "calibration=own-123456abcdef" in record.query


def test_a_calibration_text_matters_where_it_is_looked_at(path):
    records, _ = written(path, made_run(), made_run(CALIBRATED), calibration="prose f12b7fce15e4")
    assert [record.calibration for record in records] == [None, "prose"]


def test_models_by_their_label_or_folder(path):
    written(path, RUN, model="Demo")
    records, _ = written(path, RUN, model="./mine")
    assert [record.model for record in records] == ["demo", "./mine"]


def test_the_later_line_of_a_run_counts(path):
    others = [made_run(ConversionSpec(keep=k)) for k in (1, 2)]
    records, left_out = written(path, made_run(), *others, RUN)
    assert ([record.run for record in records], left_out) == ([*others, RUN], 0)


def test_the_last_runs_are_kept(path, monkeypatch):
    monkeypatch.setattr(imported, "MOST_RECORDS", 2)
    runs = [made_run(ConversionSpec(keep=k)) for k in (1, 2, 3)]
    assert [record.run for record in written(path, *runs)[0]] == runs[1:]


def test_what_cannot_be_read_is_counted(path):
    broken = replace(made_run(ConversionSpec(keep=1)), perplexity=inf, ratio=inf, stderr=inf)
    written(path, RUN)
    with path.open("ab") as file:
        for line in (b"{", b"5", b"\xff", b"", b"[" * 10**5, b'{"spec": {}}'):
            file.write(line + b"\n")
    records, left_out = written(path, broken)
    assert ([record.run for record in records], left_out) == ([RUN], 6)


@pytest.mark.parametrize("name", ["model", "text", "tokens", "calibration"])
@pytest.mark.parametrize("value", [None, 5, "", [], {"a": 1}], ids=repr)
def test_odd_settings_are_no_server_error(path, name, value):
    entry = SETTING | {"tokens": 62} | made_run(CALIBRATED).to_dict() | {name: value}
    path.write_text(json.dumps(entry), encoding="utf-8")
    try:
        ((record,), _) = imported_records(path)
    except UserError as error:
        assert str(error) == imported.NO_RUNS
    else:
        assert Record.from_dict(record.to_dict()) == record


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no runs", b"\x00\x01"])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match="this file holds no runs"):
        imported_records(path)


def test_the_tab_opens_a_file(path, workbench, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Info", said.append)
    tab = TradeOffHandlers(workbench)
    assert tab.open_file(None) == gr.skip()
    written(path, RUN, made_run(ConversionSpec(keep=3)))
    found = [Record.from_dict(entry) for entry in json.loads(tab.open_file(str(path)))]
    assert [record.run for record in found] == [RUN, made_run(ConversionSpec(keep=3))]
    assert said == ["2 runs read from runs.jsonl."]
    with path.open("a") as file:
        file.write("?")
    tab.open_file(str(path))
    assert said[1] == "2 runs read from runs.jsonl; 1 line without a usable run."
