"""What a person typed, made into the place of a model, or refused with a readable reason."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from .catalogue import CATALOGUE, CatalogueEntry, find_entry
from .errors import ModelError, shorten
from .gguf_choice import is_gguf
from .packaged import Package

MAX_NAME_CHARACTERS = 500
MAX_REVISION_CHARACTERS = 200
ALLOW_ANY_VARIABLE = "MLPMOE_ALLOW_ANY_MODEL"
_page_reaches_beyond = False  # see open_page_to
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(f"{_PART}/{_PART}")
_HUB_FILE = re.compile(rf"({_PART}/{_PART})/([A-Za-z0-9_][A-Za-z0-9._+-]*\.gguf)", re.IGNORECASE)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_ALLOWED = (
    "Allowed are a catalogue name, a hub id in the form owner/name, a folder, or a GGUF file in "
    "either: owner/name/FILE.gguf or folder/FILE.gguf"
)


@dataclass(frozen=True)
class HubPlace:
    """A repository on the hub, and the GGUF file of it that was named, if one was."""

    repo_id: str
    gguf: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.gguf}" if self.gguf else self.repo_id


# a folder or a GGUF file that exists; a place on the hub; a package that is installed
Place = Path | HubPlace | Package


def on_space() -> bool:
    """Whether this process serves a public Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def serves_visitors() -> bool:
    """Whether this process serves others than whoever started it: a Space, or a page that can be
    opened from other machines. To these, nothing but models is shown: not what lies on the disk,
    nor what the owner's hub token opens."""
    return on_space() or _page_reaches_beyond


def open_page_to(address: str | None, shared: bool = False) -> None:
    """Say that this process is a page, at which address (None: of this machine only), and whether
    under a public link too."""
    global _page_reaches_beyond
    _page_reaches_beyond = shared or not _is_loopback(address)


def _is_loopback(address: str | None) -> bool:
    if not address or address == "localhost":
        return True
    try:
        return ip_address(address.strip("[]")).is_loopback
    except ValueError:  # the name of a host
        return False


def host_allows_any_model() -> bool:
    """Whether models outside the catalogue may be loaded.

    Yes for whoever started this process, no for visitors; MLPMOE_ALLOW_ANY_MODEL=1 or =0 decides
    otherwise.
    """
    answer = os.environ.get(ALLOW_ANY_VARIABLE, "").strip().lower()
    if answer in ("1", "true", "yes", "on"):
        return True
    if answer in ("0", "false", "no", "off"):
        return False
    return not serves_visitors()


def identify(name: str | os.PathLike[str], *, allow_any: bool, by_host: bool = False) -> Place:
    """Where the model lies that was asked for.

    The catalogue comes first, so that a folder which happens to be called like one of its models
    is not read by accident. Without `allow_any` nothing else passes, and the disk is not looked
    at, nor is it for a visitor. by_host: whoever started this process asks. Raises ModelError.
    """
    text = _clean(name)
    entry = find_entry(text) if isinstance(name, str) else None
    if entry is None and isinstance(name, str):
        text = _without_hub_address(text)
        entry = find_entry(text)
    if entry is not None:
        return _catalogue_place(entry, text)
    if not (allow_any or by_host):
        keys = ", ".join(entry.key for entry in CATALOGUE)
        raise ModelError(f"This host loads only the models of its catalogue: {keys}.")
    on_disk = by_host or not serves_visitors()
    return _anywhere(text, is_path=not isinstance(name, str), on_disk=on_disk)


def check_revision(revision: str | None) -> str | None:
    """`revision` if it can name a branch, a tag or a commit of a hub repository."""
    if revision is None:
        return None
    fits = isinstance(revision, str) and len(revision) <= MAX_REVISION_CHARACTERS
    if not fits or not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError("A revision is the name of a branch or tag, or a commit hash.")
    return revision


def _clean(name: str | os.PathLike[str]) -> str:
    if not isinstance(name, (str, os.PathLike)):
        raise ModelError(f"A model is named by text. {_ALLOWED}.")
    text = os.fspath(name)
    text = text.strip() if isinstance(text, str) else os.fsdecode(text)
    if not text:
        raise ModelError(f"No model was named. {_ALLOWED}.")
    if len(text) > MAX_NAME_CHARACTERS:
        raise ModelError(
            f"A model name of {len(text):,} characters is too long; "
            f"{MAX_NAME_CHARACTERS} are allowed."
        )
    if not text.isprintable():
        raise ModelError(
            "The model name holds control or invisible characters. Type it instead of pasting it."
        )
    return text


def _without_hub_address(text: str) -> str:
    """owner/name, or owner/name/FILE.gguf, from the address of a model's page or of such a file;
    other text unchanged."""
    has_scheme = "://" in text
    if not has_scheme and text.split("/")[0].lower() not in HUB_HOSTS:
        return text
    try:
        address = urlsplit(text if has_scheme else f"https://{text}")
        host = address.hostname
    except ValueError:  # such as an unclosed IPv6 bracket
        host = None
    if host not in HUB_HOSTS or address.scheme not in ("http", "https"):
        raise ModelError(
            f'"{shorten(text)}" is not the address of a model page on huggingface.co. {_ALLOWED}.'
        )
    path = address.path.strip("/")
    parts = path.split("/")
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "collections", "docs", "papers"):
        raise ModelError(f'"{shorten(text)}" is an address on the hub, but not that of a model.')
    hub_id = "/".join(parts[:2])
    if len(parts) == 5 and parts[2] in ("blob", "resolve") and parts[3] == "main":
        if is_gguf(parts[4]):
            return f"{hub_id}/{parts[4]}"
    if path not in (hub_id, f"{hub_id}/tree/main"):
        raise ModelError(
            f'"{shorten(text)}" points inside a repository. Give the model as owner/name.'
        )
    return hub_id


def _catalogue_place(entry: CatalogueEntry, text: str) -> Place:
    if entry.hub_id:
        # who asks for a hub id by that id means the hub's weights
        by_hub_id = text.casefold() == entry.hub_id.casefold()
        return entry.package if entry.packaged and not by_hub_id else HubPlace(entry.hub_id)
    if not entry.source.is_dir():
        raise ModelError("The demo model is not part of this installation.")
    return entry.source


def _anywhere(text: str, *, is_path: bool, on_disk: bool) -> Place:
    if on_disk:
        path = os.path.expanduser(text)
        if os.path.isdir(path) or (is_gguf(path) and os.path.isfile(path)):
            return Path(path)
        if is_path or text.startswith((".", "~", "/", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
            what = "file" if is_gguf(text) else "folder"
            raise ModelError(f'There is no {what} "{shorten(text)}".')
        if is_gguf(text) and text.count("/") < 2:
            raise ModelError(f'There is no file "{shorten(text)}".')
    found = _HUB_FILE.fullmatch(text)
    repo_id, gguf = found.groups() if found else (text, None)
    bad = ".." in text or "--" in repo_id or repo_id.endswith(".git")
    if not _HUB_ID.fullmatch(repo_id) or bad:
        raise ModelError(f'"{shorten(text)}" does not name a model. {_ALLOWED}.')
    return HubPlace(repo_id, gguf)
