"""A recovery on its way, kept in a file, so that it goes on after the process was killed."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..spec import ConversionSpec

FORMAT = 3
ENDING = ".recovery"
PARTIAL = ".partial"  # end of the name of a file that is being written, after its process
OLD = 7 * 24 * 3600  # seconds after which nobody comes back to a file
KEPT = 16  # files of a folder; the one written longest ago makes room
RESERVE = 2**29  # bytes of the disk that stay free
COPIES = 4  # of what is trained: itself, two moments, the best so far


@dataclass(frozen=True)
class Saved:
    """The file of one recovery in a folder of such files. It holds plain values and tensors only
    and is read as such, so a file of somebody else can run nothing."""

    folder: Path
    key: str

    @property
    def file(self) -> Path:
        return self.folder / f"{self.key[:32]}{ENDING}"

    def read(self) -> dict[str, Any] | None:
        """What was written last; None without a file, or with a damaged one or another's."""
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def write(self, values: dict[str, Any]) -> None:
        """Replace what is there, in one go. A disk that is full or may not be written to only
        costs the way back. values["weights"]: what is trained, all else is as large in all."""
        partial = self.file.with_suffix(f".{os.getpid()}{PARTIAL}")
        size = COPIES * sum(tensor.nbytes for tensor in values["weights"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room()
            if shutil.disk_usage(self.folder).free < RESERVE + size:
                return
            torch.save(values | {"key": self.key}, partial)
            os.replace(partial, self.file)
        except (OSError, RuntimeError):  # torch's own writer raises the second
            pass
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _make_room(self) -> None:
        self._sweep()
        others = [file for file in self.folder.glob(f"*{ENDING}") if file != self.file]
        others.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        for file in others[KEPT - 1 :]:
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """It is done. Files that were left behind long ago go, too."""
        with suppress(OSError):
            self.file.unlink(missing_ok=True)
            self._sweep()
            for other in self.folder.glob(f"*{ENDING}"):
                if time.time() - other.stat().st_mtime > OLD:
                    other.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what processes were writing as they were killed. Where one of another machine
        writes here, this costs it no more than this one file."""
        for other in self.folder.glob(f"*{PARTIAL}"):
            process = other.name.split(".")[-2]
            if not process.isdecimal() or not psutil.pid_exists(int(process)):
                other.unlink(missing_ok=True)


def key_of(
    model: PreTrainedModel, trained: Iterable[Tensor], spec: ConversionSpec,
    calibration: Calibration, seconds: float | None = None,
) -> str:  # fmt: skip
    """What tells recoveries apart: the spec, the text, what they begin with, and a limit of time,
    since that decides over how many steps the rate falls. Of the model beside the trained tensors
    a few numbers of each tensor count."""
    digest = hashlib.sha256(f"{FORMAT} {spec.canonical().to_query()} {seconds}".encode())
    digest.update(model.config.to_json_string().encode())
    digest.update(_bytes(calibration.samples))
    for tensor in trained:
        digest.update(_bytes(tensor))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.flatten()[:64]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes()
