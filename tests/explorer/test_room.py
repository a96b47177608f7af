"""Memory for conversions is waited for, and never promised twice."""

import threading

import pytest

from mlpmoe import ConversionSpec
from mlpmoe.core.errors import UserError
from mlpmoe.explorer.server import room as rooms
from mlpmoe.explorer.server.room import RESERVE, Room

MB = 2**20


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rooms, "PATIENCE", 0.0)
    monkeypatch.setattr(rooms, "TICK", 0.01)


def test_what_is_promised_is_not_promised_again(impatient):
    room = Room(lambda: RESERVE + 150 * MB)
    with room.holding(100 * MB):
        with pytest.raises(UserError, match="it takes 105 MB, and 321 MB are free here"):
            room.holding(100 * MB).__enter__()
        with room.holding(50 * MB):
            pass
    with room.holding(150 * MB):
        pass


def test_what_is_held_in_case_goes_first(impatient):
    free, held = [RESERVE], [60 * MB, 60 * MB, 60 * MB]

    def let_go():
        free[0] += held.pop()
        return True

    with Room(lambda: free[0]).holding(100 * MB, let_go):
        assert held == [60 * MB]  # no more than it takes


def test_who_waits_goes_on_when_others_have_freed_some(monkeypatch):
    monkeypatch.setattr(rooms, "TICK", 0.01)
    free, waited, made = [RESERVE], threading.Event(), []

    def make():
        with Room(lambda: free[0]).holding(MB, waiting=waited.set):
            made.append("one")

    thread = threading.Thread(target=make)
    thread.start()
    assert waited.wait(10) and not made
    free[0] += MB
    thread.join(10)
    assert made == ["one"]


def test_a_host_that_cannot_tell_goes_on():
    with Room(lambda: None).holding(2**50):
        pass


def test_a_conversion_without_room_is_refused_and_the_next_is_made(demo, impatient, monkeypatch):
    free = [0]
    monkeypatch.setattr("mlpmoe.core.memory.available_memory", lambda device: free[0])
    faded = ConversionSpec(branches=8, fade=0.625)
    demo.converted(ConversionSpec(branches=4))  # holds no weights of its own
    with pytest.raises(UserError, match="no memory for another conversion at the moment"):
        demo.converted(faded)
    free[0] = 2**40
    assert demo.converted(faded)
