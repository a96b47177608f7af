"""Sudden ends: commands that are killed, or asked to end, at any moment, and then run again."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from tests.campaign.disks import disks
from tests.campaign.rooms import SOON, Ended, Room, cache_of, name_of, until_the_end
from tests.campaign.table import Table
from tests.campaign.visits import visits
from tests.campaign.works import Work, works, write_texts

WHOLE = 6  # ends after which it is left to finish once
EARLY = 5  # of so many ends, one is while the libraries are read


@dataclass
class Disturbed:
    """A work that is ended again and again. wanted: what it comes to undisturbed, which takes
    `seconds`, of which `imports` are spent with reading libraries."""

    work: Work
    room: Room
    wanted: object
    seconds: float
    imports: float
    random: Random
    counts: Counter = field(default_factory=Counter)
    slowest: float = 0.0  # seconds in which it ended when it was asked to

    def ended(self, number: int, times: int) -> Iterator[str]:
        """End it so many times by a signal; yields what is wrong."""
        for turn in range(1, times + 1):
            before = self._lines()
            self.counts["went on"] += self.work.goes_on(self.room)
            running = self.room.begin(*self.work.arguments)
            moment = self._moment(turn)
            if running.runs_until(moment):
                ended = running.end(number)
                self.counts["ends"] += 1
                wrong = [*self._left_by(ended, number), *self._lost(before)]
            else:
                self.counts["was done before"] += 1
                wrong = [*self._whole(running.finish())]
            if self.work.complete(self.room):
                self.work.clear(self.room)
            if not wrong and (turn % WHOLE == 0 or turn == times):
                wrong = [*self._whole(self.room.run(*self.work.arguments))]
            yield from (f"{name_of(number)} after {moment:.2f} s: {each}" for each in wrong)

    def _moment(self, turn: int) -> float:
        if turn % EARLY == 1:
            return self.random.uniform(0.05, self.imports)
        return self.random.uniform(self.imports, self.seconds)

    def _left_by(self, ended: Ended, number: int) -> Iterator[str]:
        """What is wrong right after the end."""
        if ended.helpers:
            yield f"{ended.helpers} processes that it had started go on"
        if self.work.complete(self.room) and self._differs(None):
            yield "what looks complete is not"
        if number == signal.SIGKILL:
            return
        self.slowest = max(self.slowest, ended.seconds)
        if ended.status == 0:  # it had done all
            return
        if not ended.of(number):
            yield f"its exit status is {ended.status}"
        if ended.seconds > SOON:
            yield f"it ended after {ended.seconds:.1f} s"
        if ended.told and not ended.one_line:
            yield f"it told {ended.told.strip()[-300:]!r}"
        if left := self.room.left() + ([] if self.work.keeps else self.work.half_made(self.room)):
            yield f"it left {left}"

    def _lines(self) -> bytes:
        """The whole lines of the runs file."""
        file = self.room.folder / (self.work.out or "none")
        content = file.read_bytes() if file.is_file() else b""
        return content[: content.rfind(b"\n") + 1]

    def _lost(self, before: bytes) -> Iterator[str]:
        if not self._lines().startswith(before):
            yield "runs that were measured are lost"

    def _whole(self, ended: Ended) -> Iterator[str]:
        """What is wrong after it has done all."""
        if ended.status:
            yield f"run again it ends with {ended.status}: {ended.told.strip()[-300:]}"
        elif self._differs(ended):
            yield f"run again it comes to something else: {self._difference(ended)}"
        if left := self.room.left() + self.work.half_made(self.room):
            yield f"left after it was done: {left}"
        self.work.clear(self.room)

    def _differs(self, ended: Ended | None) -> bool:
        found = self.work.outcome(self.room, ended)
        return any(found[part] != self.wanted[part] for part in found)

    def _difference(self, ended: Ended) -> str:
        found = self.work.outcome(self.room, ended)
        return str([difference(found[part], self.wanted[part]) for part in found])[:300]


def difference(found: object, wanted: object) -> object:
    """The first place where two plain values differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in {**found, **wanted}:
            if found.get(name) != wanted.get(name):
                return name, difference(found.get(name), wanted.get(name))
    if isinstance(found, list) and isinstance(wanted, list):
        for place, pair in enumerate(zip(found, wanted, strict=False)):
            if pair[0] != pair[1]:
                return place, difference(*pair)
    return None if found == wanted else (found, wanted)


def disturbed(
    folder: Path, model: str, work: Work, moments: int, imports: float, table: Table
) -> None:
    """The rows of one work: `moments` kills, half as many of each request to end."""
    folder.mkdir()
    write_texts(folder)
    room = Room(folder, cache=cache_of(model, folder))
    began = time.monotonic()
    ended = room.run(*work.arguments)
    seconds = time.monotonic() - began
    assert ended.status == 0, ended.told
    wanted = work.outcome(room, ended)
    work.clear(room)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        random = Random(f"{work.name} {number}")
        case = Disturbed(work, room, wanted, seconds, imports, random)
        times = moments if number == signal.SIGKILL else moments // 2
        found = partial(_found, case, number, times)
        table.ends(work.name, name_of(number), case.ended(number, times), found)


def _found(case: Disturbed, number: int, times: int) -> str:
    said = f"{times} times: {case.counts['went on']} then went on from what was there"
    return said + until_the_end(number, case.slowest)


def campaign(folder: Path, model: str, moments: int, only: tuple[str, ...] = ()) -> Table:
    """What sudden ends at so many moments, and disks that take nothing more, do to each work."""
    table = Table(f"sudden ends on {model}")
    (folder / "imports").mkdir()
    began = time.monotonic()
    assert Room(folder / "imports").run("models").status == 0
    imports = time.monotonic() - began
    for number, work in enumerate(works(model)):
        if not only or work.name in only:
            disturbed(folder / str(number), model, work, moments, imports, table)
    if not only or "app" in only:
        visits(folder / "app", model, moments, table)
    if not only or "disks" in only:
        disks(folder / "disks", model, table)
    return table
