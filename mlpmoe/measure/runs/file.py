"""A file of runs, a line of JSON each, that a sweep goes on from and several may write to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.files import check_output, write_reason
from ...core.spec import ConversionSpec
from .sweep import Run

try:
    import fcntl
except ImportError:  # Windows: there a single write at the end of the file has to do
    fcntl = None

MOST_BYTES = 2**28  # of a file that is read; a run has some 1,500
MOST_LINE = 2**20  # bytes; longer lines are no runs
CONTENTS = ("text", "calibration")  # entries that end in a digest; the name before it may change


@dataclass(frozen=True)
class RunsFile:
    """The runs of one setting in a file, which may hold those of others as well.

    setting: what a run was measured with: model, dtype, text and calibration (a name and a digest
    of the content), protocol, window, stride. Raises UserError if the file cannot be written.
    """

    path: Path
    setting: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_output(self.path)

    def read(self) -> dict[Any, Run]:
        """Spec -> run, for all that were measured in this setting. What cannot be read, such as
        the last line of a sweep that was killed, is passed over and so measured again. OSError
        with a message for a person if the file cannot be read, UserError if it is too large."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MOST_BYTES:
                    raise UserError(
                        f"{self.path} has {size:,} bytes; at most {MOST_BYTES:,} of runs are read. "
                        "Name another file."
                    )
                lines = iter(lambda: file.readline(MOST_LINE), b"")
                runs = [run for line in lines if (run := self._run(line)) is not None]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OSError(f"{self.path} cannot be read: {error.strerror}.") from error
        return {run.spec: run for run in runs}

    def append(self, run: Run, tokens: int) -> None:
        """Write a run as one line, to the disk before this returns. tokens: that were scored.

        Whoever writes holds an advisory lock on the file, so that lines of several processes do
        not mix; a process that is killed gives it up. A line that was left broken is ended first.
        OSError with a message for a person if the disk is full or refuses it.
        """
        line = json.dumps(
            {**self.setting, "tokens": tokens, **run.to_dict()}, allow_nan=False
        ).encode()
        try:
            with self._locked() as file:
                broken = os.fstat(file).st_size and os.lseek(file, -1, os.SEEK_END) >= 0
                broken = broken and os.read(file, 1) != b"\n"
                rest = b"%s%s\n" % (b"\n" if broken else b"", line)
                while rest:  # a full disk or a signal may cut a write short
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {write_reason(error)}") from error

    def key(self, spec: ConversionSpec) -> str:
        """What tells a run of this setting from all others."""
        matters = {n: self._content(n, v) for n, v in self.setting.items()}
        if not spec.needs_calibration:
            matters.pop("calibration", None)
        return json.dumps([matters, spec.canonical().to_dict()], sort_keys=True)

    def _run(self, line: bytes) -> Run | None:
        try:
            entry = json.loads(line)
            run = Run.from_dict(entry)
            return run if self._is_ours(entry, run) else None
        except (ValueError, TypeError, KeyError, RecursionError):  # UserError is a ValueError
            return None

    def _is_ours(self, entry: Mapping[str, Any], run: Run) -> bool:
        for name, value in self.setting.items():
            if name == "calibration" and not run.spec.needs_calibration:
                continue  # it makes no difference
            if self._content(name, entry[name]) != self._content(name, value):
                return False
        return True

    @staticmethod
    def _content(name: str, value: Any) -> Any:
        """What counts of an entry of the setting."""
        return str(value).rpartition(" ")[2] if name in CONTENTS else value

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)
