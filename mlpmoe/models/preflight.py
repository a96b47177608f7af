"""Everything that can be known, and refused, before a weight is downloaded or read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from . import host, hub
from .architecture import Architecture, build_empty, inspect
from .catalogue import DEMO_KEY, assets_folder
from .checkpoint import (
    CARD,
    Checkpoint,
    companions,
    folder_checkpoint,
    small_files,
    total_bytes,
    weight_files,
)
from .errors import ModelError, format_bytes, shorten
from .gguf_choice import choose_gguf, header_in
from .gguf_config import ROPE_FREQUENCIES, config_of
from .gguf_header import Header
from .gguf_reading import check_tokenizer, saved_dtype
from .memory import check_memory, memory_needed
from .names import HubPlace, Place, check_revision, host_allows_any_model, identify
from .origin import Origin
from .packaged import Package

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
    gguf: str | None = None  # the GGUF file that the weights are from
    package: Package | None = None  # which has that file, and is converted on the first load
    companions: tuple[str, ...] = ()  # files for tokenizer and processors, read here or not

    @property
    def reads_gguf(self) -> bool:
        """Whether the weights are read from the GGUF file itself."""
        return self.gguf is not None and self.weight_files == (self.gguf,)

    @property
    def origin(self) -> Origin:
        """What a model loaded from these files remembers of them."""
        return Origin(
            self.package.model if self.package else self.name,
            self.package is not None or self.revision is not None,
            self.revision,
            self.saved_dtype,
            self.licence,
            self.gguf,
        )


def preflight(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    allow_any: bool | None = None,
    by_host: bool = False,
    reclaimable: int = 0,
    in_memory: bool = True,
) -> Preflight:
    """Check name, files, architecture, memory and disk; downloads at most config.json and index,
    or the header of a GGUF file.

    source: a key or label of the catalogue, a hub id (or the address of its page), a folder, or a
    GGUF file: its path, or owner/name/FILE.gguf on the hub. A place that has several GGUF files
    and no safetensors needs one of them to be named. revision: branch, tag or commit on the hub.
    token: for gated and private models; without one, that of the person who is signed in, except
    on a Space. allow_any: whether models outside the catalogue are allowed; None lets the host
    decide (`host_allows_any_model`). by_host: whether whoever started this process asks, where it
    serves others too: then any model and any folder is allowed. reclaimable: bytes that the caller
    will free before loading; they count as available. in_memory: whether the model will be held in
    memory as a whole, and so has to fit.

    Needs no network for what is on this machine. Raises ModelError, UnsupportedModelError (its
    MLPs cannot be split) or UserError (no such dtype or device), each with a message for the
    person who asked.
    """
    wanted_dtype, wanted_device = host.parse_dtype(dtype), host.parse_device(device)
    revision = check_revision(revision)
    if allow_any is None:
        allow_any = host_allows_any_model()
    place = identify(source, allow_any=allow_any, by_host=by_host)
    checkpoint, wanted = _find(place, revision, token)
    licence = checkpoint.licence
    gguf = choose_gguf(checkpoint, wanted)
    if gguf is None:
        architecture = inspect(checkpoint)
        weights, small = weight_files(checkpoint), small_files(checkpoint)
    else:
        header = header_in(checkpoint, gguf)
        architecture = _inspect_gguf(checkpoint, gguf, header)
        licence = licence or header.metadata.get("general.license")
        weights, small = (gguf,), ()
    chosen = host.choose_dtype(
        wanted_dtype,
        device=wanted_device,
        parameters=architecture.parameters,
        saved=architecture.saved_dtype,
    )
    package = place if isinstance(place, Package) else None
    available = host.available_memory(wanted_device)
    if available is not None:
        available += reclaimable
    unpacked_here = gguf is not None and wanted_device.type != "cuda"
    if in_memory:
        check_memory(
            checkpoint.name, architecture, chosen, wanted_device, available, gguf=unpacked_here
        )
    elif available is not None and architecture.buffer_bytes > available:
        raise ModelError(
            f"{checkpoint.name} keeps tables of {format_bytes(architecture.buffer_bytes)} for its "
            f"context; this machine has {format_bytes(available)} free. Choose a smaller model."
        )
    download = _missing_bytes(checkpoint, weights + small)
    _check_disk(checkpoint, download)
    return Preflight(
        source=checkpoint.name if package else str(place),
        name=checkpoint.name,
        revision=checkpoint.revision,
        folder=checkpoint.folder,
        small_files=small,
        weight_files=weights,
        architecture=architecture.name,
        parameters=architecture.parameters,
        bytes_on_disk=total_bytes(checkpoint, weights + small),
        download=download,
        memory_needed=memory_needed(architecture, chosen, gguf=unpacked_here),
        memory_available=available,
        dtype=chosen,
        device=wanted_device,
        saved_dtype=architecture.saved_dtype,
        licence=package.licence if package else licence,
        gguf=package.file if package else gguf,
        package=package,
        companions=companions(checkpoint) if gguf is None else (),
    )


def _find(place: Place, revision: str | None, token: str | None) -> tuple[Checkpoint, str | None]:
    """The files at a place, and the GGUF file that was named."""
    if isinstance(place, HubPlace):
        return hub.find_on_hub(place.repo_id, revision, token, place.gguf), place.gguf
    if revision is not None:
        raise ModelError("A folder has no revisions; leave the revision out.")
    if isinstance(place, Package):
        folder = place.converted or place.gguf.parent
        found = folder_checkpoint(folder, place.label, links=True)
        return found, None if place.converted else place.file
    # The last part of a path is enough to recognise it, and says nothing about the machine.
    name = shorten(place.resolve().name)
    if place.is_dir():
        ours = place == assets_folder() / DEMO_KEY  # which installers may put there as links
        return folder_checkpoint(place, name, links=ours), None
    # Of its folder nothing else is read, and whoever names a link means what it leads to.
    return folder_checkpoint(place.parent, name, links=True), place.name


def _inspect_gguf(checkpoint: Checkpoint, file: str, header: Header) -> Architecture:
    """What a GGUF file says it is made of, if that is all that is in it."""
    name = checkpoint.name if checkpoint.name == file else f"{checkpoint.name}/{file}"
    if checkpoint.folder is None and CARD in checkpoint.sizes:
        checkpoint.fetch(CARD)  # by its branch, so that the file is found again without network
    check_tokenizer(header, name)
    found = build_empty(config_of(header, name), name, saved_dtype(header))
    extra = header.tensors.get(ROPE_FREQUENCIES)
    inside = header.parameters - (extra.count if extra else 0)
    if inside != found.parameters:
        raise ModelError(
            f"The tensors of {name} are not those of a {found.name}: they have {inside:,} weights "
            f"where the model has {found.parameters:,}. Choose the original model."
        )
    return found


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
