"""Each visitor has so much under way, and what is done for them takes their turns."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.context import LocalContext

from mlpmoe import UserError
from mlpmoe.explorer.server import guests as module
from mlpmoe.explorer.server import turns
from mlpmoe.explorer.server.background import each_in_thread, in_thread
from mlpmoe.explorer.server.events import GUESTS, readable
from mlpmoe.explorer.server.guests import Guests


def whose() -> object:
    return turns._visitor.get()


@pytest.fixture
def session():
    token = LocalContext.request.set(SimpleNamespace(session_hash="me"))
    yield "me"
    LocalContext.request.reset(token)


def test_so_much_at_a_time_and_others_are_not_concerned(monkeypatch):
    monkeypatch.setattr(module, "MOST_AT_ONCE", 2)
    guests = Guests()
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(guests.work_of("a"))
        with pytest.raises(UserError, match="2 of your requests are under way"):
            stack.enter_context(guests.work_of("a"))
        stack.enter_context(guests.work_of("b"))
        stack.enter_context(guests.work_of(None))
    with guests.work_of("a"):
        pass
    assert not +guests._doing


def test_handlers_and_each_of_their_steps_are_the_visitor_s_also_in_threads(session):
    def stream():
        yield whose()
        yield from each_in_thread(whose() for _ in range(2))
        yield (yield from in_thread(lambda report: whose()))

    assert readable(whose)() == session
    assert [step for step in readable(stream)() if step != "waiting"] == [session] * 4
    assert whose() is None and not GUESTS._doing


@pytest.mark.parametrize("ending", ["closed", "failed"])
def test_a_stream_that_ends_early_leaves_nothing(session, ending):
    def stream():
        yield 1
        if ending == "failed":
            raise UserError("not so.")
        yield 2

    running = readable(stream)()
    assert next(running) == 1 and GUESTS._doing[session] == 1
    if ending == "failed":
        with pytest.raises(gr.Error, match="Not so"):
            next(running)
    running.close()
    assert not GUESTS._doing
