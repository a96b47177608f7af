"""How errors of handlers are shown."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from inspect import isgeneratorfunction

import gradio as gr
import pytest
from gradio.route_utils import Request
from gradio.state_holder import SessionState

from mlpmoe import UserError
from mlpmoe.explorer.app import build_demo
from mlpmoe.explorer.server.events import readable, sentence
from mlpmoe.explorer.tabs.pushing import PushHandlers, PushPanel, wire_push
from mlpmoe.models import ModelError


def test_readable_passes_on_what_a_user_can_mend():
    @readable
    def handler():
        raise UserError("Choose <less>.")

    with pytest.raises(gr.Error, match="Choose &lt;less&gt;") as caught:
        handler()
    assert not caught.value.print_exception


@pytest.mark.parametrize("streams", [False, True])
def test_readable_hides_what_nobody_can_mend(caplog, streams):
    def fails():
        raise RuntimeError("secret /home/someone/file.py")

    def stream():
        yield 1
        raise RuntimeError("secret /home/someone/file.py")

    with pytest.raises(gr.Error, match="Something went wrong") as caught:
        list(readable(stream)()) if streams else readable(fails)()
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text  # for whoever runs the server


def silent(method):
    """The handler as it is when it is overtaken, stopped, or has nothing to do."""

    @wraps(method)
    def nothing(*values):
        yield from ()

    return nothing


def test_no_handler_of_the_page_can_clear_what_is_shown(workbench, monkeypatch):
    """Gradio clears all outputs of a generator that ends without a value. So every generator of
    the page, whatever it does, goes through `readable`; here all of them say nothing."""
    modules = [name for name in list(sys.modules) if name.startswith("mlpmoe.explorer.")]
    for kind in {
        kind
        for name in modules
        for kind in vars(sys.modules[name]).values()
        if isinstance(kind, type) and kind.__name__.endswith("Handlers")
    }:
        for name, method in list(vars(kind).items()):
            if isgeneratorfunction(method) and not name.startswith("_"):
                monkeypatch.setattr(kind, name, silent(method))
    with gr.Blocks() as space:  # what is on Spaces only, without its sign-in
        panel = PushPanel(gr.Button(), gr.Textbox(), gr.Checkbox(), gr.Button(), gr.HTML())
        wire_push(PushHandlers(None), panel, space)

    async def leaves_all(page, fn) -> bool:
        given = await page.call_function(fn, [None] * len(fn.inputs), requests=Request())
        state = SessionState(page)
        shown = await page.postprocess_data(fn, given["prediction"], state)
        return all(
            state[output._id] == output.value
            if output.stateful
            else update["__type__"] == "update" and "value" not in update
            for output, update in zip(fn.outputs, shown, strict=True)
        )

    names = set()
    fns = [(page, fn) for page in (build_demo(workbench), space) for fn in page.fns.values()]
    with ThreadPoolExecutor(1) as thread:
        for page, fn in fns:
            if isgeneratorfunction(fn.fn) and fn.api_visibility == "private":
                names.add(fn.name)
                # in a thread: Playwright leaves its own loop running in this one
                assert thread.submit(asyncio.run, leaves_all(page, fn)).result(), fn.name
    assert names >= {
        "open_link", "load", "load_taken", "measure_live", "measure", "write", "write_by_itself",
        "suggest", "sweep", "compare", "make", "push",
    }  # fmt: skip


def test_what_a_stream_yields_is_passed_on_as_it_is():
    @readable
    def handler(count):
        yield from range(count)

    assert [list(handler(count)) for count in range(4)] == [[gr.skip()], [0], [0, 1], [0, 1, 2]]


def test_readable_lets_a_stream_be_closed():
    closed = []

    @readable
    def stream():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    running = stream()
    next(running)
    running.close()
    assert closed == [True]


def test_a_sentence_begins_with_a_capital_and_holds_no_html():
    assert sentence(UserError('no <b> & "so" on.')) == 'No &lt;b&gt; &amp; "so" on.'
    assert sentence(UserError("")) == ""


@pytest.mark.parametrize("name", ["my-model", "demo", "model.safetensors", "fade_unit", "./mine"])
def test_a_sentence_keeps_the_spelling_of_a_name(name):
    assert sentence(ModelError(f"{name} has no weights.")) == f"{name} has no weights."
    if name not in ("my-model", "demo"):  # which only an error of models begins with
        assert sentence(UserError(f"{name} is odd.")) == f"{name} is odd."


def test_what_a_visitor_does_next_is_not_passed_over(workbench):
    """Gradio drops what comes while the same listener is at work, unless told otherwise."""
    modes = {fn.api_name: fn.trigger_mode for fn in build_demo(workbench).fns.values()}
    for listener in (
        "preview_1", "restore_taken", "load_taken", "choose_preset", "choose_method", "budget",
        "picked", "look", "write", "write_by_itself", "measure_live", "choose_goal", "take",
    ):  # fmt: skip
        assert modes[listener] in ("always_last", "multiple"), listener
