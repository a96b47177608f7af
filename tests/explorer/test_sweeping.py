"""A sweep on the page: what it plans, what it measures, and what is left when it stops."""

from __future__ import annotations

import json
import re
import shlex
import threading
from itertools import product
from time import sleep

import gradio as gr
import pytest

from mlpmoe import ConversionSpec, UserError, named_text
from mlpmoe import perplexity as measure_perplexity
from mlpmoe.core import conversion
from mlpmoe.core.stopping import may_stop
from mlpmoe.explorer.server import loaded
from mlpmoe.explorer.shell.records import Record
from mlpmoe.explorer.shell.settings import read_spec
from mlpmoe.explorer.tabs import sweeping
from mlpmoe.explorer.tabs.sweep_panel import (
    CHOSEN,
    ROUTED,
    ROUTED_CHOSEN,
    ROUTED_WRITTEN,
    STATIC,
    WRITTEN,
)
from mlpmoe.explorer.tabs.sweeping import SENT_AGAIN, SweepHandlers
from mlpmoe.measure.runs.grid import grid, read_values
from tests.explorer.asking import SOON
from tests.explorer.calibrated import direct
from tests.explorer.controls import controls
from tests.explorer.made import made_record

SKIPPED = gr.skip()
FIRST = {"method": ["mlpmoe"]} | {
    f"{prefix}{name}": entry[at]
    for prefix, entries, at in (
        ("", WRITTEN, 1), ("", CHOSEN, 2), ("routed_", ROUTED_WRITTEN, 1),
        ("routed_", ROUTED_CHOSEN, 2),
    )
    for name, entry in entries.items()
}  # fmt: skip
KEYS = ("method", *STATIC, *(f"routed_{name}" for name in ROUTED))


@pytest.fixture
def tab(workbench):
    return SweepHandlers(workbench)


def fields(**change) -> tuple:
    """The values of the controls; what routed methods have of their own begins with "routed"."""
    assert set(change) <= set(KEYS) == set(FIRST)
    return tuple((FIRST | change)[name] for name in KEYS)


def one(**change) -> tuple:
    """A sweep of a single spec, but for the changes."""
    single = {"branches": "8", "fade": "0", "keep": "all", "routed_active": "0.5"}
    return fields(**single | change)


def stored(*records: Record) -> str:
    return json.dumps({"runs": [record.to_dict() for record in records]})


def plan(tab, values, text="proxy", keeps="") -> str:
    sentence, _ = tab.plan("demo", text, keeps, *values)
    return re.sub(r"<[^>]*>", "", sentence)


def records_of(steps) -> list[Record]:
    """All that was sent, the same run once."""
    found = {}
    for _, new in steps:
        if new != SKIPPED:
            found |= {e["id"]: Record.from_dict(e) for e in json.loads(new)}
    return list(found.values())


