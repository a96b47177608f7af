"""Reading and checking single values of a spec, with messages for the person who gave them."""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from numbers import Integral, Real
from typing import Any

from .errors import SpecError, UserError

MAX_PATTERN = 64  # the m of n:m
NONE = "none"  # of the layers


def shown(value: Any) -> str:
    """A value for a message, short whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def known(value: Any, allowed: Container[str]) -> bool:
    """Whether it is one of the names; it may be anything."""
    return isinstance(value, str) and value in allowed


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    if not known(value, allowed):
        raise SpecError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}.")


def check_characters(text: str, what: str = "the text") -> None:
    """Raise UserError for half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start:,} of {what} is half a character (a lone surrogate). Take it "
            "out."
        ) from None


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SpecError(f"{name} must be a whole number, not {shown(value)}.")
    return int(value)


def real(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise SpecError(
            f"{name} must be a number between {low:g} and {high:g}, not {shown(value)}."
        )
    return float(value)


def pattern(unit: Any) -> tuple[int, int]:
    """n and m of "n:m"; SpecError if it is none."""
    n, colon, m = unit.partition(":") if isinstance(unit, str) else ("", "", "")
    if not colon or not (n.isdecimal() and m.isdecimal()) or len(n) + len(m) > 6:
        raise SpecError(f"fade_unit must be weight, neuron, or n:m such as 2:4; got {shown(unit)}.")
    if not 0 < int(n) < int(m) <= MAX_PATTERN:
        raise SpecError(
            f"fade_unit {unit}: of m neighbouring weights n are zeroed, so n must be at least 1 "
            f"and less than m, and m at most {MAX_PATTERN}."
        )
    return int(n), int(m)


def layer_numbers(text: Any) -> tuple[int, ...]:
    """Numbers of layers in a text, ascending, each once; "" and NONE are none. Between them may be
    commas, spaces, or plus signs: in a sweep commas part values, in a link a plus is a space."""
    parts = re.split(r"[\s,+]+", text.strip()) if isinstance(text, str) else ["?"]
    if parts in ([""], [NONE]):
        return ()
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise SpecError(
            "spared must name layers by their numbers from 0, joined by commas, such as 0,11; got "
            f"{shown(text)}."
        )
    return tuple(sorted(set(map(int, parts))))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
