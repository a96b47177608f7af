"""The one error of this folder, and how its sentences are worded."""

from __future__ import annotations

from mlpmoe.core.errors import UserError

SHOWN_CHARACTERS = 80  # of a name that somebody typed, in a message


class ModelError(UserError):
    """A model cannot be loaded here; the message says why and what would work."""


def shorten(text: str) -> str:
    """`text` as a message may show it: one line of printable characters, cut if it is long."""
    cut = text[: SHOWN_CHARACTERS + 1]
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."


def format_bytes(count: float) -> str:
    """Decimal units, as disks and memory are sold: 270 MB, 32.1 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= 0.9995 * size:
            return f"{count / size:,.1f} {unit}"
    if count >= 0.9995e6:
        return f"{count / 1e6:.0f} MB"
    return f"{max(count, 0) / 1e3:.0f} kB"


def format_parameters(count: int) -> str:
    """8.0 billion, 494 million, 260 thousand."""
    if count >= 0.9995e9:
        return f"{count / 1e9:,.1f} billion"
    if count >= 0.9995e6:
        return f"{count / 1e6:.0f} million"
    return f"{count / 1e3:.0f} thousand"
