"""Sudden ends of the page, while it starts, measures, or makes a checkpoint for a visitor."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from tests.campaign.clients import ready
from tests.campaign.rooms import SOON, Room, cache_of, name_of, until_the_end
from tests.campaign.server import Server, serving, started, wait_for
from tests.campaign.table import Table

SPECS = (("16", "0.6", "null"), ("8", "0", "6"))  # that are measured, by B, fade and K
ADDRESS = re.compile(r"0x[0-9a-f]+")
EARLY = 5  # of so many ends, one is while the page starts


class Page:
    """A visitor's page without a browser: its events as the page sends them."""

    def __init__(self, server: Server) -> None:
        self.server, self.session = server, f"visitor{time.monotonic_ns()}"
        self.config = self.get("config").json()
        self.components = {each["id"]: each for each in self.config["components"]}
        for _ in self.call("open_link"):  # its model is the one of this session from now on
            pass

    def get(self, name: str) -> httpx.Response:
        return httpx.get(f"{self.server.url}/{name}", timeout=30, trust_env=False)

    def call(self, name: str) -> Iterator[dict[str, Any]]:
        """The messages of an event, with the values that its components begin with."""
        (event,) = [each for each in self.config["dependencies"] if each["api_name"] == name]
        values = [self.components[number]["props"].get("value") for number in event["inputs"]]
        body = {"data": values, "fn_index": event["id"], "session_hash": self.session}
        base = f"{self.server.url}/gradio_api/queue"
        with httpx.Client(timeout=900, trust_env=False) as client:
            joined = client.post(f"{base}/join", json=body)
            assert joined.status_code == 200, joined.text
            with client.stream("GET", f"{base}/data?session_hash={self.session}") as lines:
                for line in lines.iter_lines():
                    if line.startswith("data: "):
                        message = json.loads(line.removeprefix("data: "))
                        yield message
                        if message["msg"] in ("process_completed", "close_stream"):
                            return

    def export(self) -> str:
        """Make a checkpoint; what is said at the end."""
        for name in ("begin", "make"):
            said = [message for message in self.call(name) if "output" in message]
        output = said[-1]["output"]
        shown = output.get("error") or [each.get("output", {}) for each in said][-2:]
        return shown if isinstance(shown, str) else json.dumps(shown)


def preview(server: Server, model: str) -> tuple[bool, str]:
    return server.post("preview", f'{{"data": ["{model}", 16, 0, null, "sqrt", null]}}')


def measure(server: Server, model: str) -> list[Any]:
    """What the page measures, as a program sees it."""
    found = []
    for branches, fade, keep in SPECS:
        body = f'{{"data": ["{model}", {branches}, {fade}, {keep}, "sqrt", "proxy", null]}}'
        fine, answer = server.post("evaluate", body, timeout=900)
        assert fine, answer
        found.append(json.loads(answer))
    return found


def export(server: Server, model: str) -> str:
    return Page(server).export()


DOING: dict[str, Callable[[Server, str], Any]] = {"measures": measure, "exports": export}


