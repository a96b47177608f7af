"""Several sweeps that write to one file share the work: who claims a spec first measures it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from ...core.spec import ConversionSpec
from .file import RunsFile
from .sweep import Report, Run, Take

try:
    import fcntl
except ImportError:  # Windows: there each sweep looks what is in the file by now, and no more
    fcntl = None

POLL = 1.0  # seconds between looks at what others have measured


class Sharing:
    """What of a file's runs this process measures. A block: it ends with the claims.

    A claim is an advisory lock on one byte of FILE.claims, which goes when its process ends,
    however that happens. Where that file cannot be made, specs that are measured at the same moment
    are measured twice.
    """

    def __init__(self, file: RunsFile) -> None:
        self.file = file
        self._claims: int | None = None
        self._seen: tuple[int, int] | None = None
        self._known: dict[ConversionSpec, Run] = {}

    def __enter__(self) -> Sharing:
        if fcntl:
            with suppress(OSError):
                self._claims = os.open(self._claims_file, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        if self._claims is not None:
            with suppress(OSError):  # somebody else claims something
                fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._claims_file.unlink()
            os.close(self._claims)
            self._claims = None

    @property
    def _claims_file(self) -> Path:
        return self.file.path.with_name(self.file.path.name + ".claims")

    def take(self, specs: Sequence[ConversionSpec]) -> list[ConversionSpec]:
        """Those of `specs` that this process is to measure: nobody else has, or does."""
        mine = [spec for spec in specs if self._claim(spec)]
        return self.left(mine)  # after the claim, so that nothing falls between

    def left(self, specs: Sequence[ConversionSpec]) -> list[ConversionSpec]:
        """Those of `specs` that are not in the file by now."""
        with suppress(FileNotFoundError):
            about = self.file.path.stat()
            if self._seen != (about.st_size, about.st_mtime_ns):
                self._known = self.file.read()
                self._seen = about.st_size, about.st_mtime_ns
        return [spec for spec in specs if spec not in self._known]

    def _claim(self, spec: ConversionSpec) -> bool:
        if self._claims is None:
            return True
        key = hashlib.sha256(self.file.key(spec).encode()).digest()
        try:
            fcntl.lockf(
                self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(key[:7]) + 1
            )  # fmt: skip
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


def measured_together(
    measure: Callable[[Sequence[ConversionSpec], Take], Iterator[Run]],
    specs: Sequence[ConversionSpec],
    file: RunsFile,
    tokens: int,
    report: Report,
) -> Iterator[Run]:
    """The runs that this process measures, each in the file before it is yielded, until all of
    `specs` are there. measure(specs, take): measures what `take` gives it of them, group by group.
    tokens: that are scored."""
    with Sharing(file) as sharing:
        left: Sequence[ConversionSpec] = specs
        while left:
            with closing(measure(left, sharing.take)) as measuring:
                for run in measuring:
                    file.append(run, tokens)
                    yield run
            left = sharing.left(left)
            while left and not sharing.take(left):
                report(f"waiting for {len(left)} runs that another sweep measures")
                time.sleep(POLL)
                left = sharing.left(left)
