"""Runs that a browser keeps: whatever it sends back is read, and good runs survive bad ones."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import ConversionSpec, UserError, parameter_report
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.explorer.shell.links import read_link
from mlpmoe.explorer.shell.records import (
    LONGEST_NAME,
    MOST_RECORDS,
    SOURCES,
    Record,
    measured_record,
    pinned,
    read_records,
    write_records,
)
from mlpmoe.explorer.tabs.runs_table import comparison_table, runs_table
from mlpmoe.measure.cost.speed import Ratio
from mlpmoe.models import assets_folder, named_text
from tests.core.specs import static_specs
from tests.explorer.calibrated import direct
from tests.explorer.made import FIGURES, made_record

INFINITE = {"perplexity": math.inf, "ratio": math.inf, "stderr": math.inf,
            "bits_per_byte": math.inf}  # fmt: skip
GOOD = [
    made_record(),
    made_record(ConversionSpec(method="cmoe", experts=8, active=0.5), source="experts"),
    made_record(ConversionSpec(fade=2.0, keep=1), **INFINITE),
    made_record(model="owner/n<a>me&=", text="own-0123456789ab", speed=Ratio(1.1, 1.0, 1.2)),
    made_record(ConversionSpec(branches=8), source="sweep", pinned=1_764_100_000_000),
]


def stored(runs: list, undo: bool = False) -> str:
    """As page.js sends it."""
    return json.dumps({"runs": runs, "undo": undo})


def entry(record: Record) -> dict:
    """As page.js keeps it."""
    return record.to_dict() | {"pinned": record.pinned}


@pytest.mark.parametrize("record", GOOD, ids=lambda record: record.query)
def test_a_record_survives_the_browser(record):
    text = stored([entry(record)], undo=True)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_records(text) == ([record], True)


figures = st.floats(1e-6, 1e12)


@given(
    static_specs(64), figures, figures | st.just(math.inf), figures | st.just(math.inf),
    st.none() | st.builds(Ratio, figures, figures, figures), st.sampled_from(SOURCES),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=LONGEST_NAME),
)  # fmt: skip
def test_any_record_survives_the_browser(spec, dense, ratio, stderr, speed, source, name):
    record = made_record(
        spec, dense=dense, ratio=ratio, stderr=stderr, speed=speed, source=source, model=name,
    )  # fmt: skip
    (found,) = read_records(stored([entry(record)]))[0]
    assert found == record
    assert found.id == record.id


def test_written_records_are_what_page_js_adds():
    written = json.loads(write_records(GOOD))
    assert [Record.from_dict(e) for e in written] == [replace(r, pinned=0) for r in GOOD]
    for written_entry, record in zip(written, GOOD, strict=True):
        assert written_entry["id"] == record.id
        assert isinstance(written_entry["run"]["spec"], str)
        assert "pinned" not in written_entry  # which only the browser knows


def test_ids_are_those_of_the_runs_that_were_stored_before():
    record = made_record(ConversionSpec(branches=16, fade=0.9, keep=12))
    query = "model=demo&branches=16&fade=0.9&keep=12&text=stories"
    assert record.query == query
    assert record.id == sha256(query.encode()).hexdigest()[:12] == "34bccf287d40"
    same = made_record(record.run.spec, dense=3.0, when="2027-01-01T00:00:00Z", source="sweep",
                       ratio=9.0, speed=Ratio(1, 1, 1), tokens=5, pinned=3)  # fmt: skip
    assert same.id == record.id  # measured again it takes the old one's place
    others = [
        replace(record, model="owner/name"),
        replace(record, text="proxy"),
        made_record(ConversionSpec(branches=16, fade=0.9, keep=11)),
    ]
    assert len({r.id for r in [record, *others]}) == 4


def test_a_calibration_text_belongs_to_a_run():
    """Another one makes another run; that of the model's kind need not be named."""
    spec = ConversionSpec(keep=12, order="activation")
    usual = made_record(spec)
    assert replace(usual, calibration="stories").id == usual.id
    assert "calibration" not in usual.query
    other = replace(usual, calibration="own-0123456789ab")
    assert other.id != usual.id
    link, notices = read_link(other.query)
    assert (link.calibration, notices) == ("own-0123456789ab", [])
    assert read_records(stored([entry(other), entry(usual)])) == ([other, usual], False)
    before = entry(usual)  # as it was stored when there was one text
    del before["calibration"]
    assert read_records(stored([before])) == ([usual], False)


