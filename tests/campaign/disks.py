"""Disks that take nothing more, or nothing at all, and two who write to the same place."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.campaign.clients import ready
from tests.campaign.rooms import Ended, Room, cache_of
from tests.campaign.server import serving
from tests.campaign.table import Table
from tests.campaign.visits import Page, preview
from tests.campaign.works import RECOVER, SWEEP, Work, works, write_texts

MB = 2**20
SHORT = ("--text", "text.txt")
MEMORY = ("--method", "contiguous", "--active", "0.5")
TRAINED = ("--calibration", "seen.txt", *RECOVER)
FULL = "the disk is full"


class NotPermitted(Exception):
    """Only an administrator may mount a disk."""


@contextmanager
def small_disk(place: Path, size: int, writable: bool = True) -> Iterator[Path]:
    """A disk of so many bytes of memory."""
    place.mkdir(parents=True)
    ways = f"size={size},{'rw' if writable else 'ro'}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ways, "none", place], capture_output=True, text=True
    )
    if done.returncode:
        raise NotPermitted(done.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, free: int) -> None:
    """Until so many bytes are free, or none is."""
    about = os.statvfs(disk)
    # whoever else writes there may be as fast
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        file.write(bytes(max(0, about.f_bavail * about.f_frsize - free)))


def no_file_above(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Disks:
    """The cases, each with a sentence for its row."""

    def __init__(self, folder: Path, model: str, table: Table) -> None:
        folder.mkdir()
        write_texts(folder)
        self.folder, self.model, self.table = folder, model, table
        self.room = Room(folder, cache=cache_of(model, folder))
        self.sweep, self.files, self.memory, *_ = works(model)

    def refused(self, what: str, ended: Ended, words: str, wrong: list[str]) -> None:
        """The row of a command that is to fail with one line that has these words."""
        if ended.status not in (1, 2):
            wrong.append(f"its exit status is {ended.status}")
        if not ended.one_line or words not in ended.told:
            wrong.append(f"it told {ended.told.strip()[-400:]!r} and not: {words}")
        wrong += [f"{name} is left" for name in self.room.left()]
        wrong += [f"{name} is left" for name in self.work_left()]
        self.row(what, ended.told.strip().removeprefix("mlpmoe: "), wrong)

    def row(self, what: str, found: str, wrong: list[str]) -> None:
        shown = found.replace(str(self.folder), "…").replace("\n", " ")[:160]
        self.table.row(what, f"{len(wrong)} faults: {shown}" if wrong else shown, not wrong)
        for each in wrong:
            self.table.fault(f"{what}: {each}")

    def work_left(self) -> list[str]:
        """Folders that are there under a final name, or are half made."""
        return [f.name for f in self.folder.glob("made*")]

    def full_runs_file(self) -> None:
        """A disk fills while a sweep writes to it; with room, the same goes on."""
        with small_disk(self.folder / "full", MB) as disk:
            fill(disk, 2**13)  # a run has some 1,500 bytes
            out = ("sweep", self.model, *SWEEP, "--out", str(disk / "runs.jsonl"), *SHORT, "--json")
            ended = self.room.run(*out)
            before = (disk / "runs.jsonl").read_bytes()
            self.refused("sweep, its disk fills", ended, FULL, [])
            (disk / "ballast").unlink()
            again = self.room.run(*out)
            after = (disk / "runs.jsonl").read_bytes()
        whole = before[: before.rfind(b"\n") + 1]
        wrong = [] if again.status == 0 else [again.told]
        wrong += [] if after.startswith(whole) and whole else ["runs are lost"]
        runs = len(json.loads(again.said)["runs"]) if again.status == 0 else 0
        kept = whole.count(b"\n")
        self.row("  the same with room again", f"{kept} runs kept, {runs} in the end", wrong)

    def full_export(self) -> None:
        """A checkpoint's disk that is too small, and one that fills while it is written."""
        with small_disk(self.folder / "small", 8 * MB) as disk:
            for work in (self.files, self.memory):
                ended = self.room.run(*_into(work, disk / "made"))
                wrong = [f"{each} is left" for each in os.listdir(disk)]
                self.refused(f"{work.name}, disk too small", ended, "the disk has", wrong)
        size = 700 if self.model != "demo" else 160
        for work in (self.files, self.memory):
            with small_disk(self.folder / f"fills {work.name}", size * MB) as disk:
                running = self.room.begin(*_into(work, disk / "made"))
                if running.runs_when((disk / "made.partial").is_dir):
                    fill(disk, 0)
                ended = running.finish()
                (disk / "ballast").unlink(missing_ok=True)
                wrong = [f"{each} is left" for each in os.listdir(disk)]
                self.refused(f"{work.name}, disk fills meanwhile", ended, FULL, wrong)

    def full_temporary(self) -> None:
        """No room for temporary files; and none in the cache, which training can do without."""
        with small_disk(self.folder / "temporary disk", 64 * 2**10) as disk:
            fill(disk, 2**14)
            room = Room(self.folder, temporary=disk, cache=self.room.cache_folder)
            ended = room.run(*self.memory.arguments)
            wrong = [
                f"{each} is left" for each in os.listdir(disk) if each.startswith(("mlpmoe", "tmp"))
            ]
            self.refused("convert in memory, no room for temporary files", ended, "temp", wrong)
        with small_disk(self.folder / "cache disk", 64 * 2**10) as disk:
            room = Room(self.folder, cache=disk)
            if self.model == "demo":
                arguments = ("evaluate", self.model, "--no-speed", *TRAINED, *SHORT)
                ended = room.run(*arguments)
                wrong = [] if ended.status == 0 and not ended.told else [ended.told]
                self.row("evaluate --recover, cache full", "trained as usual", wrong)

    def files_limited(self) -> None:
        """No file may become larger than 1 MB: what a quota does to each writer."""
        for work in (self.files, self.memory):
            ended = self.room.run(*work.arguments, limit=no_file_above(MB))
            self.refused(f"{work.name}, files to 1 MB", ended, "as large", [])
        ended = self.room.run(*self.sweep.arguments, limit=no_file_above(2**13))
        self.refused("sweep, files to 8 kB", ended, "as large", [])
        self.sweep.clear(self.room)

    def read_only(self) -> None:
        """Refused before the work: at once after the libraries are read."""
        with small_disk(self.folder / "read-only", MB, writable=False) as disk:
            out = ("--out", str(disk / "runs.jsonl"))
            for name, arguments in {
                "sweep": ("sweep", self.model, *SWEEP, *out, *SHORT),
                "evaluate": ("evaluate", self.model, "--keep", "12", *out, *SHORT),
                "convert file by file": _into(self.files, disk / "made"),
                "convert in memory": _into(self.memory, disk / "made"),
                "study": ("study", "downcycling", "--plot", str(disk / "plot.svg")),
            }.items():
                ended = self.room.run(*arguments)
                self.refused(f"{name}, read-only disk", ended, "read-only", [])

    def devices(self) -> None:
        """Files that are none."""
        for device in ("/dev/full", "/dev/zero"):
            ended = self.room.run("sweep", self.model, *SWEEP, *SHORT, "--out", device)
            self.refused(f"sweep --out {device}", ended, "ordinary file", [])
        for words in (("models",), ("evaluate", self.model, "--no-speed", "--json", *SHORT)):
            ended = self.room.run(*words, said=Path("/dev/full"))
            self.refused(f"{words[0]} > /dev/full", ended, FULL, [])

    def two_writers(self) -> None:
        """Of a runs file: they share the work. Of a folder: one is told to wait."""
        both = [self.room.begin(*self.sweep.arguments, name=name) for name in "ab"]
        ended = [running.finish() for running in both]
        wrong = [each.told for each in ended if each.status]
        lines = (self.folder / "runs.jsonl").read_text().splitlines()
        specs = [json.dumps(json.loads(line)["spec"], sort_keys=True) for line in lines]
        wrong += [] if len(set(specs)) == len(specs) else ["runs were measured twice"]
        said = [json.loads(each.said)["runs"] for each in ended if not each.status]
        wrong += [] if said[0] == said[-1] else ["they come to different runs"]
        wrong += [] if len(said[0]) == len(specs) else ["runs are missing"]
        wrong += [f"{name.name} is left" for name in self.folder.glob("*.claims")]
        self.sweep.clear(self.room)
        found = f"{len(specs)} runs, each measured once, in both tables"
        self.row("two sweeps into one file", found, wrong)
        for work in (self.files, self.memory):
            both = [self.room.begin(*work.arguments, name=name) for name in "ab"]
            ended = [running.finish() for running in both]
            statuses = sorted(each.status or 0 for each in ended)
            wrong = [] if statuses[0] == 0 and statuses[1] in (1, 2) else [str(statuses)]
            told = [each for each in ended if each.status]
            wrong += [each.told for each in told if not each.one_line]
            wrong += self.room.left() + work.half_made(self.room)
            work.clear(self.room)
            found = "; ".join(each.told.strip().removeprefix("mlpmoe: ") for each in told)
            self.row(f"two of {work.name} into one folder", found, wrong)

    def page(self) -> None:
        """A page whose temporary files have no room: a sentence, and it goes on."""
        with small_disk(self.folder / "page disk", 16 * MB) as disk:
            own = self.room.environment | {"TMPDIR": str(disk), "MLPMOE_FIRST_MODEL": self.model}
            with serving(self.folder, **own) as server:
                ready(server, self.model)
                page = Page(server)
                fill(disk, 2**16)
                said = page.export()
                fine, _ = preview(server, self.model)
                log = server.log.read_text()
        wrong = [] if "Made" not in said and "wrong" not in said and said else [said]
        wrong += [] if fine else ["the page does not answer afterwards"]
        wrong += [log[-600:]] if "Traceback" in log else []
        self.row("export of the page, no room for temporary files", said, wrong)


def _into(work: Work, folder: Path) -> tuple[str, ...]:
    return tuple(str(folder) if word == work.out else word for word in work.arguments)


def disks(folder: Path, model: str, table: Table) -> None:
    """The rows of all cases."""
    cases = Disks(folder, model, table)
    for case in (
        cases.full_runs_file, cases.full_export, cases.full_temporary, cases.files_limited,
        cases.read_only, cases.devices, cases.two_writers, cases.page,
    ):  # fmt: skip
        try:
            case()
        except NotPermitted as error:
            table.row(case.__name__.replace("_", " "), f"not permitted here: {error}")
