"""The tab Generations: what it writes, and what it refuses."""

from __future__ import annotations

import math

import gradio as gr
import pytest

from mlpmoe import ConversionSpec, UserError, write_side_by_side
from mlpmoe.explorer.generations import GenerationHandlers, check_writing, writing_report
from mlpmoe.explorer.generations_panel import MAX_NEW_TOKENS, MAX_PROMPT
from mlpmoe.explorer.settings import read_spec
from mlpmoe.measure.generation import Writing
from tests.explorer.calibrated import CALIBRATED, direct
from tests.explorer.controls import controls, settings

SKIPPED = gr.skip()


def test_a_calibrated_model_writes(workbench, demo):
    change = CALIBRATED["refitted"]
    steps = list(GenerationHandlers(workbench).write("demo", *settings(**change), "Hello", 24, 0.0))
    assert steps[0][:2] == (SKIPPED, SKIPPED)
    assert "calibrating" in steps[0][2]
    pair = (demo.model, direct(demo, read_spec(controls(**change))))
    *_, writings = write_side_by_side(pair, demo.tokenizer, "Hello", 24)
    assert steps[-1][:2] == tuple(writing.text.lstrip() for writing in writings)
    assert "down refitted · least-squares order" in steps[-1][2]


def test_write_gives_the_library_s_text(workbench, demo):
    *_, (dense, converted, report) = GenerationHandlers(workbench).write(
        "demo", *settings(branches=6, fade=0.9, keep=4), "Hello", 40, 0.0
    )
    pair = (demo.model, demo.converted(ConversionSpec(branches=6, fade=0.9, keep=4)))
    *_, writings = write_side_by_side(pair, demo.tokenizer, "Hello", 40)
    assert (dense, converted) == tuple(writing.text.lstrip() for writing in writings)
    assert "B 6 · fade 0.90 · K 4, × √(B/K)" in report


def test_writing_streams_and_stops_by_the_clock(workbench, notices, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.generations.UPDATES_PER_SECOND", math.inf)
    monkeypatch.setattr("mlpmoe.explorer.generations.WRITING_SECONDS", 0.0)
    steps = list(GenerationHandlers(workbench).write("demo", *settings(), "Hello", 100, 0.0))
    assert len(steps) == 2
    assert "1 tokens" in steps[-1][2]
    assert notices[0][1].startswith("Stopped after")


def test_a_stopped_writer_leaves_the_weights(workbench, demo, weights_hash, monkeypatch):
    monkeypatch.setattr("mlpmoe.explorer.generations.UPDATES_PER_SECOND", math.inf)
    before = weights_hash(demo.model)
    writer = GenerationHandlers(workbench).write(
        "demo", *settings(fade=0.9, keep=8), "Hello", 100, 0.0
    )
    next(writer)
    writer.close()
    assert weights_hash(demo.model) == before


def test_writing_report(demo):
    spec = ConversionSpec(keep=12)
    same = Writing([5, 6], "ab", 0.5)
    assert "same text, token for token" in writing_report(demo, spec, (same, same))
    other = Writing([5, *demo.tokenizer("<b>").input_ids[1:]], "a<b>", 0.5, finished=True)
    report = writing_report(demo, spec, (same, other))
    assert "from token 2 on" in report
    assert "&lt;" in report
    assert "<b>" not in report
    assert "ended by itself" in report
    assert "K 12" in report


@pytest.mark.parametrize("tokens", [1, 64, MAX_NEW_TOKENS])
@pytest.mark.parametrize("temperature", [0, 0.7, 2, 2.0])
def test_check_writing_lets_good_values_pass(tokens, temperature):
    check_writing("x" * MAX_PROMPT, tokens, temperature)


ODD = [True, False, None, "64", "", math.nan, math.inf, -math.inf, -1, 10**400, [], [8], {}, 1j]


@pytest.mark.parametrize("value", [*ODD, 0, 2.5, 64.0, MAX_NEW_TOKENS + 1])
def test_check_writing_refuses_odd_token_counts(value):
    with pytest.raises(UserError, match="tokens must be a whole number between 1 and"):
        check_writing("Hello", value, 0.0)


@pytest.mark.parametrize("value", [*ODD, 2.01])
def test_check_writing_refuses_odd_temperatures(value):
    with pytest.raises(UserError, match="temperature must be a number between 0 and 2"):
        check_writing("Hello", 8, value)


@pytest.mark.parametrize("value", [None, 3, True, math.nan, ["Hello"], b"Hello", "x" * 10**6])
def test_check_writing_refuses_odd_prompts(value):
    with pytest.raises(UserError, match="must be a text of at most 2,000 characters"):
        check_writing(value, 8, 0.0)


@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_an_empty_prompt_is_refused(workbench, prompt):
    with pytest.raises(UserError, match="prompt is empty"):
        next(GenerationHandlers(workbench).write("demo", *settings(), prompt, 8, 0.0))