def test_a_record_restores_its_run():
    for record in GOOD:
        link, notices = read_link(record.query)
        assert (link.model, link.text, link.spec) == (record.model, record.text, record.run.spec)
        assert notices == []


NESTED = "[" * 200_000
BROKEN = [
    "", "{", "null", "[]", "5", "true", '"runs"', "{}", '{"runs": null}', '{"runs": 5}',
    '{"runs": "all"}', '{"runs": {"a": 1}}', '{"undo": [1]}', "NaN", "Infinity", NESTED,
    f'{{"runs": {NESTED}', "9" * 10**5, "\ud800", "\0", "x" * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("text", [*BROKEN, None], ids=lambda text: repr(text)[:16])
def test_what_is_no_list_of_runs_is_none(text):
    assert read_records(text)[0] == []


def changed(**change) -> dict:
    return entry(GOOD[4]) | change


def run_changed(**change) -> dict:
    values = entry(GOOD[4])
    return values | {"run": values["run"] | change}


BAD_ROWS = [
    None, 5, "run", [], {}, [1, 2], {"run": {}}, {"id": "x"}, True, [[["model", "demo"]]],
    changed(model=None), changed(model=""), changed(model=5), changed(model="m" * 501),
    changed(model="\ud800"), changed(text="\udfff"), changed(text=["stories"]), changed(text=""),
    changed(tokens="many"), changed(tokens=0), changed(tokens=-3), changed(tokens=math.inf),
    changed(tokens=math.nan), changed(tokens=None), changed(dense=math.nan), changed(dense="x"),
    changed(dense=None), changed(dense=math.inf), changed(dense=10**400), changed(dense=0),
    changed(dense=-1), changed(when=None), changed(when="yesterday"), changed(when=5),
    changed(when="<img src=x>"), changed(when="2026-13-45T00:00:00Z"), changed(source="me"),
    changed(source=None), changed(source=["measured"]), changed(source={}), changed(speed=5),
    changed(speed={"median": 1}), changed(speed="fast"), changed(speed={"median": "x"}),
    changed(speed={"median": 1, "low": 1, "high": 1, "more": 1}), changed(run=None),
    changed(speed={"median": math.nan, "low": 1, "high": 1}), changed(run="x"), changed(run=[]),
    run_changed(spec=None), run_changed(spec=5), run_changed(spec="fade=9"),
    run_changed(spec="branches=x"), run_changed(spec="colour=red"), run_changed(spec={}),
    run_changed(spec="branches=16&" + "x" * 10**5), run_changed(ratio="x"),
    run_changed(ratio=-1), run_changed(ratio=math.nan), run_changed(ratio=0),
    run_changed(nonzero=1.5), run_changed(nonzero=None), run_changed(nonzero_share=math.inf),
    run_changed(nonzero_share=0), run_changed(mlp_nonzero_share=0), run_changed(macs_share=0),
    run_changed(mlp_macs_share=math.nan), run_changed(perplexity=[1]),
    run_changed(macs_per_token=True), changed(calibration=5), changed(calibration=["prose"]),
    changed(calibration="\ud800"), changed(calibration="c" * 501),
]  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: str(row)[-40:])
def test_a_bad_row_is_left_out_and_the_good_ones_stay(row):
    rows = [entry(GOOD[0]), row, entry(GOOD[1])]
    assert read_records(stored(rows)) == (GOOD[:2], False)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
paths = st.sampled_from([*entry(GOOD[3]), *(f"run.{name}" for name in ["spec", *FIGURES]),
                         "speed.median", "speed.low"])  # fmt: skip