# the plan


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({}, 1),
        ({"branches": "8, 16, 32"}, 3),
        ({"branches": "8,16", "fade": "0:0.9:0.3"}, 8),
        ({"keep": "4, 6, all"}, 3),
        ({"keep": "50%, 4"}, 1),  # 4 of 8, twice
        ({"keep": "all, 8"}, 1),
        ({"keep": "4", "compensation": ["sqrt", "none", "refit"]}, 3),
        ({"compensation": ["sqrt", "none"]}, 1),  # nothing is dropped
        ({"keep": "4", "order": ["contiguous", "norm"], "progressive": ["false", "true"]}, 2),
        ({"keep": "4", "allocation": ["uniform", "sensitivity"]}, 2),
        ({"allocation": ["uniform", "sensitivity"]}, 1),
        ({"fade": "0.5", "fade_schedule": ["linear", "uniform"], "fade_score": ["magnitude"]}, 2),
        ({"progressive": ["false", "true"]}, 1),  # nothing looks at activations
        ({"method": ["random"]}, 1),
        ({"method": ["random"], "keep": "", "order": []}, 1),  # which are of no use to it
        ({"method": ["random", "cmoe", "neurons"], "routed_active": "0.75, 0.5"}, 6),
        ({"method": ["random", "mlpmoe"], "branches": "4, 8", "routed_experts": "8, 16"}, 4),
        ({"method": ["random", "neurons"], "routed_experts": "8, 16"}, 3),
        ({"method": ["random"], "routed_shared": "0, 0.25"}, 2),
        ({"method": ["neurons"], "routed_router": ["gate", "gate-norm"],
          "routed_selection": ["topk", "threshold"]}, 4),
        ({"method": ["inputs"], "routed_router": ["inputs", "inputs-norm", "inputs-gate"]}, 3),
        ({"method": ["neurons"], "routed_active": "1", "routed_compensation": ["none", "mean"]}, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_plan_counts_what_differs(tab, change, runs):
    said = plan(tab, one(**change))
    assert said.startswith(f"{runs} run{'s' if runs > 1 else ''}")
    measured = records_of(tab.sweep_of(one(**change))) if runs == 1 else None
    assert measured is None or len(measured) == 1


@pytest.fixture(autouse=True)
def sweep_of(monkeypatch, visitor):
    """All steps of a sweep on the demo model and the proxy text."""
    monkeypatch.setattr(
        SweepHandlers, "sweep_of",
        lambda self, values, keeps="", text="proxy", session="a": self.sweep(
            visitor(session), "demo", text, keeps, *values
        ),
        raising=False,
    )  # fmt: skip


def test_the_first_values_make_the_plan_that_one_would_expect(tab):
    """B 8, 16, 32, each with all, three quarters and half of its branches."""
    said = plan(tab, fields())
    assert said.startswith("9 runs, about ")
    assert "calibrate" not in said
    assert "left out" not in said


def test_combinations_with_more_kept_than_there_are_are_left_out(tab):
    said = plan(tab, one(branches="4, 8", keep="2, 6"))
    pairs = [(b, k) for b, k in product((4, 8), (2, 6)) if k <= b]
    assert said.startswith(f"{len(pairs)} runs")
    assert "1 combinations with K above B left out" in said


def test_the_plan_says_what_calibrates_and_what_reads_a_text(tab):
    assert "1 that calibrate first" in plan(tab, one(keep="4", order=["norm", "activation"]))
    assert "the text is read first" in plan(tab, one(), text="wikitext2")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"branches": "eight"}, "branches must be a whole number or a range"),
        ({"branches": ""}, "branches"),
        ({"branches": "0"}, "at least 1"),
        ({"branches": "8:64"}, "branches must be"),
        ({"branches": "1:10000000:1"}, "values"),
        ({"branches": "49"}, "48 neurons"),
        ({"branches": "65"}, "at most 64"),
        ({"branches": "1:48:1", "keep": "1:10:1"}, "takes up to 250 at a time"),
        ({"fade": "nan"}, "fade"),
        ({"fade": "3"}, "between 0 and 2"),
        ({"fade": "<img src=x>"}, "fade must be"),
        ({"keep": "101%"}, "percentage"),
        ({"keep": "9"}, "above its branches"),
        ({"method": []}, "choose a method"),
        ({"method": None}, "choose a method"),
        ({"method": ["magic"]}, "must be one of"),
        ({"method": ["random"], "routed_active": "0"}, "active"),
        ({"method": ["random"], "routed_active": "0.01"}, "at least 0.05"),
        ({"method": ["random"], "routed_experts": "1"}, "at least 2"),
        ({"method": ["random"], "routed_experts": "129"}, "at most 128"),
        ({"method": ["random"], "routed_shared": "0.9"}, "at most"),
        ({"method": ["neurons"], "routed_experts": "8"}, "does not belong"),
        ({"method": ["random"], "routed_router": ["gate"]}, "must be one of"),
        ({"order": []}, "rder has no value"),
        ({"order": None}, "rder has no value"),
        ({"order": ["<b>"]}, "must be one of"),
        ({"fade_unit": ["4:2"]}, "n must be at least 1"),
    ],
    ids=str,
)
def test_bad_values_are_said_in_a_sentence(tab, visitor, change, reason):
    sentence, shell = tab.plan("demo", "proxy", "", *one(**change))
    assert shell == SKIPPED
    assert sentence.startswith('<p class="problem">')
    said = sentence.removeprefix('<p class="problem">').removesuffix("</p>")
    assert reason.lower() in said.lower()
    assert "<" not in said
    assert said[0].isupper()
    assert len(said) < 300
    with pytest.raises(UserError):
        next(tab.sweep_of(one(**change)))