@dataclass
class Visited:
    """A page that is ended again and again, and the next that is to be as the first."""

    model: str
    room: Room
    slowest: float = 0.0

    def __post_init__(self) -> None:
        self.own = self.room.environment | {"MLPMOE_FIRST_MODEL": self.model}
        self.takes: dict[str, float] = {}
        began = time.monotonic()
        with serving(self.room.folder, **self.own) as server:
            self.takes["starts"] = time.monotonic() - began
            ready(server, self.model)
            self.page = _looks(Page(server))
            for name, work in DOING.items():
                began = time.monotonic()
                said = work(server, self.model)
                self.takes[name] = time.monotonic() - began
                if name == "measures":
                    self.measured = said
                else:
                    assert "Made and verified" in said, said
            _end(server, signal.SIGTERM)
        self.cache = _about(self.room.cache_folder)

    def ended(self, number: int, doing: str, times: int) -> Iterator[str]:
        """End it so many times; yields what is wrong."""
        random, self.slowest = Random(f"{doing} {number}"), 0.0
        for turn in range(1, times + 1):
            early = turn % EARLY == 1
            moment = random.uniform(0.05, self.takes["starts" if early else doing])
            wrong = [*self._once(number, None if early else doing, moment)]
            if not wrong and turn == times:
                wrong = [*self._as_before()]
            what = "starts" if early else doing
            yield from (f"{name_of(number)}, {moment:.2f} s as it {what}: {w}" for w in wrong)

    def _once(self, number: int, doing: str | None, moment: float) -> Iterator[str]:
        server = started(self.room.folder, **self.own)
        try:
            if doing:
                _wait_and(server, self.model, DOING[doing])
            time.sleep(moment)
            seconds, status, helpers = _end(server, number)
        finally:
            server.process.kill()
            server.process.wait()
        if helpers:
            yield f"{helpers} processes that it had started go on"
        if _about(self.room.cache_folder) != self.cache:
            yield "the cache is another"
        if number == signal.SIGKILL:
            return
        self.slowest = max(self.slowest, seconds)
        if status not in (128 + number, -number):
            yield f"its exit status is {status}"
        if seconds > SOON:
            yield f"it ended after {seconds:.1f} s"
        log = server.log.read_text()
        if "Traceback" in log:
            yield f"its log has {log[-600:]!r}"
        if left := self.room.left():
            yield f"it left {left}"

    def _as_before(self) -> Iterator[str]:
        """Whether the next page is as the first."""
        with serving(self.room.folder, **self.own) as server:
            ready(server, self.model)
            roots = [name for name in self.room.left() if "/" not in name]
            if len(roots) > 1:
                yield f"what a dead one left is still there: {roots}"
            if _looks(Page(server)) != self.page:
                yield "the page is another"
            if measure(server, self.model) != self.measured:
                yield "it measures something else"
            said = export(server, self.model)
            if "Made and verified" not in said:
                yield f"it makes no checkpoint: {said}"
            _end(server, signal.SIGTERM)
        if left := self.room.left():
            yield f"it left {left}"
        if _about(self.room.cache_folder) != self.cache:
            yield "the cache is another"


def _wait_and(server: Server, model: str, work: Callable) -> None:
    """Once the page has its model, begin; whoever asked hears that it is gone."""
    wait_for(server)
    ready(server, model)

    def ask() -> None:
        with suppress(httpx.HTTPError, AssertionError, ValueError, IndexError):
            work(server, model)

    threading.Thread(target=ask, daemon=True).start()


def _end(server: Server, number: int) -> tuple[float, int | None, int]:
    """Seconds until it had ended, its status, and how many of its processes go on."""
    try:
        helpers = psutil.Process(server.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        helpers = []
    began = time.monotonic()
    server.process.send_signal(number)
    with suppress(Exception):
        server.process.wait(5 * SOON)
    seconds = time.monotonic() - began
    _, alive = psutil.wait_procs(helpers, SOON)
    return seconds, server.process.poll(), len(alive)


def _looks(page: Page) -> str:
    """The page as a browser gets it, without what is new each time: the process, its address, and
    those of functions."""
    kept = {name: value for name, value in page.config.items() if name not in ("app_id", "root")}
    return ADDRESS.sub("", json.dumps(kept))


def _about(cache: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file of the cache, but for locks."""
    files = [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {
        str(file.relative_to(cache)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    }


def visits(folder: Path, model: str, moments: int, table: Table) -> None:
    """The rows of the page."""
    folder.mkdir()
    case = Visited(model, Room(folder, cache=cache_of(model, folder)))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for doing in DOING:
            times = max(1, moments // (2 if number == signal.SIGKILL else 4))
            found = partial(_found, case, number, times)
            faults = case.ended(number, doing, times)
            table.ends(f"the page {doing}", name_of(number), faults, found)


def _found(case: Visited, number: int, times: int) -> str:
    said = f"{times} times, then the same page, numbers and checkpoint"
    return said + until_the_end(number, case.slowest)
