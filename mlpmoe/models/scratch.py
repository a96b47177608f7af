"""Temporary folders: those of a process lie below one root, which goes when the process ends.

A process that is killed cannot tidy up. So each root holds a file that its process keeps locked,
and whoever starts next removes the roots whose file nobody holds.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time

from filelock import FileLock, Timeout

PREFIX = "mlpmoe-"  # how the names of roots begin
LOCK = "in-use"
# Seconds after which a folder of that name without a lock was left behind: it is another version's,
# or its process was killed between two steps.
LEFT = 86_400.0

_roots: dict[tuple[int, Path], tuple[Path, FileLock]] = {}  # by process and place
_making = threading.Lock()


@contextmanager
def scratch_folder(name: str, place: Path | None = None) -> Iterator[Path]:
    """A new folder for the user of this process alone, gone afterwards.

    name: begins its own. place: where this process's root lies; None is the system's folder for
    temporary files. Raises OSError, with a message for a person, if it cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch_root(place)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_root(place: Path | None = None) -> Path:
    """The root of this process, which is made, and those of dead processes removed, when it is
    first asked for. Arguments and errors: see `scratch_folder`."""
    place = Path(tempfile.gettempdir()) if place is None else place
    with _making:
        owner = os.getpid(), place  # a forked process gets one of its own
        if owner not in _roots or not _roots[owner][0].is_dir():
            sweep_scratch(place)
            if not _roots:
                atexit.register(remove_scratch)
            try:
                _roots[owner] = _new_root(place)
            except OSError as error:
                raise OSError(
                    f"the folder for temporary files, {place}, cannot be written: {error.strerror}."
                ) from error
        return _roots[owner][0]


def _new_root(place: Path) -> tuple[Path, FileLock]:
    place.mkdir(parents=True, exist_ok=True)
    while True:
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = FileLock(root / LOCK)
        with suppress(Timeout, FileNotFoundError):  # swept between these steps
            lock.acquire(timeout=0)
            if (root / LOCK).exists():
                return root, lock
            lock.release()


def sweep_scratch(place: Path | None = None) -> None:
    """Remove what processes of this user have left in `place` as they were killed."""
    place = Path(tempfile.gettempdir()) if place is None else place
    for root in place.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):  # another process may be as fast
            about = root.lstat()
            ours = not hasattr(os, "getuid") or about.st_uid == os.getuid()
            if not ours or root.is_symlink() or not root.is_dir():
                continue
            if (root / LOCK).is_file():
                with FileLock(root / LOCK, timeout=0):
                    shutil.rmtree(root, ignore_errors=True)
            elif time() - about.st_mtime > LEFT:
                shutil.rmtree(root, ignore_errors=True)


def remove_scratch() -> None:
    """Remove all roots of this process; it is about to end."""
    for (process, place), (root, lock) in list(_roots.items()):
        if process == os.getpid():
            shutil.rmtree(root, ignore_errors=True)
            lock.release()
            _roots.pop((process, place), None)
