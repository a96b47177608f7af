"""What is disturbed: commands that write something, and how one sees whether it is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.rooms import Ended, Room, without
from tests.campaign.server import ROOT

STORIES = ROOT / "assets" / "demo" / "stories.txt"
SEPARATOR = "<|endoftext|>"
TIMES = ("seconds", "folder", "speed", "bytes")  # what differs between two runs of the same
RECORDS = ("README.md", "conversion.json")  # files that say how long training took
SWEEP = ("--branches", "4,8,16", "--fade", "0,0.3,0.6,0.9", "--keep", "all,75%")
RECOVER = ("--keep", "12", "--recover", "lora", "--recover-steps", "45")


@dataclass(frozen=True)
class Work:
    """A command. out: the file or folder that it writes, if it does; keeps: whether what is left
    of it after an end is what it goes on from."""

    name: str
    arguments: tuple[str, ...]
    out: str | None = None
    keeps: bool = False

    def complete(self, room: Room) -> bool:
        """Whether there is something that looks like the whole result."""
        return self.out is not None and (room.folder / self.out).is_dir()

    def outcome(self, room: Room, ended: Ended | None) -> Any:
        """What it has come to, without what differs each time. ended: None if it did not end by
        itself: then of a folder alone."""
        found = {}
        if ended is not None:
            found["said"] = without(json.loads(ended.said), TIMES)
        if self.complete(room):
            found["files"] = dict(_digests(room.folder / self.out))
        return found

    def half_made(self, room: Room) -> list[str]:
        """What is there beside the result, and is not whole."""
        found = [*room.folder.glob("*.partial"), *room.folder.glob("*.claims")]
        found += room.cache_folder.glob("**/*.partial")
        return [str(path.relative_to(room.folder)) for path in found]

    def goes_on(self, room: Room) -> bool:
        """Whether the next attempt finds something to go on from."""
        return any(room.cache_folder.glob("recovery/*.recovery")) or (
            self.keeps and any(room.folder.glob(f"{self.out}*"))
        )

    def clear(self, room: Room) -> None:
        """Remove the result, so that the next begins anew."""
        if self.out is None:
            return
        out = room.folder / self.out
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def _digests(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.rglob("*")):
        if file.name == "conversion.json":
            yield file.name, without(json.loads(file.read_text()), TIMES)
        elif file.is_file() and file.name not in RECORDS:
            yield file.name, hashlib.sha256(file.read_bytes()).hexdigest()


def works(model: str) -> list[Work]:
    """Of each kind one; texts: see `write_texts`."""
    short = ("--json", "--text", "text.txt")
    seen = (*short, "--calibration", "seen.txt")
    sweep = ("sweep", model, *SWEEP, "--out", "runs.jsonl", *short)
    convert = ("convert", model, "made")
    routed = ("--method", "contiguous", "--active", "0.5")
    return [
        Work("sweep", sweep, "runs.jsonl", keeps=True),
        Work("convert file by file", (*convert, "--keep", "12", *short), "made", keeps=True),
        Work("convert in memory", (*convert, *routed, *short), "made"),
        Work("convert --recover", (*convert, *RECOVER, *seen), "made"),
        Work("evaluate --recover", ("evaluate", model, "--no-speed", *RECOVER, *seen)),
    ]


def write_texts(folder: Path, stories: int = 6) -> None:
    """Short ones: what is tried here is no measure."""
    found = STORIES.read_text(encoding="utf-8").split(SEPARATOR)
    for name, some in (("text", found[:stories]), ("seen", found[stories : stories + 40])):
        (folder / f"{name}.txt").write_text(SEPARATOR.join(some), encoding="utf-8")
