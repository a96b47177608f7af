"""Checkpoints that wait to be downloaded: one per visitor, each in a folder that nobody can guess,
of which only the zip is served.

Gradio serves what lies below its upload folder to whoever knows the path, so the zip alone is put
there; checkpoints are written and verified in a folder of the system that is not served.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from gradio.utils import get_upload_folder

from ...core.errors import UserError
from ...core.files import write_reason
from ...models.scratch import scratch_folder, scratch_root, sweep_scratch
from .export_result import Made

KEPT_SECONDS = 3600.0  # that a zip waits at most, should its visitor's leaving go unnoticed
MOST_KEPT = 8  # visitors' zips at a time; the oldest makes room


class HandedOut:
    """The zips of a server, by session."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, Made]] = {}
        self._lock = threading.Lock()
        sweep_scratch()
        sweep_scratch(Path(get_upload_folder()))

    def get(self, session: str) -> Made | None:
        """What this visitor can download; None if nothing was made, or it was removed."""
        entry = self._made.get(session)
        return entry[1] if entry and entry[1].zip.is_file() else None

    def put(self, session: str, made: Made) -> None:
        """Keep it; what this visitor had before, and what is too old, is removed."""
        self.forget(session)
        with self._lock:
            self._made[session] = (monotonic(), made)
            old = [s for s, (when, _) in self._made.items() if monotonic() - when > KEPT_SECONDS]
            old += list(self._made)[: max(0, len(self._made) - MOST_KEPT)]
        for other in old:
            self.forget(other)

    def forget(self, session: str) -> None:
        """Remove what this visitor has, if anything."""
        with self._lock:
            entry = self._made.pop(session, None)
        if entry:
            shutil.rmtree(entry[1].zip.parent, ignore_errors=True)


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder of this process's user alone, not served, and gone afterwards."""
    with scratch_folder("export") as folder:
        yield folder


def zip_folder(folder: Path) -> Path:
    """The folder as one stored, uncompressed zip where Gradio serves it from, below a name of 128
    random bits. Removed again if it fails. Raises UserError if the disk does not take it."""
    served = scratch_root(Path(get_upload_folder())) / secrets.token_hex(16)
    try:
        served.mkdir()
        file = served / f"{folder.name}.zip"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for item in sorted(folder.rglob("*")):
                if item.is_file():
                    archive.write(item, Path(folder.name, item.relative_to(folder)))
        return file
    except BaseException as error:
        shutil.rmtree(served, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"the zip was not written: {write_reason(error)}") from error
        raise
