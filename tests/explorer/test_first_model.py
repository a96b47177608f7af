"""The model that the page opens with: loaded once, followed by all, and never in the way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlpmoe.explorer.server import first_model as module
from mlpmoe.explorer.server.first_model import FirstModel
from mlpmoe.explorer.shell.opening import OpeningHandlers
from mlpmoe.models import ModelError
from tests.explorer.asking import SOON
from tests.explorer.controls import opened_link


class Loading:
    """A workbench that says what it does when it is told to."""

    def __init__(self, workbench, model) -> None:
        self.workbench, self.model = workbench, model
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.calls: list[str] = []
        self.staying = workbench.staying

    def load(self, name: str, by_host: bool = False):
        self.calls.append(name)
        yield "reading weights (10%)"
        self.begun.set()
        assert self.go_on.wait(SOON)
        yield "reading weights (90%)"
        yield self.model

    def loaded(self, name: str):
        return self.workbench.loaded(name)


@pytest.fixture
def loading(workbench, tiny) -> Loading:
    return Loading(workbench, tiny)


def test_many_visitors_follow_one_loading(loading, monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "owner/first")
    first, met = FirstModel(loading), threading.Barrier(4)

    def visit(_) -> list:
        following, seen = first.follow(), []
        for step in following:
            seen.append(step)
            if "(10%)" in str(step):
                met.wait(SOON)  # all have seen how far it is
                break
        loading.go_on.set()
        return [*seen, *following]

    with ThreadPoolExecutor(4) as pool:
        visits = list(pool.map(visit, range(4)))
    for *told, model in visits:
        assert model is loading.model
        assert "owner/first: reading weights (10%)" in told
        assert len(told) == len(set(told))  # each time it changes
    assert loading.calls == ["owner/first"]
    assert list(first.follow()) == [loading.model]  # who comes later waits for nothing
    assert first.note == ""
    assert loading.model.key in loading.staying


def test_the_page_answers_meanwhile(loading, monkeypatch, visitor, tiny):
    """Opened while the model is still loading, it says how far that is; other visitors work on."""
    monkeypatch.setenv(module.VARIABLE, "owner/<first>")
    opening = OpeningHandlers(loading.workbench, FirstModel(loading))
    steps = opening.open_link(visitor())
    told = [opened_link(next(steps)).status]
    while "(10%)" not in told[-1]:
        told.append(opened_link(next(steps)).status)
    assert "&lt;first&gt;" in told[-1]
    demo = loading.workbench.loaded("demo")
    *_, found = demo.evaluate(demo.asked(module_spec()), "proxy")
    assert found.complete
    loading.go_on.set()
    *_, last = map(opened_link, steps)
    assert (last.model, last.name) == (tiny.key, tiny.key)
    assert last.text["value"] == "prose"
    assert last.note["visible"] is False


def module_spec():
    from mlpmoe import ConversionSpec

    return ConversionSpec(keep=9)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelError("the disk is full."), "the disk is full"),
        (RuntimeError("secret /home/someone"), "see the server's log"),
    ],
)
def test_where_it_cannot_be_loaded_the_demo_model_says_why(
    workbench, demo, monkeypatch, visitor, error, reason
):
    def fails(name, by_host=False):
        yield "checking"
        raise error

    monkeypatch.setenv(module.VARIABLE, "owner/first")
    loading = Loading(workbench, demo)
    loading.load = fails
    first = FirstModel(loading)
    *_, model = first.follow()
    assert model is demo
    assert "owner/first" in first.note and reason in first.note
    assert "secret" not in first.note
    *_, last = OpeningHandlers(workbench, first).open_link(visitor())
    shown = opened_link(last)
    assert shown.model == "demo"
    assert "owner/first cannot be loaded here" in shown.note["value"]


@pytest.mark.parametrize(("name", "note"), [("the-default", ""), ("demo", "why it is a toy")])
def test_without_a_choice_of_the_host_it_is_the_default(loading, demo, monkeypatch, name, note):
    """Where that is the demo model, its page says why."""
    monkeypatch.setenv(module.VARIABLE, " ")
    monkeypatch.setattr(module, "default_model", lambda: (name, "why it is a toy"))
    loading.go_on.set()
    first = FirstModel(loading)
    *_, model = first.follow()
    assert (model, loading.calls, first.note) == (loading.model, [name], note)


def test_a_default_that_cannot_be_found_out_is_the_demo_model(workbench, demo, monkeypatch):
    def fails():
        raise OSError("no such folder")

    monkeypatch.delenv(module.VARIABLE)
    monkeypatch.setattr(module, "default_model", fails)
    first = FirstModel(workbench)
    *_, model = first.follow()
    assert model is demo
    assert "cannot be loaded" in first.note


def test_where_there_is_no_model_at_all_nobody_waits_for_one(workbench, monkeypatch):
    """As in an installation without the demo model."""

    def fails(name, by_host=False):
        raise ModelError("the demo model is not there.")
        yield

    monkeypatch.setattr(workbench, "load", fails)
    for _ in range(2):
        with pytest.raises(ModelError, match="not there"):
            list(FirstModel(workbench).follow())
