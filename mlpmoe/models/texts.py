"""The texts that perplexity is measured on: our own, two public ones, and a visitor's."""

from __future__ import annotations

import codecs
import errno
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mlpmoe.core.calibration import DOCUMENT_SEPARATOR
from mlpmoe.core.checks import check_characters
from mlpmoe.core.errors import UserError

from .catalogue import DEMO_KEY, assets_folder, find_entry
from .errors import ModelError, shorten

MAX_OWN_TEXT = 1_000_000  # characters
# What the GPTQ, SparseGPT and Wanda code bases measure C4 on: the first documents of the first
# file of its validation part, joined, of which the first windows count.
C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
C4_DOCUMENTS = 1100
C4_WINDOWS = 256


@dataclass(frozen=True)
class TextEntry:
    """A text with a name."""

    label: str  # on the page
    note: str
    read: Callable[[], str]
    # "documents": separated by <|endoftext|>, each scored by itself in overlapping windows;
    # "stream": joined, cut into windows without overlap, as published figures are measured
    protocol: str = "documents"
    most_windows: int | None = None  # of a stream
    source: str | None = None  # the dataset on the hub


def _shipped(name: str) -> Callable[[], str]:
    return lambda: (assets_folder() / "texts" / name).read_text(encoding="utf-8")


def _wikitext2() -> str:
    with _dataset("wikitext2") as (datasets, source):
        rows = datasets.load_dataset(source, "wikitext-2-raw-v1", split="test")
        return "\n\n".join(rows["text"])


def _c4() -> str:
    with _dataset("c4") as (datasets, source):
        rows = datasets.load_dataset(
            source,
            data_files={"validation": C4_FILE},
            split="validation",
            # datasets 4.0 misses the other files, which the card announces
            verification_mode="no_checks",
        )
        return " ".join(rows[:C4_DOCUMENTS]["text"])


TEXTS = {
    "stories": TextEntry(
        "evaluation stories", "19 stories written for this project", _shipped("evaluation.txt")
    ),
    "prose": TextEntry(
        "evaluation prose",
        "18 encyclopedia articles written for this project",
        _shipped("prose-evaluation.txt"),
    ),
    "proxy": TextEntry(
        "proxy mixture (health check)",
        "a short artificial text as in the MLPMoE paper: shows whether a model broke",
        _shipped("proxy.txt"),
    ),
    "wikitext2": TextEntry(
        "WikiText-2 (test)",
        "encyclopedia articles, windows of 2048 tokens: the usual published figure; needs a "
        "network once",
        _wikitext2,
        "stream",
        source="Salesforce/wikitext",
    ),
    "c4": TextEntry(
        "C4 (validation)",
        "web pages, 256 windows of 2048 tokens: a usual published figure; needs a network once",
        _c4,
        "stream",
        C4_WINDOWS,
        "allenai/c4",
    ),
}


CALIBRATIONS = {  # what methods may look at; never what is measured on
    "stories": TextEntry(
        "calibration stories", "stories written for this project", _shipped("calibration.txt")
    ),
    "prose": TextEntry(
        "calibration prose",
        "72 encyclopedia articles written for this project",
        _shipped("prose-calibration.txt"),
    ),
}


def default_text(model: str) -> str:
    """The key of the text that a model is measured on unless another is chosen: stories for the
    demo model, which knows nothing else, prose for all others."""
    entry = find_entry(model)
    return "stories" if entry is not None and entry.key == DEMO_KEY else "prose"


def default_calibration(model: str) -> str:
    """The key of the text that methods look at unless another is chosen: of the same kind as
    `default_text`."""
    return default_text(model)


def named_calibration(name: str) -> str:
    """The whole calibration text of that name, a key of CALIBRATIONS; UserError for others."""
    if not isinstance(name, str) or name not in CALIBRATIONS:
        raise UserError(
            f"no calibration text is called {name!r:.60}; allowed: {', '.join(CALIBRATIONS)}."
        )
    return CALIBRATIONS[name].read()


