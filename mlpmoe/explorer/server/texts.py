"""The texts that perplexity is measured on, by key: our own, public ones, and the visitors'."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import gradio as gr

from ...core.errors import UserError
from ...measure.words import capital
from ...models.texts import (
    CALIBRATIONS,
    TEXTS,
    check_own_text,
    named_calibration,
    named_text,
    text_digest,
)

OWN_PREFIX = "own-"  # then the digest, so that a key always means the same text
MOST_OWN = 32  # texts of visitors held in memory; the one used longest ago is forgotten
SHIPPED = ("stories", "prose", "proxy")  # need neither a network nor time


class Texts:
    """The texts of a server. Those of visitors lie in its memory only."""

    def __init__(self) -> None:
        self._own: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()

    def add(self, content: str | bytes) -> str:
        """Keep a visitor's text and return its key; UserError if it is none."""
        text = check_own_text(content)
        key = f"{OWN_PREFIX}{text_digest(text)}"
        with self._lock:
            self._own[key] = text
            self._own.move_to_end(key)
            while len(self._own) > MOST_OWN:
                self._own.popitem(last=False)
        return key

    def check(self, key: str) -> None:
        """Raise UserError, with the keys that are allowed, if no text has this one."""
        if isinstance(key, str) and (key in TEXTS or key in self._own):
            return
        if isinstance(key, str) and key.startswith(OWN_PREFIX):
            raise UserError(
                "this text of a visitor is not on the server (any more). Paste it again under "
                "“Own text”."
            )
        raise UserError(f"no text is called {key!r:.60}; allowed: {', '.join(TEXTS)}.")

    def check_calibration(self, key: str) -> None:
        """The same for a calibration text."""
        if not isinstance(key, str) or key not in CALIBRATIONS:
            if isinstance(key, str) and key.startswith(OWN_PREFIX):
                return self.check(key)
            raise UserError(
                f"no calibration text is called {key!r:.60}; allowed: {', '.join(CALIBRATIONS)}."
            )

    def read(self, key: str) -> str:
        """The whole text; from a public dataset, if need be over the network."""
        self.check(key)
        with self._lock:
            if key in self._own:
                self._own.move_to_end(key)
                return self._own[key]
        return named_text(key)

    def read_calibration(self, key: str) -> str:
        """The whole text that methods may look at: one of CALIBRATIONS, or a visitor's."""
        if isinstance(key, str) and key.startswith(OWN_PREFIX):
            return self.read(key)
        return named_calibration(key)


def text_name(key: str) -> str:
    """What the page calls a text."""
    if key in TEXTS:
        return TEXTS[key].label
    if not key.startswith(OWN_PREFIX):  # of runs that come with the project
        return key.removesuffix(".txt")
    return f"own text {key.removeprefix(OWN_PREFIX)[:6]}"


def calibration_name(key: str) -> str:
    """The same for a calibration text."""
    return CALIBRATIONS[key].label if key in CALIBRATIONS else text_name(key)


def text_choices(key: str | None = None) -> list[tuple[str, str]]:
    """Labels and keys for the list of texts, with a visitor's own one, if `key` is one."""
    choices = [(capital(entry.label), name) for name, entry in TEXTS.items()]
    if key and key.startswith(OWN_PREFIX):
        choices.append((capital(text_name(key)), key))
    return choices


def calibration_choices(key: str | None = None) -> list[tuple[str, str]]:
    """The same for the list of calibration texts."""
    choices = [(capital(entry.label), name) for name, entry in CALIBRATIONS.items()]
    if key and key.startswith(OWN_PREFIX):
        choices.append((capital(text_name(key)), key))
    return choices


def show_text(key: str) -> dict:
    """The update of the list of texts that chooses this one."""
    return _chosen(key, text_choices(key))


def show_calibration(key: str) -> dict:
    return _chosen(key, calibration_choices(key))


def _chosen(key: str, choices: list[tuple[str, str]]) -> dict:
    """With the list only where there is a new one: given again, it may make a page that is drawn
    slowly say at every message that another one was chosen."""
    own = key.startswith(OWN_PREFIX)
    return gr.update(value=key, **({"choices": choices} if own else {}))
