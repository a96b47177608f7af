"""How errors of handlers are shown."""

from __future__ import annotations

import gradio as gr
import pytest

from mlpmoe import UserError
from mlpmoe.explorer.events import readable, sentence


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
