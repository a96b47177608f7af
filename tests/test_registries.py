"""A new choice is one entry in a registry: everything that lists choices has it at once."""

import re

import gradio as gr
import pytest
import torch

from mlpmoe.__main__ import main
from mlpmoe.core.choices import METHODS, REGISTRIES, STATIC
from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.registry import choices
from mlpmoe.core.routed import ROUTED_METHODS, RoutedMethod
from mlpmoe.core.routed.splits import contiguous
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.compensation import FILLS
from mlpmoe.core.static.schedule import SCHEDULES, Schedule, branch_sparsities
from mlpmoe.explorer.shell.convert_panel import convert_panel
from mlpmoe.explorer.shell.run_words import recipe_of
from mlpmoe.explorer.tabs.sweep_panel import sweep_panel
from mlpmoe.measure.runs.grid import grid
from mlpmoe.measure.words import in_short, in_words
from tests.tiny import tiny_model


@pytest.fixture
def steps(monkeypatch):
    """A schedule that nobody knew of before."""
    entry = Schedule(
        "nothing, then all", "only in the second half",
        part=lambda i, branches, exponent: float(2 * i >= branches),
    )  # fmt: skip
    monkeypatch.setitem(SCHEDULES, "steps", entry)


@pytest.fixture
def halves(monkeypatch):
    """A routed method, likewise."""
    entry = RoutedMethod(
        label="Two halves", about="The first neurons, and the others.", source="a test",
        partition=contiguous, defaults={"experts": 2, "shared": 0.0, "router": "centroid"},
        calibrated=False,
    )  # fmt: skip
    monkeypatch.setitem(ROUTED_METHODS, "halves", entry)


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["evaluate", "sweep", "convert"])
def test_the_command_line_names_new_choices(command, steps, halves, capsys):
    said = help_of(command, capsys)
    for names in (SCHEDULES, METHODS):
        assert ", ".join(names) in said
    assert {"steps", "halves"} <= {*SCHEDULES, *METHODS}


def test_a_new_schedule_converts_and_is_swept_and_worded(steps):
    assert branch_sparsities(4, 1.0, "steps") == [0, 0, 0.75, 0.75]  # the ramp: 0, ¼, ½, ¾
    made = grid({"fade": ["0.5", "1"], "fade_schedule": ["linear", "steps"]})
    assert [spec.fade_schedule for spec in made.specs] == ["linear", "steps"] * 2
    spec = ConversionSpec(branches=4, fade=1.0, fade_schedule="steps")
    assert "only in the second half" in in_words(spec)
    assert ConversionSpec.from_query(spec.to_query()) == spec.canonical() == spec
    zeros = [(mlp.up_proj.weight == 0).sum() for mlp in mlp_modules(convert(tiny_model(), spec))]
    assert all(zeros)


def test_a_new_routed_method_converts_and_is_swept_and_worded(halves):
    made = grid({"method": ["halves", "random"], "active": ["0.5"]})
    spec = made.specs[0]
    assert [s.method for s in made.specs] == ["halves", "random"] and spec.experts == 2
    assert in_short(spec).startswith("Two halves · 50 % active")
    assert recipe_of(spec).startswith("Two halves")
    assert ConversionSpec.from_query(spec.to_query()) == spec
    model = convert(tiny_model(), spec)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    assert [mlp.experts for mlp in mlp_modules(model)] == [2, 2]


def test_the_page_offers_new_choices(steps, halves):
    with gr.Blocks():
        panel, sweep = convert_panel(), sweep_panel()
    assert ("nothing, then all", "steps") in panel.fade_schedule.choices
    assert ("Two halves", "halves") in panel.method.choices
    swept = [choice for c in sweep.values if isinstance(c, gr.Dropdown) for choice in c.choices]
    assert {("nothing, then all", "steps"), ("Two halves", "halves")} <= {*swept}


@pytest.mark.parametrize("registry", [*REGISTRIES.values(), FILLS])
def test_menus_have_one_label_for_each_name_and_a_star_for_what_calibrates(registry):
    menu = choices(registry)
    assert [name for _, name in menu] == list(registry)
    assert len({label for label, _ in menu}) == len(registry)
    for label, name in menu:
        assert label == registry[name].label + " *" * registry[name].calibrated
    assert dict(choices(registry, star="")).keys() == {entry.label for entry in registry.values()}


def test_entries_say_what_they_are():
    for field, registry in (*REGISTRIES.items(), ("compensation", FILLS)):
        for name, entry in registry.items():
            assert entry.label and entry.about and entry.short, (field, name)
            assert entry.about.endswith(".") == (field == "method")
    assert METHODS["mlpmoe"] is STATIC
