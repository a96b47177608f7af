"""The tab of trade-offs: what it shows of the stored runs, its files, and two runs compared."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from math import inf

import gradio as gr
import pandas
import pytest

from mlpmoe import ConversionSpec, UserError, convert, write_side_by_side
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.plots.tradeoff_plot import LAYERS
from mlpmoe.explorer.shell.links import read_link
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.shell.run_words import short_recipe
from mlpmoe.explorer.shell.shipped import shipped
from mlpmoe.explorer.tabs.runs_table import EMPTY, NOTHING_PINNED
from mlpmoe.explorer.tabs.trade_offs import COMPARED_TOKENS, TradeOffHandlers
from mlpmoe.explorer.tabs.weights import histograms
from mlpmoe.measure.cost.speed import Ratio
from mlpmoe.models import assets_folder, named_calibration
from tests.explorer.calibrated import at_the_end
from tests.explorer.made import made_record

SKIPPED = gr.skip()
ALL = list(LAYERS)
RECORDS = [
    made_record(speed=Ratio(1.25, 1.125, 1.5)),
    made_record(ConversionSpec(keep=3, branches=8), source="sweep", ratio=1.0625),
    made_record(ConversionSpec(method="cmoe", experts=8, active=0.5), source="experts"),
    made_record(ConversionSpec(fade=2.0), perplexity=inf, ratio=inf, stderr=inf, bits_per_byte=inf),
    made_record(model="=cmd()", text="own-0123456789ab"),
    made_record(ConversionSpec(keep=7), text="proxy"),
]


@pytest.fixture
def tab(workbench):
    return TradeOffHandlers(workbench)


def stored(*records: Record, undo: bool = False) -> str:
    runs = [record.to_dict() | {"pinned": record.pinned} for record in records]
    return json.dumps({"runs": runs, "undo": undo})


def drawn(figure, layer: str) -> list[str]:
    """The queries of the runs of a layer."""
    return [
        query
        for trace in figure.data
        if trace.name == LAYERS[layer]
        for query in (trace.customdata if trace.customdata is not None else [])
    ]


# what is shown


def test_the_plot_shows_the_runs_of_this_model_and_text(tab):
    text = stored(*RECORDS, undo=True)
    figure, about, table, undo, clear, comparison, more = tab.show(
        text, "demo", "stories", "nonzero", "perplexity", ALL
    )
    assert set(drawn(figure, "runs")) == {RECORDS[i].query for i in (0, 2, 3)}
    assert drawn(figure, "sweep") == [RECORDS[1].query]
    assert set(drawn(figure, "shipped")) == {record.query for record in shipped("demo")}
    assert "6 runs; 4 of Demo" in about
    assert "on evaluation stories" in about
    assert table.count("<tr") == 1 + len(RECORDS)
    assert undo["interactive"] is True and clear["interactive"] is True
    assert (comparison, more["visible"]) == (NOTHING_PINNED, False)
    figure = tab.show(text, "demo", "proxy", "nonzero", "perplexity", ALL)[0]
    assert drawn(figure, "runs") == [RECORDS[5].query]
    assert len(drawn(figure, "shipped")) == len(shipped("demo"))  # whichever text is chosen
    figure = tab.show(text, "owner/name", "proxy", "nonzero", "perplexity", ALL)[0]
    assert drawn(figure, "shipped") == []  # none of this model


def test_layers_are_left_out(tab):
    for layer in ("runs", "sweep", "shipped"):
        figure = tab.show(stored(*RECORDS), "demo", "stories", "macs", "perplexity", [layer])[0]
        assert [name for name in ("runs", "sweep", "shipped") if drawn(figure, name)] == [layer]
    elsewhere = [
        len(trace.x)
        for layers in (["published"], [])
        for trace in tab.show("", "demo", "stories", "nonzero", "perplexity", layers)[0].data
        if trace.name == LAYERS["published"]
    ]
    assert elsewhere[0] > 0 == elsewhere[1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [1, null]}'])
def test_nothing_stored_is_shown(tab, text):
    figure, about, table, undo, clear, *_ = tab.show(
        text, "demo", "stories", "nonzero", "perplexity", ALL
    )
    assert (about, table) == ("", EMPTY)
    assert undo["interactive"] is False and clear["interactive"] is False
    assert not drawn(figure, "runs")


@pytest.mark.parametrize("axis", ["", "spee", None, "<img>", "__class__"])
def test_an_unknown_axis_is_refused(tab, axis):
    for axes in ((axis, "macs"), ("macs", axis)):
        with pytest.raises(UserError, match="is not measured; choose of perplexity, nonzero"):
            tab.show("", "demo", "stories", *axes, ALL)


def test_names_are_escaped_in_the_sentence(tab):
    hostile = "<img src=x>"
    text = stored(made_record(), made_record(model=hostile))
    about = tab.show(text, hostile, hostile, "macs", "nonzero", ALL)[1]
    assert "&lt;img" in about and "<img" not in about


# files


def test_the_csv_file_holds_the_records(tab):
    content, name = tab.csv(stored(*RECORDS))
    assert name.endswith(".csv")
    table = pandas.read_csv(io.StringIO(content))
    assert len(table) == len(RECORDS)
    for (_, row), record in zip(table.iterrows(), RECORDS, strict=True):
        run = record.run
        for field in ("ratio", "stderr", "perplexity", "bits_per_byte", "nonzero_share",
                      "mlp_nonzero_share", "macs_share", "mlp_macs_share", "nonzero"):  # fmt: skip
            figure = getattr(run, field)
            assert pandas.isna(row[field]) if figure == inf else row[field] == figure
        assert row["dense_perplexity"] == record.dense
        assert (row["tokens"], row["measured"]) == (record.tokens, record.when)
        assert row["recipe"] == short_recipe(run.spec)
        link, notices = read_link(row["link"].removeprefix("?"))
        assert (link.model, link.text, link.spec) == (record.model, record.text, run.spec)
        assert notices == []
        assert row["text"] == record.text
        assert row["method"] == run.spec.method
        if record.speed is None:
            assert pandas.isna(row["speedup"])
        else:
            assert [row["speedup"], row["speedup_low"], row["speedup_high"]] == [1.25, 1.125, 1.5]
        assert pandas.isna(row["keep"]) == (run.spec.keep is None)
    assert table["model"][0] == "demo"
    assert table["model"][4] == "'=cmd()"  # which a spreadsheet would run


def test_the_json_file_holds_the_records(tab):
    content, name = tab.json(stored(*RECORDS))
    assert name.endswith(".json")
    runs = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "runs"
    ]
    assert [Record.from_dict(run) for run in runs] == RECORDS
    assert [run["recipe"] for run in runs] == [short_recipe(r.run.spec) for r in RECORDS]
    assert [run["link"] for run in runs] == [f"?{record.query}" for record in RECORDS]


def test_no_file_without_runs(tab):
    for save in (tab.csv, tab.json):
        with pytest.raises(UserError, match="no runs to save"):
            save("")


# the shipped comparison


def test_the_shipped_comparison_is_that_of_the_file():
    path = assets_folder() / "sweeps" / "demo.jsonl"
    table = pandas.read_json(path, lines=True)
    assert len(shipped("demo")) == len(table) == 63
    assert [record.run.ratio for record in shipped("demo")] == pytest.approx(list(table["ratio"]))
    shares = [record.run.mlp_macs_share for record in shipped("demo")]
    assert shares == pytest.approx(list(table["mlp_macs_share"]))
    specs = list(map(ConversionSpec.from_dict, table["spec"]))
    assert [record.run.spec for record in shipped("demo")] == specs
    assert {record.tokens for record in shipped("demo")} == set(table["tokens"])
    assert {(record.model, record.text) for record in shipped("demo")} == {("demo", "stories")}
    dense = [record.dense for record in shipped("demo")]
    assert dense == pytest.approx([dense[0]] * 63)  # one model, one text
    assert len({record.id for record in shipped("demo")}) == 63


# two runs side by side


def pair(first: ConversionSpec, second: ConversionSpec, **change) -> str:
    """Stored so that the first was measured first."""
    records = [made_record(second, pinned=True, **change), made_record(first, pinned=True)]
    return stored(*records)


def test_two_pinned_runs_write_what_the_library_writes(tab, visitor, demo, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.shell.answer.TURN", 0.0)
    first, second = ConversionSpec(keep=12), ConversionSpec(branches=8, fade=0.9)
    text = pair(first, second)
    assert tab.show(text, "demo", "stories", "macs", "nonzero", ALL)[-1]["visible"] is True
    steps = list(tab.compare(visitor(), text, 1, "up", "Hello"))
    status, seen, *plots, a, b = at_the_end(steps)
    assert status == ""
    assert seen["visible"] is True
    models = tuple(convert(demo.model, spec) for spec in (first, second))
    *_, writings = write_side_by_side(models, demo.tokenizer, "Hello", COMPARED_TOKENS)
    assert (a, b) == tuple(writing.text.lstrip() for writing in writings)
    assert len(steps) > 10  # it can be seen how they grow
    for plot, spec in zip(plots, (first, second), strict=True):
        assert plot["value"] == histograms(demo, spec, 1, "up")


def test_a_routed_and_a_calibrated_run_are_compared(tab, visitor):
    text = pair(ConversionSpec(method="contiguous", experts=8, active=0.5),
                ConversionSpec(keep=12, order="activation"))  # fmt: skip
    steps = list(tab.compare(visitor(), text, 0, "gate", "Hello"))
    assert any("B: calibrating" in step[0] for step in steps if step[0] != SKIPPED)
    _, _, routed, static, a, b = at_the_end(steps)
    assert routed["visible"] is False  # it has no branches
    assert static["visible"] is True
    assert a and b


def test_a_run_is_compared_as_it_was_calibrated(tab, visitor, demo):
    """On another text than the model's own, what is written differs."""
    spec = ConversionSpec(keep=6, order="activation", compensation="mean")
    records = [
        replace(made_record(spec, pinned=at), calibration=calibration)
        for at, calibration in ((1, None), (2, "prose"))
    ]
    *_, (*_, a, b) = (at_the_end(tab.compare(visitor(), stored(*records), 0, "gate", "Hello")),)
    models = [
        convert(demo.model, spec, Calibration.from_text(demo.tokenizer, named_calibration(name)))
        for name in ("stories", "prose")
    ]
    *_, writings = write_side_by_side(tuple(models), demo.tokenizer, "Hello", COMPARED_TOKENS)
    assert (a, b) == tuple(writing.text.lstrip() for writing in writings)
    assert a != b


