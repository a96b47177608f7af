"""Everything that can be known, and refused, before a weight is downloaded or read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from . import host, hub
from .architecture import Architecture, inspect
from .checkpoint import (
    CONFIG,
    Checkpoint,
    folder_checkpoint,
    read_config,
    small_files,
    total_bytes,
    weight_files,
)
from .errors import ModelError, format_bytes, format_parameters, shorten
from .names import check_revision, host_allows_any_model, identify
from .origin import Origin

# Memory that work with a model takes, as a multiple of its weights:
#   1.00  the dense model
#   0.55  one converted copy of what fade changes, gate and up: two thirds of the MLPs, and so at
#         most about 0.55 of a model; everything else is shared with the dense model
#   0.45  activations, logits (a window of 512 tokens has 0.3 GB of them for a vocabulary of
#         150,000), key-value caches of two models that write side by side, the allocator's slack
MEMORY_FACTOR = 2.0
DISK_RESERVE = 500_000_000  # bytes that a download leaves free


@dataclass(frozen=True)
class Preflight:
    """A model that can be loaded here, and how."""

    source: str  # hub id, or the folder's path
    name: str  # as messages call it
    revision: str | None  # commit on the hub; None for a folder of one's own
    folder: Path | None  # where the files lie; None if they have to be downloaded
    small_files: tuple[str, ...]  # config and tokenizer
    weight_files: tuple[str, ...]
    architecture: str  # class name, e.g. "LlamaForCausalLM"
    parameters: int  # exact, tied weights counted once
    bytes_on_disk: int  # of the files above
    download: int  # bytes of them that still have to be downloaded
    memory_needed: int  # bytes, of the device's memory
    memory_available: int | None  # bytes; None if the driver does not tell
    dtype: torch.dtype
    device: torch.device
    saved_dtype: torch.dtype  # of the files
    licence: str | None  # as the model's card names it

    @property
    def origin(self) -> Origin:
        """What a model loaded from these files remembers of them."""
        return Origin(
            self.name, self.revision is not None, self.revision, self.saved_dtype, self.licence
        )


def preflight(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    allow_any: bool | None = None,
    reclaimable: int = 0,
    in_memory: bool = True,
) -> Preflight:
    """Check name, files, architecture, memory and disk; downloads at most config.json and index.

    source: a key or label of the catalogue, a hub id (or the address of its page), or a folder.
    revision: branch, tag or commit on the hub. token: for gated and private models; without one,
    that of the person who is signed in, except on a Space. allow_any: whether models outside the
    catalogue are allowed; None lets the host decide (`host_allows_any_model`). reclaimable: bytes
    that the caller will free before loading; they count as available. in_memory: whether the model
    will be held in memory as a whole, and so has to fit.

    Needs no network for folders. Raises ModelError, UnsupportedModelError (its MLPs cannot be
    split) or UserError (no such dtype or device), each with a message for the person who asked.
    """
    wanted_dtype, wanted_device = host.parse_dtype(dtype), host.parse_device(device)
    revision = check_revision(revision)
    if allow_any is None:
        allow_any = host_allows_any_model()
    found = identify(source, allow_any=allow_any)
    checkpoint = _find(found, revision, token)
    config = read_config(checkpoint)
    weights, small = weight_files(checkpoint), small_files(checkpoint)
    architecture = inspect(config, checkpoint.fetch(CONFIG).parent, checkpoint.name)
    chosen = host.choose_dtype(
        wanted_dtype,
        device=wanted_device,
        parameters=architecture.parameters,
        saved=architecture.saved_dtype,
    )
    available = host.available_memory(wanted_device)
    if available is not None:
        available += reclaimable
    if in_memory:
        _check_memory(checkpoint.name, architecture, chosen, wanted_device, available)
    download = _missing_bytes(checkpoint, weights + small)
    _check_disk(checkpoint, download)
    return Preflight(
        source=str(found),
        name=checkpoint.name,
        revision=checkpoint.revision,
        folder=checkpoint.folder,
        small_files=small,
        weight_files=weights,
        architecture=architecture.name,
        parameters=architecture.parameters,
        bytes_on_disk=total_bytes(checkpoint, weights + small),
        download=download,
        memory_needed=memory_needed(architecture.parameters, chosen),
        memory_available=available,
        dtype=chosen,
        device=wanted_device,
        saved_dtype=architecture.saved_dtype,
        licence=checkpoint.licence,
    )


def memory_needed(parameters: int, dtype: torch.dtype) -> int:
    """Bytes to hold a model and one conversion of it, and to run both."""
    return int(parameters * dtype.itemsize * MEMORY_FACTOR)


def _find(found: str | Path, revision: str | None, token: str | None) -> Checkpoint:
    if isinstance(found, str):
        return hub.find_on_hub(found, revision, token)
    if revision is not None:
        raise ModelError("A folder has no revisions; leave the revision out.")
    # The last part of a path is enough to recognise it, and says nothing about the machine.
    return folder_checkpoint(found, shorten(found.resolve().name))


def _missing_bytes(checkpoint: Checkpoint, files: tuple[str, ...]) -> int:
    if checkpoint.folder is not None:
        return 0
    missing = (
        file for file in files if not hub.is_cached(checkpoint.name, file, checkpoint.revision)
    )
    return total_bytes(checkpoint, missing)


def _check_disk(checkpoint: Checkpoint, download: int) -> None:
    free = host.free_disk(hub.cache_folder())
    if download and download + DISK_RESERVE > free:
        raise ModelError(
            f"{checkpoint.name} is a download of {format_bytes(download)}, but the disk has "
            f"{format_bytes(free)} free, of which {format_bytes(DISK_RESERVE)} stay reserved."
        )


def _check_memory(
    name: str,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    available: int | None,
) -> None:
    needed = memory_needed(architecture.parameters, dtype)
    if available is None or needed <= available:
        return
    smaller = memory_needed(architecture.parameters, torch.bfloat16)
    advice = (
        f"In bfloat16 it would fit ({format_bytes(smaller)})."
        if smaller <= available and smaller < needed
        else "Choose a smaller model."
    )
    place = "this machine" if device.type != "cuda" else f"the GPU ({device})"
    raise ModelError(
        f"{name} ({format_parameters(architecture.parameters)} parameters) needs about "
        f"{format_bytes(needed)} in {str(dtype).removeprefix('torch.')}, {place} has "
        f"{format_bytes(available)} free. {advice}"
    )
