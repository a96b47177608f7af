"""Work that a visitor starts and stops."""

from __future__ import annotations

from concurrent.futures import CancelledError
from threading import Event, Thread
from time import sleep

import gradio as gr
import pytest

from mlpmoe.explorer.server.jobs import Jobs


def test_one_at_a_time_of_each_visitor(visitor):
    jobs = Jobs()
    with jobs.doing(visitor()) as first, jobs.doing(visitor("b")) as theirs:
        first.check()
        with jobs.doing(visitor()) as second:  # a new one stops the one before
            assert jobs.of(visitor()) is second
            with pytest.raises(CancelledError):
                first.check()
            second.check()
            theirs.check()
        assert jobs.of(visitor()) is None
        assert jobs.of(visitor("b")) is theirs
    assert jobs.of(visitor("b")) is None


def test_an_error_ends_it(visitor):
    jobs = Jobs()
    with pytest.raises(ValueError), jobs.doing(visitor()):
        raise ValueError
    assert jobs.of(visitor()) is None


def test_the_button(visitor):
    jobs = Jobs()
    assert jobs.press_stop(visitor()) == ""
    with jobs.doing(visitor()) as job:
        assert jobs.press_stop(visitor("b")) == ""
        job.check()
        assert jobs.press_stop(visitor()) == "<p>Stopping …</p>"
        assert job.stopped
        assert jobs.of(visitor()) is job  # until it has ended
    assert jobs.press_stop(visitor()) == ""


def test_the_button_says_nothing_after_the_last_word(visitor, monkeypatch):
    """The work says itself that it has stopped, maybe before the button's answer is there."""
    monkeypatch.setattr("mlpmoe.explorer.server.jobs.SOON", 10)
    jobs, begun = Jobs(), Event()

    def work():
        with jobs.doing(visitor()) as job:
            begun.set()
            while not job.stopped:
                sleep(0.01)

    thread = Thread(target=work)
    thread.start()
    assert begun.wait(10)
    assert jobs.press_stop(visitor()) == gr.skip()
    thread.join()


def test_before_its_turn(visitor):
    jobs = Jobs()
    waiting = jobs.put(visitor())
    with jobs.doing(visitor()) as job:
        assert job is waiting
    jobs.put(visitor())
    assert jobs.press_stop(visitor()) == "<p>Stopped.</p>"
    assert jobs.of(visitor()) is None
