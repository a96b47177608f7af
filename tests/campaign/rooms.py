"""A command in a process of its own, in a folder that holds all that it may write to, and how it
ends there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mlpmoe.models.packaged import cache_folder
from tests.campaign.server import ROOT

SOON = 3.0  # seconds in which a process that is asked to has ended, and what it started as well
LONGEST = 900  # seconds that a command may take
OTHERS = ("torchinductor_", "gradio", "ballast")  # begin the names of temporary files


@dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    status: int | None  # None: it had to be killed
    seconds: float  # after it was asked to
    helpers: int  # processes that it had started and that outlived it by SOON
    said: str
    told: str  # on stderr

    def of(self, number: int) -> bool:
        """Whether of this signal: as the shell sees both, by itself or by the system's hand."""
        return self.status in (128 + number, -number)

    @property
    def one_line(self) -> bool:
        """Whether what it told is a sentence, and no more."""
        told = self.told.strip()
        return told.startswith("mlpmoe: ") and "\n" not in told and "Traceback" not in told


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen
    said: Path
    told: Path
    began: float = field(default_factory=time.monotonic)

    def runs_until(self, moment: float) -> bool:
        """Whether it still runs so many seconds after it began."""
        try:
            self.process.wait(max(0.0, self.began + moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            return True
        return False

    def runs_when(self, come: Callable[[], bool]) -> bool:
        """Whether it still runs as something has come to be."""
        while not come():
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def end(self, number: int) -> Ended:
        """Send it a signal, and see."""
        return self._ended(self._helpers(), lambda: self.process.send_signal(number))

    def finish(self) -> Ended:
        """Let it end by itself."""
        return self._ended([], lambda: None, LONGEST)

    def _ended(
        self, helpers: list[psutil.Process], ask: Callable[[], None], longest: float = 5 * SOON
    ) -> Ended:
        asked = time.monotonic()
        ask()
        try:
            status = self.process.wait(longest)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        seconds = time.monotonic() - asked
        _, alive = psutil.wait_procs(helpers, SOON)
        said = self.said.read_text(errors="replace")
        return Ended(status, seconds, len(alive), said, self.told.read_text(errors="replace"))

    def _helpers(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@dataclass(frozen=True)
class Room:
    """temporary, cache: elsewhere than in the folder."""

    folder: Path
    temporary: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for folder in (self.temporary_folder, self.cache_folder):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def temporary_folder(self) -> Path:
        return self.temporary or self.folder / "temporary"

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.folder / "cache"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary_folder),
            "MLPMOE_CACHE": str(self.cache_folder), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def begin(
        self, *arguments: str, said: Path | None = None, limit: Callable[[], None] | None = None,
        name: str = "",
    ) -> Running:  # fmt: skip
        """Start `python -m mlpmoe` with these arguments. said: where its output goes; limit: called
        in the new process; name: of the files of its output."""
        said, told = said or self.folder / f"{name}said", self.folder / f"{name}told"
        with open(said, "wb") as out, open(told, "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlpmoe", *arguments], cwd=self.folder,
                env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, preexec_fn=limit,
            )  # fmt: skip
        return Running(process, said if said.is_file() else Path(os.devnull), told)

    def run(self, *arguments: str, **ways: object) -> Ended:
        return self.begin(*arguments, **ways).finish()

    def left(self) -> list[str]:
        """Temporary files that are there, but for those that others keep."""
        found = [f for f in self.temporary_folder.iterdir() if not f.name.startswith(OTHERS)]
        found += self.temporary_folder.glob("gradio/mlpmoe-*")
        return [str(path.relative_to(self.temporary_folder)) for path in found]


def cache_of(model: str, folder: Path) -> Path | None:
    """A cache with the model, if it is one that is kept there; None: an empty one."""
    kept = [found for found in cache_folder().glob("SmolLM2*") if found.is_dir()]
    if model != "smollm2-135m" or not kept:
        return None
    cache = folder / "cache"
    cache.mkdir()
    for found in kept:
        shutil.copytree(found, cache / found.name)
    return cache


def name_of(number: int) -> str:
    return "kill -9" if number == signal.SIGKILL else signal.Signals(number).name


def until_the_end(number: int, seconds: float) -> str:
    """In which time a work ended; there is none to a kill."""
    return "" if number == signal.SIGKILL else f"; ended within {seconds:.1f} s"


def without(values: object, names: Collection[str]) -> object:
    """Plain values without the entries of these names, at any depth."""
    if isinstance(values, dict):
        return {k: without(v, names) for k, v in values.items() if k not in names}
    if isinstance(values, list):
        return [without(value, names) for value in values]
    return values