def named_text(name: str) -> str:
    """The whole text of that name: a key of TEXTS, or "calibration", our calibration stories.

    Raises UserError for other names, and ModelError if a public text cannot be had: it needs the
    package datasets and, once, a network.
    """
    if name == "calibration":
        return named_calibration("stories")
    if not isinstance(name, str) or name not in TEXTS:
        raise UserError(
            f"no text is called {name!r:.60}; allowed: {', '.join(TEXTS)}, calibration."
        )
    return TEXTS[name].read()


def check_own_text(content: str | bytes) -> str:
    """A visitor's text, with one kind of line ends. Bytes are read as `decode_text` does. Raises
    UserError for what is not text, holds nothing to predict, or is longer than MAX_OWN_TEXT."""
    text = decode_text(content) if isinstance(content, bytes) else content
    if not isinstance(text, str):
        raise UserError("there is no text: paste some, or choose a file.")
    text = _one_kind_of_line_ends(text.removeprefix("\ufeff"))
    if not any(document.strip() for document in text.split(DOCUMENT_SEPARATOR)):
        raise UserError("there is no text: paste some, or choose a file.")
    if len(text) > MAX_OWN_TEXT:
        raise UserError(
            f"the text has {len(text):,} characters; at most {MAX_OWN_TEXT:,} are allowed."
        )
    if "\0" in text:
        raise UserError(
            f"this is not text: character {text.index(chr(0)):,} is a zero. Take it out."
        )
    check_characters(text)
    return text


def decode_text(content: bytes) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, or UTF-16 with one; with one
    kind of line ends. Raises UserError, with the position of the byte, for anything else."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8"  # the former skips its mark by itself
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"the file is not {encoding.upper()} text (byte {mark + error.start:,}). Save it as "
            "UTF-8 and try again."
        ) from None
    if "\0" in text:
        start = len(text[: text.index("\0")].encode(encoding))
        raise UserError(
            f"the file is not text (byte {mark + start:,} is zero). Save it as plain text, in "
            "UTF-8, and try again."
        )
    return _one_kind_of_line_ends(text)


def text_digest(text: str) -> str:
    """12 hex digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _one_kind_of_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _dataset(key: str) -> Iterator[tuple[ModuleType, str]]:
    """The package datasets, quiet, and the source of a text; whatever goes wrong in the block
    becomes a ModelError of one sentence."""
    name, source = TEXTS[key].label, TEXTS[key].source
    try:
        import datasets
    except ImportError:
        raise ModelError(f"{name} needs the package datasets: pip install datasets.") from None
    try:
        with _quiet(datasets):
            yield datasets, source
    except Exception as error:  # transport errors are httpx's or httpx2's, by client version
        raise ModelError(_explain(error, name, source)) from error


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Without its progress bars, and the hub's client without its reports of each new attempt."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _explain(error: BaseException, name: str, source: str) -> str:
    """One sentence for whatever datasets raised. It wraps what the hub's client says, or puts only
    its name in a message, so both are looked at."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    said = "\n".join(f"{type(each).__name__} {each}" for each in chain)
    once = "it needs a network once; afterwards it is in the hub's cache"
    if any(isinstance(each, GatedRepoError) for each in chain) or "gated dataset" in said:
        return (
            f"{name} is gated: accept its conditions on huggingface.co/datasets/{source}, then "
            "sign in with a token (hf auth login)."
        )
    if OfflineModeIsEnabled.__name__ in said:
        return f"{name} is not on this machine, which is set to work offline: {once}."
    if RepositoryNotFoundError.__name__ in said or "DatasetNotFoundError" in said:
        return f"{name} cannot be found: the hub shows no dataset {source} to this machine."
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "Not enough disk space" in said:
        return f"{name} cannot be kept: the disk is full."
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"{name} cannot be kept: the folder of the hub's cache cannot be written to."
    if any(_is_outage(each) for each in chain):
        return f"{name} cannot be fetched, as the hub does not answer: {once}."
    first = str(chain[0]).strip().splitlines() or [""]
    reason = shorten(f"{type(chain[0]).__name__}: {first[0]}".removesuffix(": "))
    return f"{name} cannot be read: {once} ({reason})."


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2") or isinstance(
        error, (ConnectionError, TimeoutError, LocalEntryNotFoundError)
    )
