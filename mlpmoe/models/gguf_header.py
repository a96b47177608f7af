"""The header of a GGUF file: what it says of its model, and where its tensors lie.

Written from the specification of GGUF, version 3. No weight is read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelError, format_bytes, shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the file names none
MAX_ENTRIES = 100_000  # of keys or tensors; real files have some hundred to some thousand
MAX_DIMENSIONS = 4
MAX_HEADER = 300_000_000  # bytes; a vocabulary of 262,144 tokens takes about 15 MB
FIRST_PIECE = 4_000_000  # bytes of a header that is fetched piece by piece

_STRING, _ARRAY = 8, 9
_SCALARS = {  # number of a type in the file -> its letter for struct
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}

Read = Callable[[int], bytes]  # the first so many bytes of a file, or all of it


class _TooShort(Exception):
    """The header goes on behind the bytes at hand."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file."""

    shape: tuple[int, ...]  # as torch has it, the slowest dimension first
    kind: int  # number of its format, see `format_name`
    offset: int  # bytes, from the beginning of the data

    @property
    def count(self) -> int:
        """Weights in it."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        return self.count // block * size


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    metadata: dict[str, Any]  # arrays of strings as their length
    tensors: dict[str, TensorEntry]
    data_start: int  # bytes before the first tensor

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it: "llama", "qwen2", ..."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def formats(self) -> set[str]:
        """Names of the formats of its tensors: {"F32", "Q4_K", ...}."""
        return {format_name(entry.kind) for entry in self.tensors.values()}

    @property
    def quantised(self) -> bool:
        """Whether any tensor is stored in less than a float of 16 bits per weight."""
        return bool(self.formats - _FLOATS)

    @property
    def size(self) -> int:
        """Bytes that the whole file must have."""
        ends = (entry.offset + entry.size for entry in self.tensors.values())
        return self.data_start + max(ends, default=0)

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(entry.count for entry in self.tensors.values())


def read_header(file: Path, name: str) -> Header:
    """The header of a file on disk, which is checked for truncation. Raises ModelError; `name` is
    what the message calls the file."""
    try:
        size = file.stat().st_size
        if size < len(MAGIC):
            raise _damaged(name)
        with (
            open(file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as m,
        ):
            header = _parsed(m, name)
    except _TooShort:
        raise _damaged(name) from None
    except OSError:
        raise ModelError(f"{name} cannot be read.") from None
    return checked_size(header, size, name)


def fetch_header(read: Read, size: int, name: str) -> Header:
    """The header of a file elsewhere that has `size` bytes, of which few more are read."""
    wanted = FIRST_PIECE
    while True:
        content = read(min(wanted, size))
        try:
            return checked_size(_parsed(content, name), size, name)
        except _TooShort:
            if wanted >= min(size, MAX_HEADER):
                raise _damaged(name) from None
            wanted *= 4


def checked_size(header: Header, size: int, name: str) -> Header:
    """The header, if a file of `size` bytes can hold its tensors, and they can be read."""
    unreadable = sorted(
        format_name(kind)
        for kind in {entry.kind for entry in header.tensors.values()}
        if not can_read(kind)
    )
    if unreadable:
        raise ModelError(
            f"{name} is quantised as {', '.join(unreadable)}, which cannot be read here. Choose a "
            "file of another format, such as Q8_0, Q4_K_M or F16."
        )
    if header.size > size:
        raise ModelError(
            f"{name} is cut off: it has {format_bytes(size)} of {format_bytes(header.size)}. "
            "Download or copy it again."
        )
    return header


def format_name(kind: int) -> str:
    """ "Q4_K" and the like; "format 99" for a number that the package gguf does not know."""
    import gguf

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return f"format {kind}"


@cache
def can_read(kind: int) -> bool:
    """Whether the package gguf turns tensors of this format into floats: tried on a block of
    zeros."""
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        _, size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def check_package(name: str) -> None:
    """Raise ModelError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{name} is a GGUF file, for which the package gguf is needed: pip install gguf."
        ) from None


def _parsed(buffer: bytes | mmap.mmap, name: str) -> Header:
    check_package(name)
    reader = _Reader(buffer)
    if reader.bytes(4) != MAGIC:
        raise ModelError(f"{name} is not a valid GGUF file.")
    version, tensors, keys = reader.numbers("IQQ")
    if version not in VERSIONS:
        raise ModelError(
            f"{name} is GGUF of version {version:,}; "
            f"{' and '.join(map(str, VERSIONS))} can be read, little-endian."
        )
    if max(tensors, keys) > MAX_ENTRIES:
        raise _damaged(name)
    try:
        metadata = dict(reader.pair() for _ in range(keys))
        entries = dict(reader.tensor() for _ in range(tensors))
    except (ValueError, RecursionError):  # also what is not UTF-8
        raise _damaged(name) from None
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(name)
    return Header(metadata, entries, -(-reader.position // alignment) * alignment)


class _Reader:
    """Goes through a header from its beginning. Raises _TooShort where the bytes end, and
    ValueError for what cannot be."""

    def __init__(self, buffer: bytes | mmap.mmap) -> None:
        self.buffer, self.position = buffer, 0

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > min(len(self.buffer), MAX_HEADER):
            raise _TooShort
        found = self.buffer[self.position : end]
        self.position = end
        return found

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self.bytes(struct.calcsize(f"<{kinds}")))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return self.bytes(length).decode()

    def pair(self) -> tuple[str, Any]:
        key = self.string()
        (kind,) = self.numbers("I")
        return key, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"no value has the type {kind}")
        inner, count = self.numbers("IQ")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.bytes(count * size)))
        if inner != _STRING:
            raise ValueError(f"no array holds values of the type {inner}")
        for _ in range(count):  # a vocabulary: only passed by
            (length,) = self.numbers("Q")
            self.bytes(length)
        return count

    def tensor(self) -> tuple[str, TensorEntry]:
        name = self.string()
        (dimensions,) = self.numbers("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        return name, TensorEntry(tuple(reversed(shape)), *self.numbers("IQ"))


def _damaged(name: str) -> ModelError:
    return ModelError(
        f"{shorten(name)} is a damaged GGUF file, or one that was cut off. Download or copy it "
        "again."
    )
