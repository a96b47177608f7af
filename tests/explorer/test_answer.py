"""The answer: what both models write, how it is tinted, and when it is written by itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextvars import copy_context
from html import unescape
from itertools import count, pairwise

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, UserError, write_side_by_side
from mlpmoe.explorer.shell import answer as module
from mlpmoe.explorer.shell.answer import AnswerHandlers, check_writing
from mlpmoe.explorer.shell.answer_panel import BEGINNINGS, MAX_NEW_TOKENS, MAX_PROMPT, STORIES
from mlpmoe.explorer.shell.handlers import Handlers
from mlpmoe.explorer.shell.settings import read_spec
from mlpmoe.explorer.shell.tint import LEAST
from mlpmoe.measure.quality.routing import routing
from mlpmoe.measure.quality.tokens import text_changes
from mlpmoe.measure.text.generation import Writing
from tests.explorer.calibrated import CALIBRATED, at_the_end, direct
from tests.explorer.controls import controls, preview_values, settings, shown_values

SKIPPED = gr.skip()
HOSTILE = "<img src=//x.example/a.png onerror=alert(1)>"
ROUTED = {"method": "cmoe", "active": 0.5, "experts": 8}


@pytest.fixture
def writer(handlers) -> AnswerHandlers:
    return AnswerHandlers(handlers.workbench, handlers.looks)


def values(prompt="Hello", tokens=24, temperature=0.0, layer=0, **change) -> tuple:
    return "demo", *settings(**change), "proxy", prompt, tokens, temperature, layer


def words(pane: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", pane))


def written(demo, spec, tokens=24, temperature=0.0, prompt="Hello") -> tuple[Writing, ...]:
    """As the library writes it."""
    pair = (demo.model, direct(demo, spec))
    *_, last = write_side_by_side(pair, demo.tokenizer, prompt, tokens, temperature)
    return last


@pytest.fixture
def token_by_token(monkeypatch):
    """A clock by which each token takes a whole turn."""
    clock = count()
    monkeypatch.setattr(module, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(module, "TURN", 0.5)
    monkeypatch.setattr(module, "WRITING_SECONDS", math.inf)


# what is written


@pytest.mark.parametrize(
    ("change", "temperature"),
    [
        ({"branches": 6, "fade": 0.9, "keep": 4}, 0.0),
        ({"branches": 6, "keep": 4}, 0.8),
        (CALIBRATED["refitted"], 0.0),
        (ROUTED, 0.0),
    ],
    ids=str,
)
def test_both_texts_are_the_library_s_and_tinted_by_both_models_losses(
    writer, demo, visitor, change, temperature
):
    steps = list(writer.write(visitor(), *values(temperature=temperature, **change)))
    dense, converted, report, _ = at_the_end(steps)
    spec = read_spec(controls(**change))
    assert any("alibrating" in s[2] for s in steps if s[2] != SKIPPED) == spec.needs_calibration
    writings = written(demo, spec, temperature=temperature)
    pair, before = (demo.model, direct(demo, spec)), demo.tokenizer("Hello").input_ids
    for pane, writing in zip((dense, converted), writings, strict=True):
        assert words(pane).strip() == writing.text.strip()
        ids = torch.tensor([*before, *writing.tokens])
        losses = []
        for model in pair:
            with torch.no_grad():
                likely = model(ids[None]).logits[0].log_softmax(-1)
            losses.append(-likely[:-1].gather(1, ids[1:, None])[len(before) - 1 :, 0])
        pieces = text_changes(pair, ids.tolist(), len(before), demo.tokenizer)
        changes = [c for c, p in zip((losses[1] - losses[0]).tolist(), pieces, strict=True)
                   if p.text and abs(c) >= LEAST]  # fmt: skip
        shown = [float(c.replace("−", "-")) for c in re.findall(r'title="(\S+) nats', pane)]
        assert shown == pytest.approx(changes, abs=0.02)
    same = writings[0].tokens == writings[1].tokens
    assert ("wrote the same" in report) == same
    if not same:
        at = next(i for i, pair in enumerate(zip(*(w.tokens for w in writings), strict=True))
                  if pair[0] != pair[1])  # fmt: skip
        assert f"token {at + 1}:" in report


def test_what_a_model_writes_is_escaped(writer, demo, visitor, monkeypatch):
    texts = HOSTILE, HOSTILE.replace("<img", "<b>x")
    tokens = [demo.tokenizer(text).input_ids[1:] for text in texts]
    writings = tuple(map(Writing, tokens, texts))
    monkeypatch.setattr(
        "mlpmoe.explorer.server.loaded.write_side_by_side", lambda *_: iter([writings])
    )
    steps = list(writer.write(visitor(), *values(fade=0.9)))
    assert words(steps[0][1]) == texts[1]
    for dense, converted, report, _ in steps:
        shown = dense + converted + (report if report != SKIPPED else "")
        assert set(re.findall(r"<(\w+)", shown)) <= {"p", "i", "span", "u", "code"}
    assert words(steps[-1][0]) == texts[0]
    part_at = re.findall(r"<code>(.*?)</code>", steps[-1][2])
    assert [unescape(code) for code in part_at] == ["'i'", "'b'"]


def test_a_text_grows_as_it_is_written(writer, visitor, token_by_token):
    *steps, last = writer.write(visitor(), *values(fade=0.9, tokens=12))
    panes = [words(step[1]) for step in steps]
    assert len({*panes}) > 6
    assert all(len(later) >= len(before) for before, later in pairwise(panes))
    assert all(step[2:] == (SKIPPED, SKIPPED) for step in steps)
    assert "nats" in last[1] and "nats" not in steps[-1][1]  # tinted once it is whole


@pytest.mark.parametrize("by_itself", [False, True])
def test_stop(handlers, writer, visitor, token_by_token, monkeypatch, by_itself):
    """It ends the text after the token that is being written; what is there stays."""
    monkeypatch.setattr(module, "SETTLED", -1)
    looked_at(handlers, visitor(), fade=0.9)
    wanted = values(fade=0.9, tokens=40)
    running = in_own_contexts(
        writer.write_by_itself(visitor(), True, *wanted)
        if by_itself
        else writer.write(visitor(), *wanted)
    )
    next(running)
    writer.jobs.press_stop(visitor("b"))
    assert words(next(running)[1])
    writer.jobs.press_stop(visitor())
    (last,) = running
    assert "Stopped" in last[2]
    assert last[:2] == (SKIPPED,) * 2


def test_stop_while_a_setting_settles(handlers, writer, visitor, monkeypatch, asked_to_write):
    looked_at(handlers, visitor(), fade=0.9)
    monkeypatch.setattr(module, "sleep", lambda _: writer.jobs.press_stop(visitor()))
    (last,) = writer.write_by_itself(visitor(), True, *values(fade=0.9))
    assert "Stopped" in last[2]
    assert asked_to_write == []


def test_another_prompt_does_not_wait(writer, demo, visitor, token_by_token):
    first = in_own_contexts(writer.write(visitor(), *values(fade=0.9, tokens=40)))
    next(first)
    second = in_own_contexts(writer.write(visitor(), *values(fade=0.9, prompt="A bird", tokens=4)))
    next(second)
    assert list(first) == []  # and leaves the panes to the new text
    expected = written(demo, ConversionSpec(fade=0.9), prompt="A bird", tokens=4)
    shown = at_the_end(second)
    assert [words(p).strip() for p in shown[:2]] == [w.text.strip() for w in expected]


def test_what_takes_too_long_is_cut_off_and_not_kept(
    writer, demo, visitor, notices, monkeypatch, token_by_token
):
    monkeypatch.setattr(module, "WRITING_SECONDS", 20)
    cut = at_the_end(writer.write(visitor(), *values(fade=0.9, tokens=40)))
    ((kind, message),) = notices
    assert (kind, message[:13]) == ("Info", "Stopped after")
    monkeypatch.setattr(module, "WRITING_SECONDS", math.inf)
    whole = at_the_end(writer.write(visitor(), *values(fade=0.9, tokens=40)))
    expected = written(demo, ConversionSpec(fade=0.9), tokens=40)
    for short, pane, writing in zip(cut[:2], whole[:2], expected, strict=True):
        assert words(pane).strip() == writing.text.strip()
        assert len(words(short)) < len(words(pane))
    assert len(notices) == 1


@pytest.fixture
def asked_to_write(monkeypatch) -> list[int]:
    """How many models were asked to write, each time."""
    seen = []

    def recorded(models, *rest):
        seen.append(len(models))
        return write_side_by_side(models, *rest)

    monkeypatch.setattr("mlpmoe.explorer.server.loaded.write_side_by_side", recorded)
    return seen


def test_what_was_written_is_not_written_again(writer, demo, visitor, asked_to_write):
    """Neither both texts of a setting, nor the dense one beside another setting; another prompt
    is another wish."""
    first = at_the_end(writer.write(visitor(), *values(fade=0.9, temperature=0.8)))
    assert list(writer.write(visitor(), *values(fade=0.9, temperature=0.8))) == [tuple(first)]
    other = at_the_end(writer.write(visitor(), *values(keep=8, temperature=0.8)))
    assert asked_to_write == [2, 1]
    expected = written(demo, ConversionSpec(keep=8), temperature=0.8)
    assert [words(pane).strip() for pane in other[:2]] == [w.text.strip() for w in expected]
    list(writer.write(visitor(), *values("Good bye", fade=0.9, temperature=0.8)))
    assert asked_to_write == [2, 1, 2]


def test_a_writer_that_is_left_changes_no_weights(
    writer, demo, visitor, weights_hash, token_by_token
):
    before = weights_hash(demo.model)
    steps = writer.write(visitor(), *values(fade=0.9, keep=8, tokens=100))
    next(steps)
    steps.close()
    assert weights_hash(demo.model) == before


# what ran for a token


def test_each_token_of_a_routed_model_knows_the_experts_that_it_ran(
    handlers, writer, demo, visitor
):
    looked_at(handlers, visitor(), **ROUTED)
    _, converted, _, network = at_the_end(writer.write(visitor(), *values(layer=1, **ROUTED)))
    expected = direct(demo, read_spec(controls(**ROUTED)))
    writing = written(demo, read_spec(controls(**ROUTED)))[1]
    before = demo.tokenizer("Hello").input_ids
    found = routing(expected, torch.tensor([*before, *writing.tokens]))
    masks = json.loads(network["used"])
    assert len(masks) == len(writing.tokens)
    for token, layers in enumerate(masks, len(before)):
        for mask, layer in zip(layers, found, strict=True):
            cells = {cell for cell in range(8) if int(mask, 16) >> cell & 1}
            chosen = layer.chosen[token].nonzero()[:, 0] + layer.shared
            assert cells == {*range(layer.shared), *chosen.tolist()}
            assert len(cells) == 4  # half of the experts
    assert (network["kind"], network["looked"]) == ("experts", 1)
    pieces = text_changes(
        (demo.model, expected), [*before, *writing.tokens], len(before), demo.tokenizer
    )
    numbers = list(map(int, re.findall(r'data-token="(\d+)"', converted)))
    assert numbers == [number for number, piece in enumerate(pieces) if piece.text]


@pytest.mark.parametrize(
    "change",
    [{"keep": 8}, {"method": "neurons", "active": 0.5}, {"method": "inputs", "active": 0.5}],
    ids=str,
)
def test_without_experts_a_token_has_none(handlers, writer, visitor, change):
    """The picture stays as it was; single neurons share their cells."""
    looked_at(handlers, visitor(), **change)
    shown = at_the_end(writer.write(visitor(), *values(**change)))
    assert shown[3] == SKIPPED
    assert "data-token" not in shown[1]


# by itself


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "SETTLED", -1)


def looked_at(handlers: Handlers, visitor, measured=True, **change) -> None:
    handlers.preview(visitor, *preview_values(**change))
    if measured:
        list(handlers.measure_live(visitor, *shown_values(**change)))


def in_own_contexts(steps: Iterator) -> Iterator:
    """Each step in a context of its own, as Gradio has it."""
    while (step := copy_context().run(next, steps, None)) is not None:
        yield step


def test_a_measured_setting_is_written_with_once(handlers, writer, demo, visitor, at_once):
    looked_at(handlers, visitor(), fade=0.9)
    steps = in_own_contexts(writer.write_by_itself(visitor(), True, *values(fade=0.9)))
    dense, converted, *_ = at_the_end(steps)
    expected = written(demo, ConversionSpec(fade=0.9))
    assert [words(p).strip() for p in (dense, converted)] == [w.text.strip() for w in expected]
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9))) == []


def test_nothing_is_written_unasked(handlers, writer, visitor, at_once):
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9))) == []  # no preview yet
    looked_at(handlers, visitor(), fade=0.9)
    assert list(writer.write_by_itself(visitor(), False, *values(fade=0.9))) == []
    assert list(writer.write_by_itself(visitor("b"), True, *values(fade=0.9))) == []
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.5))) == []
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9)))  # ticked again


def test_writing_waits_for_the_first_estimate(handlers, writer, visitor, monkeypatch, at_once):
    looked_at(handlers, visitor(), measured=False, fade=0.9)
    waited = []

    def measure(_):
        assert not waited
        waited.append(list(handlers.measure_live(visitor(), *shown_values(fade=0.9))))

    monkeypatch.setattr(module, "sleep", measure)
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9)))
    assert waited


def test_a_setting_has_to_settle(handlers, writer, visitor, monkeypatch, token_by_token):
    monkeypatch.setattr(module, "SETTLED", 4.5)
    looked_at(handlers, visitor(), fade=0.9)
    slept = []
    monkeypatch.setattr(module, "sleep", slept.append)
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9, tokens=2)))
    assert len(slept) == 4


@pytest.mark.parametrize("how", ["another setting", "stopped", "failed"])
def test_who_waits_to_write_goes_when_it_is_overtaken(
    handlers, writer, visitor, monkeypatch, at_once, asked_to_write, how
):
    looked_at(handlers, visitor(), measured=False, fade=0.9)

    def meanwhile(_):
        if how == "another setting":
            looked_at(handlers, visitor(), measured=False, fade=0.5)
        elif how == "stopped":
            handlers.stop_measuring(visitor(), *shown_values(fade=0.9))
        else:
            handlers.looks.of(visitor()).failed = True

    monkeypatch.setattr(module, "sleep", meanwhile)
    assert list(writer.write_by_itself(visitor(), True, *values(fade=0.9))) == []
    assert asked_to_write == []


def test_an_overtaken_writer_stops(handlers, writer, visitor, at_once, token_by_token):
    looked_at(handlers, visitor(), fade=0.9)
    looked_at(handlers, visitor("b"), fade=0.9)
    mine, theirs = (
        in_own_contexts(writer.write_by_itself(visitor(who), True, *values(fade=0.9)))
        for who in "ab"
    )
    next(mine)
    next(theirs)
    looked_at(handlers, visitor(), measured=False, fade=0.5)
    assert list(mine) == []
    assert "nats" in at_the_end(theirs)[1]  # which goes on


# prompts


def test_another_model_is_asked_otherwise(writer, gateless_folder):
    *_, guest = writer.workbench.load(str(gateless_folder))
    for before in (STORIES[1], "", " "):
        prompt, examples, temperature, *empty = writer.another_model(guest.key, before)
        assert prompt == BEGINNINGS[0]  # it has no chat template
        assert [sample for (sample,) in examples["samples"]] == list(BEGINNINGS)
        assert temperature == 0
        assert [words(pane) for pane in empty] == ["…", "…", ""]
    assert writer.another_model(guest.key, "My own words")[0] == SKIPPED
    prompt, _, temperature, *_ = writer.another_model("demo", BEGINNINGS[2])
    assert prompt == STORIES[0] and temperature > 0  # it repeats itself at 0


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
def test_an_empty_prompt_is_refused(writer, visitor, prompt):
    with pytest.raises(UserError, match="prompt is empty"):
        next(writer.write(visitor(), *values(prompt)))
