"""The folder that a checkpoint is written to: whole, or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...core.errors import UserError
from ...core.files import check_folder, write_reason
from ...models import format_bytes
from ...models.host import free_disk
from ..check.verification import ExportError

PARTIAL = ".partial"  # end of the name of a folder that is not complete
LOCK = "lock"
DISK_RESERVE = 100_000_000  # bytes that a checkpoint leaves free


@contextmanager
def target_folder(
    folder: str | os.PathLike[str], size: int, keep_partial: bool = False
) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name when all went well.

    size: bytes that will be written. Nothing exists under the final name before the end, so what
    was interrupted is never taken for a checkpoint. What was written is removed on failure; with
    `keep_partial` an interrupt leaves it for another attempt to go on with. Raises ExportError if
    `folder` exists and is not empty, cannot be written to, is being written to, or would not fit.
    """
    final = check_target(folder)
    partial = final.with_name(final.name + PARTIAL)
    there = _size(partial) if keep_partial else 0
    check_space(final, size - there)
    # It may stop halfway: the folder is made here and filled by the caller.
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = FileLock(partial / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(f"{final} is being written by another process. Wait for it.") from None
    except OSError as error:
        raise ExportError(f"{final} cannot be written: {write_reason(error)}") from None
    try:
        if not keep_partial:
            _empty(partial)
        yield partial
        (partial / LOCK).unlink(missing_ok=True)
        os.replace(partial, final)  # also over an empty folder
    except Exception as error:
        _clear(partial, keep=False)
        reason = None if isinstance(error, UserError) else write_reason(error)
        if reason is None:
            raise
        raise ExportError(f"{final} was not written: {reason}") from error
    except BaseException as error:
        _clear(partial, keep_partial and isinstance(error, KeyboardInterrupt))
        raise
    finally:
        lock.release()
        (partial / LOCK).unlink(missing_ok=True)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder's path if a checkpoint can be written there. Raises ExportError."""
    final = Path(folder).expanduser().absolute()
    if final.name.endswith(PARTIAL) or not final.name:
        raise ExportError(f"{folder} cannot be the name of a checkpoint.")
    if final.is_file():
        raise ExportError(f"{final} is a file; a checkpoint is a folder.")
    try:
        if final.is_dir() and any(final.iterdir()):
            raise ExportError(
                f"{final} exists and is not empty. Name another folder, or remove it."
            )
    except OSError as error:
        raise ExportError(f"{final} cannot be read: {write_reason(error)}") from None
    above = final.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ExportError(f"{final} cannot be written: {above} is not a folder.")
    if final.is_mount():
        raise ExportError(f"{final} is where a disk is mounted: name a folder in it.")
    try:
        check_folder(above, final)
    except UserError as error:
        raise ExportError(str(error)) from None
    return final


def check_space(folder: Path, size: int, takes: str = "takes") -> None:
    """Raise ExportError unless `size` bytes fit beside what stays free. takes: maybe "at least"."""
    free = free_disk(folder)
    if size > 0 and size + DISK_RESERVE > free:
        raise ExportError(
            f"the checkpoint {takes} {format_bytes(size)}, but the disk has {format_bytes(free)} "
            f"free, of which {format_bytes(DISK_RESERVE)} stay reserved."
        )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.name != LOCK:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _clear(partial: Path, keep: bool) -> None:
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