def test_routed_methods_come_as_their_authors_have_them(tab, demo):
    """What is left empty is the method's own choice; and they are measured like others."""
    values = one(method=["contiguous", "mlpmoe", "cmoe"], routed_active="0.5")
    specs = [
        ConversionSpec(branches=8),
        ConversionSpec(method="contiguous", active=0.5),
        ConversionSpec(method="cmoe", active=0.5),
    ]
    records = records_of(tab.sweep_of(values))
    assert [record.run.spec for record in records] == specs
    for record in records:
        expected = measure_perplexity(
            direct(demo, record.run.spec), demo.tokenizer, named_text("proxy")
        )
        assert record.run.perplexity == pytest.approx(expected.value, rel=1e-4)
    assert "3 runs, 3 of them measured before" in plan(tab, values, keeps=stored(*records))


def test_an_unknown_text_is_said_and_not_swept(tab):
    sentence, _ = tab.plan("demo", "nothing", "", *one())
    assert "No text is called" in sentence
    with pytest.raises(UserError, match="no text is called"):
        list(tab.sweep_of(one(), text="nothing"))


# the sweep


def test_runs_come_as_records_and_are_the_library_s(tab, demo):
    values = one(branches="4, 8", keep="50%", fade="0, 0.9")
    steps = list(tab.sweep_of(values))
    records = records_of(steps)
    specs = [ConversionSpec(branches=b, keep=b // 2, fade=f) for b in (4, 8) for f in (0.0, 0.9)]
    assert [record.run.spec for record in records] == specs
    assert {(r.model, r.text, r.source) for r in records} == {("demo", "proxy", "sweep")}
    for record in records:
        expected = measure_perplexity(
            direct(demo, record.run.spec), demo.tokenizer, named_text("proxy")
        )
        assert record.run.perplexity == pytest.approx(expected.value, rel=1e-6)
    statuses = [re.sub(r"<[^>]*>", "", step[0]) for step in steps if step[0] != SKIPPED]
    numbers = [int(n) for s in statuses for n in re.findall(r"^Run (\d) of 4", s)]
    assert numbers == sorted(numbers) and set(numbers) == {1, 2, 3, 4}
    assert re.match(r"Done: 4 measured in \d+ s, 0 were there before", statuses[-1])
    assert [s for s in statuses if " left" in s]  # from the second run on
    sent = [json.loads(new) for _, new in steps if new != SKIPPED]
    assert [len(some) for some in sent] == [1, 2, 3, 4]  # one message may be passed over
    assert SENT_AGAIN >= 2


def test_what_was_measured_before_is_not_measured_again(tab, demo, monkeypatch):
    values = one(branches="4, 8", keep="all, 2")
    known = records_of(tab.sweep_of(values))[:3]
    other = made_record(ConversionSpec(branches=8, keep=2))  # on another text
    keeps = stored(*known, other)
    assert "4 runs, 3 of them measured before" in plan(tab, values, keeps=keeps)
    evaluated, original = [], type(demo).evaluate
    monkeypatch.setattr(
        type(demo), "evaluate",
        lambda self, asked, text: evaluated.append(asked) or original(self, asked, text),
    )  # fmt: skip
    steps = list(tab.sweep_of(values, keeps))
    assert evaluated == [ConversionSpec(branches=8, keep=2)]
    assert [record.run.spec for record in records_of(steps)] == evaluated
    assert "1 measured" in steps[-1][0] and "3 were there before" in steps[-1][0]
    evaluated.clear()
    everything = stored(*known, *records_of(steps))
    assert "nothing" in list(tab.sweep_of(values, everything))[-1][0]
    assert evaluated == []


def test_what_the_sliders_measured_counts_as_measured(tab):
    """The controls and the sweep write the same conversion in the same way."""
    for change in (
        {}, {"keep": 8}, {"keep": 8, "compensation": "none"}, {"compensation": "refit"},
        {"fade": 0.5}, {"fade": 0.5, "compensation": "refit"}, {"order": "norm"},
        {"fade": 0.5, "fade_schedule": "uniform", "fade_projections": ["gate", "down"]},
        {"fade": 0.5, "fade_unit": "neuron"}, {"fade_unit": "2:4", "fade_score": "wanda"},
        {"keep": 8, "allocation": "sensitivity", "progressive": True, "order": "activation"},
        {"allocation": "sensitivity"}, {"fade_score": "wanda"},
        {"method": "cmoe", "active": 0.5},
        {"method": "random", "active": 0.5, "experts": 8, "own_share": False, "shared": 0.25},
        {"method": "neurons", "active": 0.5, "router": "gate-norm", "fill": "mean"},
    ):  # fmt: skip
        swept = {}
        for name, value in change.items():
            value = "-".join(value) if isinstance(value, list) else str(value).lower()
            name = {"fill": "compensation"}.get(name, name)
            if name == "method":
                swept |= {"method": [value], "routed_experts": "8" if value == "cmoe" else ""}
            elif "method" not in change:
                swept[name] = [value] if name in CHOSEN else value
            elif name != "own_share":
                swept[f"routed_{name}"] = [value] if name in ROUTED_CHOSEN else value
        if change.get("method") == "cmoe":
            change = change | {"experts": 8}
        known = made_record(read_spec(controls(**change)), text="proxy")
        said = plan(tab, fields(**{"branches": "16", "keep": "all"} | swept), keeps=stored(known))
        assert said.startswith("1 run, 1 of them measured before"), (change, said)


def test_closed_in_the_middle_it_keeps_what_was_sent(tab, visitor, demo, weights_hash):
    before = weights_hash(demo.model)
    steps, seen = tab.sweep_of(one(branches="4, 8, 16")), []
    for step in steps:
        seen.append(step)
        if len(records_of(seen)) == 2:
            break
    steps.close()
    found = records_of(seen)
    assert [record.run.spec.branches for record in found] == [4, 8]
    assert tab.jobs.of(visitor()) is None
    assert weights_hash(demo.model) == before
    rest = list(tab.sweep_of(one(branches="4, 8, 16"), stored(*found)))
    assert [record.run.spec.branches for record in records_of(rest)] == [16]


def test_stop_keeps_what_is_measured_and_is_for_one_visitor(tab, visitor):
    assert tab.jobs.press_stop(visitor()) == ""  # nothing is under way
    seen, steps = [], tab.sweep_of(one(branches="4, 8, 16"))
    while not records_of(seen):
        seen.append(next(steps))
    assert tab.jobs.press_stop(visitor("other")) == ""
    assert "topping" in tab.jobs.press_stop(visitor())
    seen += steps
    assert len(records_of(seen)) == 1
    assert "Stopped: 1 measured" in seen[-1][0]
    assert "2 left" in seen[-1][0]
    assert "Done: 3" in list(tab.sweep_of(one(branches="4, 8, 16")))[-1][0]


def endless(*_):
    """Work that ends only where it is stopped."""
    for _ in range(SOON * 1000):
        may_stop()
        sleep(1e-3)
    raise AssertionError("not stopped")


@pytest.mark.parametrize("place", ["layer", "window"])
def test_stop_ends_a_run_within_a_layer_and_a_window(
    tab, visitor, demo, monkeypatch, weights_hash, place
):
    before, threads = weights_hash(demo.model), threading.active_count()
    seen, steps = [], tab.sweep_of(one(branches="4, 8, 16", keep="50%", order=["activation"]))
    while not records_of(seen):
        seen.append(next(steps))
    if place == "layer":
        monkeypatch.setattr(conversion, "convert_mlp", endless)
    else:
        monkeypatch.setattr(loaded, "token_losses", endless)
    while not any("Run 2 of 3" in status for status, _ in seen if status != SKIPPED):
        seen.append(next(steps))
    tab.jobs.press_stop(visitor())
    seen += steps
    assert len(records_of(seen)) == 1
    assert "Stopped: 1 measured" in seen[-1][0]
    assert weights_hash(demo.model) == before
    assert threading.active_count() == threads


def test_the_time_left_is_said_from_the_first_run_on(tab, demo, monkeypatch):
    """As the plan has it, and then as the runs so far have it, less what has passed of this one."""
    monkeypatch.setattr(type(demo), "tokens_per_second", demo.plan("proxy").tokens / 40)
    now = [0.0]
    monkeypatch.setattr(sweeping, "monotonic", lambda: now[0])
    assert "3 runs, about 2 min" in plan(tab, one(branches="4, 8, 16"))
    left = []
    for status, new in tab.sweep_of(one(branches="4, 8, 16")):
        if new != SKIPPED:
            now[0] += 10  # measuring takes so long
        elif found := re.search(r"Run (\d) of 3, (.*) left", status):
            left.append(found.groups())
    assert list(dict.fromkeys(left)) == [
        ("1", "about 2 min"), ("2", "about 20 s"), ("3", "about 10 s")
    ]  # fmt: skip


def test_a_calibrated_run_is_swept(tab, demo):
    steps = list(tab.sweep_of(one(keep="4", order=["activation"])))
    assert any("calibrating" in status for status, _ in steps if status != SKIPPED)
    (record,) = records_of(steps)
    asked = demo.asked(ConversionSpec(branches=8, keep=4, order="activation"))
    assert record.run == demo.run(asked, "proxy")


def test_an_unloaded_model_is_said(tab, visitor):
    for call in (tab.plan, lambda *v: next(tab.sweep(visitor(), *v))):
        with pytest.raises(UserError, match="not loaded"):
            call("owner/absent", "proxy", "", *one())


# the shell


@pytest.mark.parametrize(
    "change",
    [
        {"fade": "0:0.9:0.3", "keep": "all, 75%", "compensation": ["sqrt", "refit"]},
        {"method": ["random", "neurons", "cmoe"], "routed_experts": "8, 16"},
        {"method": ["mlpmoe", "moefication"], "keep": "50%", "compensation": ["none"],
         "routed_active": "0.5:0.9:0.1", "routed_compensation": ["none", "mean"]},
    ],
    ids=str,
)  # fmt: skip
def test_the_shell_sweeps_the_same_specs(tab, change):
    """In a command for static methods, and one for routed ones."""
    values, found = fields(**change), set()
    _, code = tab.plan("demo", "proxy", "", *values)
    commands = [shlex.split(c) for c in code.replace("\\\n", " ").splitlines()]
    methods = change.get("method", ["mlpmoe"])
    assert len(commands) == len({method == "mlpmoe" for method in methods})
    for words in commands:
        assert words[:5] == ["python", "-m", "mlpmoe", "sweep", "demo"]
        flags = dict(zip(words[5::2], words[6::2], strict=True))
        assert (flags.pop("--text"), flags.pop("--out")) == ("proxy", "runs.jsonl")
        names = {flag.removeprefix("--").replace("-", "_"): text for flag, text in flags.items()}
        written = grid({name: read_values(name, text) for name, text in names.items()})
        found |= {spec.canonical() for spec in written.specs}
    planned = tab._plan(tab.workbench.loaded("demo"), "proxy", "", values)
    assert found == set(planned.missing)


def test_the_shell_line_of_an_own_text_names_a_file(tab):
    key = tab.workbench.texts.add("A text of a visitor, long enough to be one.")
    _, code = tab.plan("demo", key, "", *one())
    assert "--text mine.txt" in code
