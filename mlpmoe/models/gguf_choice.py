"""Which GGUF file of a folder or a repository is meant: one that is named, or the only one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .checkpoint import Checkpoint, refuse_if_adapter
from .errors import ModelError, format_bytes, shorten
from .gguf_header import Header, fetch_header, read_header

ENDING = ".gguf"
SHOWN = 12  # names in a message
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def is_gguf(name: str) -> bool:
    return name.lower().endswith(ENDING)


def choose_gguf(checkpoint: Checkpoint, wanted: str | None) -> str | None:
    """The name of the GGUF file to read; None for a checkpoint of safetensors.

    wanted: the file that was named, if one was; `PLACE/FILE.gguf` names it, whether the place is
    a folder or owner/name on the hub. Raises ModelError, with the names there are, if none of
    several is named.
    """
    files = sorted(name for name in checkpoint.sizes if is_gguf(name))
    if wanted is None and (checkpoint.has_safetensors or not files):
        return None
    if wanted is None:
        refuse_if_adapter(checkpoint)
        # what sees images for a model is not a model of text
        files = [name for name in files if not name.lower().startswith("mmproj")] or files
        whole = [name for name in files if not _PART.search(name)]
        if len(whole) > 1:
            raise ModelError(
                f"{checkpoint.name} has {len(whole)} GGUF files; name one of them as "
                f"{shorten(checkpoint.name)}/{whole[0]}. There are: {_listed(checkpoint, whole)}."
            )
        wanted = (whole or files)[0]
    if wanted not in files:
        there = f"There are: {_listed(checkpoint, files)}." if files else "It has no GGUF files."
        raise ModelError(f"{checkpoint.name} has no file {shorten(wanted)}. {there}")
    if _PART.search(wanted):
        raise ModelError(
            f"{shorten(wanted)} is one part of a model that was split into several GGUF files, "
            "which cannot be read. Join them first (llama-gguf-split --merge)."
        )
    return wanted


def header_in(checkpoint: Checkpoint, file: str) -> Header:
    """The header of a GGUF file of the checkpoint, of which on the hub only the beginning is
    fetched. Raises ModelError."""
    name = shorten(file)
    if checkpoint.folder is not None:
        header = read_header(checkpoint.folder / file, name)
    else:
        size = checkpoint.sizes[file]
        header = fetch_header(lambda count: checkpoint.beginning(file, count), size, name)
    if header.metadata.get("general.type") == "adapter":
        raise ModelError(
            f"{name} is an adapter (LoRA), not a whole model. Merge it into its base model first."
        )
    return header


def _listed(checkpoint: Checkpoint, files: Iterable[str]) -> str:
    names = [f"{shorten(name)} ({format_bytes(checkpoint.sizes[name])})" for name in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
