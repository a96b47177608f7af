"""Files that are read with a limit, tried before the work whose results they get, and whose errors
are one sentence, whichever library wrote them."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

from .errors import UserError

NUMBERED = re.compile(r"\(os error (\d+)\)")  # how errors of libraries in Rust end
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


def read_limited(file: Path, most: int) -> bytes:
    """All bytes of a file, or of a pipe. Raises UserError if there are more than `most`, and
    OSError, both with a message for a person."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}.") from error
    if len(content) > most:
        raise UserError(f"{file} is too large: at most {most:,} bytes are read.")
    return content


def check_output(file: Path) -> None:
    """Raise UserError unless `file` can be written, or written on, which is tried; that leaves it
    as it was."""
    try:
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be a file: name one in a folder that exists.")
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not an ordinary file: name one that keeps what is written.")
        with open(file, "ab"):
            return
    except FileNotFoundError:  # so one has to be made, which is tried under another name
        check_folder(file.absolute().parent, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {write_reason(error)}") from None


def check_folder(folder: Path, wanted: Path) -> None:
    """Raise UserError unless something can be made in `folder`, which is tried. wanted: what is to
    be made there, as the message calls it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UserError(f"{wanted} cannot be written: {write_reason(error)}") from None


def write_reason(error: BaseException) -> str | None:
    """Why something could not be written, as the end of a sentence; None if that is not what went
    wrong. Each library raises its own kind of error: tokenizers and safetensors say the number that
    the system gave, torch not even that."""
    if isinstance(error, OSError):
        number, words = error.errno, error.strerror or str(error)
    elif found := NUMBERED.search(str(error)):
        number = int(found[1])
        words = os.strerror(number)
    elif isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)):
        return "the disk is full, or took only a part."
    else:
        return None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full."
    if number == errno.EFBIG:
        return "a file may not become as large here."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission denied, or the disk is read-only."
    return f"{words.rstrip('.')}."