@given(paths, json_values)
def test_whatever_stands_in_a_row_nothing_breaks_that_is_drawn_of_it(path, value):
    row = json.loads(json.dumps(entry(GOOD[3])))
    *outer, name = path.split(".")
    (row[outer[0]] if outer else row)[name] = value
    records, _ = read_records(stored([row, entry(GOOD[4])]))
    assert GOOD[4] in records
    runs_table(records)
    comparison_table(records[:2])
    json.loads(stored([entry(record) for record in records]))


def test_at_most_so_many_records_the_newest():
    records = [made_record(ConversionSpec(branches=64, keep=k), tokens=t)
               for t in range(1, 7) for k in range(1, 65)]  # fmt: skip
    records = [replace(r, text="proxy" if i % 2 else "stories") for i, r in enumerate(records)]
    unique = list({r.id: r for r in reversed(records)}.values())[::-1]
    assert len(unique) < MOST_RECORDS < len(records)
    found, _ = read_records(stored([entry(r) for r in records]))
    assert len(found) == len({r.id for r in records[:MOST_RECORDS]})
    many = [made_record(model=f"m{i}") for i in range(MOST_RECORDS + 20)]
    assert read_records(stored([entry(r) for r in many]))[0] == many[:MOST_RECORDS]
    script = (assets_folder() / "page.js").read_text(encoding="utf-8")
    assert int(re.search(r"MOST_RUNS = (\d+)", script)[1]) == MOST_RECORDS


def test_of_two_rows_of_a_run_the_newer_counts():
    newer, older = made_record(tokens=7), made_record(tokens=5)
    assert read_records(stored([entry(newer), entry(older)]))[0] == [newer]


def test_pinned_runs_come_in_the_order_in_which_they_were_pinned():
    third, first, second = (
        made_record(ConversionSpec(keep=k), pinned=at) for k, at in ((3, 30), (1, 10), (2, 20))
    )  # fmt: skip
    other = made_record(ConversionSpec(keep=9))
    assert pinned([third, other, first]) == [first, third]
    assert pinned([other, third]) == [third]
    assert pinned([third, second, first]) == [second, third]
    assert pinned([other]) == pinned([]) == []
    # page.js keeps the moment at which it was pinned
    (found,), _ = read_records(stored([entry(third) | {"pinned": 1764100000000}]))
    assert found.pinned == 1764100000000


def test_a_measured_record_is_what_the_library_measures(demo):
    spec = ConversionSpec(branches=6, fade=0.9, keep=4)
    with pytest.raises(AttributeError):
        measured_record(demo, spec, "proxy")  # nothing was measured yet
    *_, _ = demo.evaluate(spec, "proxy")
    before = datetime.now(UTC).replace(microsecond=0)
    record = measured_record(demo, spec, "proxy", "suggest")
    assert before <= datetime.fromisoformat(record.when) <= datetime.now(UTC)
    assert record.when.endswith("Z")
    converted = direct(demo, spec)
    measured, dense = (
        measure_perplexity(m, demo.tokenizer, named_text("proxy")) for m in (converted, demo.model)
    )
    assert (record.model, record.text, record.source) == ("demo", "proxy", "suggest")
    assert record.tokens == dense.tokens
    assert record.dense == pytest.approx(dense.value)
    assert record.run.ratio == pytest.approx(measured.value / dense.value)
    reports = [parameter_report(m) for m in (converted, demo.model)]
    counted = ("nonzero", "mlp_nonzero", "macs_per_token", "mlp_macs_per_token")
    shares = [getattr(reports[0], name) / getattr(reports[1], name) for name in counted]
    run = record.run
    assert [run.nonzero_share, run.mlp_nonzero_share, run.macs_share, run.mlp_macs_share] == (
        pytest.approx(shares)
    )
    assert record.speed is None
    *_, speed = demo.speed(spec)
    assert measured_record(demo, spec, "proxy").speed == speed.speedup


def test_from_dict_says_what_is_wrong():
    with pytest.raises(UserError, match="not a run that was measured here"):
        Record.from_dict({"model": "demo"})