def test_a_comparison_is_stopped(tab, visitor, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.shell.answer.TURN", 0.0)
    text = pair(ConversionSpec(keep=12), ConversionSpec(keep=3))
    running = tab.compare(visitor(), text, 0, "gate", "Hello")
    seen = [next(running) for _ in range(4)]
    tab.jobs.press_stop(visitor())
    (last,) = running
    assert "Stopped" in last[0]
    assert seen[-1][-1] and last[1:] == (SKIPPED,) * 5  # what is written stays


def test_what_cannot_be_compared_is_said(tab, visitor, gateless_folder):
    with pytest.raises(UserError, match="pin two runs"):
        list(tab.compare(visitor(), stored(made_record(pinned=True)), 0, "gate", "Hello"))
    text = pair(ConversionSpec(keep=12), ConversionSpec(keep=3))
    with pytest.raises(UserError, match="prompt"):
        list(tab.compare(visitor(), text, 0, "gate", "x" * 10**5))
    absent = pair(ConversionSpec(keep=12), ConversionSpec(keep=3), model="owner/absent")
    with pytest.raises(UserError, match="not loaded"):
        list(tab.compare(visitor(), absent, 0, "gate", "Hello"))
    *_, guest = tab.workbench.load(str(gateless_folder))
    other = pair(ConversionSpec(keep=12), ConversionSpec(keep=3), model=guest.key)
    with pytest.raises(UserError, match="different models"):
        list(tab.compare(visitor(), other, 0, "gate", "Hello"))


def test_another_model_sets_layer_and_projection(tab, gateless_folder):
    *_, guest = tab.workbench.load(str(gateless_folder))
    layer, projection = tab.another_model(guest.key)
    assert (layer["maximum"], layer["value"]) == (1, 0)
    assert projection["choices"] == ["up", "down"]


def test_the_record_of_a_pin_is_kept_apart():
    record = made_record()
    assert replace(record, pinned=True).id == record.id
    assert "pinned" not in record.to_dict()
