"""Every combination of values of a spec's fields: what a sweep measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal
from itertools import product
from math import prod
from typing import Any, TypeVar

from ...core.checks import boolean, shown
from ...core.errors import SpecError, UserError
from ...core.routed.expertweaver import AUTO
from ...core.spec import METHODS, ConversionSpec, fields_of, without_idle
from ...core.written import SPARSITY, flag_of, read_texts

T = TypeVar("T")

MOST_SPECS = 10_000  # combinations of one sweep
ALL = "all"  # of keep
USUAL = ConversionSpec()
# field -> "int", "float", "str" or "bool", as its annotation begins
KINDS = {field.name: field.type.split(" | ")[0] for field in fields(ConversionSpec)}
KINDS[SPARSITY] = KINDS["fade"]
WORDS = {"keep": (ALL,), "shared": (AUTO,)}  # that stand for numbers
_PERCENTAGE = re.compile(r"(\d{1,3}(?:\.\d{1,10})?)\s*%")
_DECIMAL = re.compile(r"[+-]?\d{1,10}(?:\.\d{1,10})?")  # short enough for exact sums


@dataclass(frozen=True)
class Grid:
    """The specs of a sweep, each once, in order."""

    specs: tuple[ConversionSpec, ...]
    left_out: int  # combinations with K beyond B


def read_values(field: str, text: str) -> list[str]:
    """The values of a field in a text such as `8,16,32`, each once.

    Numbers may be a range start:stop:step, computed exactly as decimals and with its stop
    included where a step meets it: `0:1:0.25` is 0, 0.25, 0.5, 0.75, 1. keep also takes `all` and
    a percentage of B. Layers that are spared together are joined by plus signs, since commas part
    values: `none,0,0+11`. Raises SpecError that names the flag and says what is allowed.
    """
    _check_field(field)
    found = []
    for part in text.split(","):
        part = part.strip()
        is_range = KINDS[field] in ("int", "float") and ":" in part
        found += _range(field, part) if is_range else [_value(field, part)]
    return list(dict.fromkeys(found))


def read_grid(text: str) -> dict[str, list[str]]:
    """The values in a sweep file, for `grid`: one JSON object of fields with a text as for
    `read_values`, a number or true, or a list of these, such as
    `{"branches": "8,16", "fade": [0, 0.5], "keep": "75%"}`. Raises UserError."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise UserError("the sweep file is not valid JSON: it is nested too deep.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"the sweep file is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError('the sweep file must hold one object, such as {"branches": "8,16"}.')
    found = {}
    for field, value in content.items():
        _check_field(field)
        items = value if isinstance(value, list) else [value]
        texts = [text for item in items for text in read_values(field, _written(field, item))]
        if not texts:
            raise SpecError(f"--{flag_of(field)} has no value in the sweep file.")
        found[field] = list(dict.fromkeys(texts))
    return found


def grid(values: Mapping[str, Sequence[str]]) -> Grid:
    """Every combination of the values, given as texts under the fields' names.

    A value that a combination has no use for is left out of it: of a field that does not belong
    to its method, of fade_exponent without the schedule power, and the like. Of combinations that
    convert alike, since they differ where nothing is faded or dropped, the first stands for all.
    Combinations with K above B are left out and counted. Raises SpecError if a value is not
    allowed, no combination has a use for a field, or nothing remains; UserError if there are more
    than MOST_SPECS combinations, before any is built.
    """
    values = {
        name: list(dict.fromkeys(_value(name, text) for text in given))
        for name, given in values.items()
    }
    methods = {
        method: _belonging(method, values) for method in values.pop("method", [USUAL.method])
    }
    for name, given in values.items():
        if not given:
            raise SpecError(f"--{flag_of(name)} has no value.")
        if not any(name in used for used in methods.values()):
            whose = ", ".join(method for method in METHODS if name in _used_by(method))
            raise SpecError(
                f"--{flag_of(name)} does not belong to {', '.join(methods)}; it is for {whose}."
            )
    count = sum(prod(map(len, used.values())) for used in methods.values())
    if count > MOST_SPECS:
        raise UserError(
            f"these are {count:,} combinations; a sweep takes up to {MOST_SPECS:,}. Give fewer "
            "values, or make several sweeps."
        )
    specs: dict[ConversionSpec, ConversionSpec] = {}  # canonical -> as asked for
    left_out, useful, idle = 0, set(), {}
    for method, used in methods.items():
        for combination in product(*used.values()):
            texts = {"method": method} | dict(zip(used, combination, strict=True))
            if not _settle_keep(texts):
                left_out += 1
                continue
            settled = {name: texts[name] for name in _spec(texts, _useful)}
            useful |= settled.keys()
            idle |= dict.fromkeys(texts.keys() - settled.keys(), texts)
            spec = _spec(settled)
            specs.setdefault(spec.canonical(), spec)
    for name in idle.keys() - useful:
        _spec(idle[name])  # says why no combination has a use for it
    if not specs:
        raise SpecError("every combination has a --keep (K) above its --branches (B).")
    return Grid(tuple(specs.values()), left_out)


def _check_field(name: str) -> None:
    if name not in KINDS:
        allowed = ", ".join(map(flag_of, KINDS))
        raise UserError(f"no field of a conversion is called {shown(name)}; allowed: {allowed}.")


def _value(field: str, text: str) -> str:
    """One value, as text; SpecError if it cannot be read."""
    _check_field(field)
    kind = KINDS[field]
    if text in WORDS.get(field, ()) or kind == "str":
        if not text:
            raise SpecError(f"--{flag_of(field)} has a value that is empty.")
        return text
    if field == "keep" and (share := _PERCENTAGE.fullmatch(text)):
        if not 0 < Decimal(share[1]) <= 100:
            raise SpecError(f"--keep {text}: a percentage of B lies above 0 % and up to 100 %.")
        return text
    try:
        {"int": int, "float": float, "bool": boolean}[kind](text)
    except ValueError:
        raise SpecError(
            f"--{flag_of(field)} must be {_allowed(field)}, not {shown(text)}."
        ) from None
    return text


def _allowed(field: str) -> str:
    kind = KINDS[field]
    if kind == "bool":
        return "true or false"
    example = "4:32:4" if kind == "int" else "0:0.9:0.3"
    words = {"keep": "all, a percentage of B such as 75%, ", "shared": f"{AUTO}, "}.get(field, "")
    number = "a whole number" if kind == "int" else "a number"
    return f"{words}{number} or a range start:stop:step such as {example}"


def _range(field: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 3 or not all(map(_DECIMAL.fullmatch, parts)):
        raise SpecError(f"--{flag_of(field)} must be {_allowed(field)}, not {shown(text)}.")
    start, stop, step = map(Decimal, parts)
    if step <= 0 or stop < start:
        raise SpecError(
            f"--{flag_of(field)} {text}: a range goes up, so its step must be above 0 and its stop "
            "not below its start."
        )
    if KINDS[field] == "int" and any(number % 1 for number in (start, stop, step)):
        raise SpecError(f"--{flag_of(field)} {text}: start, stop and step must be whole numbers.")
    count = int((stop - start) // step) + 1
    if count > MOST_SPECS:
        raise UserError(
            f"--{flag_of(field)} {text} has {count:,} values; a sweep takes up to {MOST_SPECS:,}."
        )
    return [_plain(start + i * step) for i in range(count)]


def _plain(number: Decimal) -> str:
    """Without an exponent and without zeros at the end."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; UserError if it names a field twice, of which JSON would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the sweep file names {shown(twice)} twice.")
    return found


def _written(field: str, value: Any) -> str:
    """A value of a sweep file as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise SpecError(
            f"--{flag_of(field)} in the sweep file must be a text, a number, true or false, or a "
            f"list of these, not {shown(value)}."
        )
    return value if isinstance(value, str) else shown(value)


def _belonging(method: str, values: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The values of the fields that a method uses."""
    _spec({"method": method})  # there must be one
    return {name: given for name, given in values.items() if name in _used_by(method)}


def _used_by(method: str) -> tuple[str, ...]:
    names = fields_of(method)
    return (*names, SPARSITY) if "fade" in names else names


def _useful(texts: Mapping[str, str]) -> dict[str, Any]:
    return without_idle(read_texts(texts))


def _spec(
    texts: Mapping[str, str], read: Callable[[Mapping[str, str]], T] = ConversionSpec.from_texts
) -> T:
    """What `read` makes of these texts, a spec; a SpecError names them by their flags."""
    try:
        return read(texts)
    except SpecError as error:
        given = {n: t for n, t in texts.items() if (n, t) != ("method", USUAL.method)}
        flags = " ".join(f"--{flag_of(name)} {text[:30]}" for name, text in given.items())
        raise SpecError(f"{flags}: {error}") from None


def _settle_keep(texts: dict[str, str]) -> bool:
    """Replace a percentage of B by K, and take out `all`; whether K is at most B."""
    keep, branches = texts.get("keep", ALL), int(texts.get("branches", USUAL.branches))
    if keep == ALL:
        texts.pop("keep", None)
        return True
    if share := _PERCENTAGE.fullmatch(keep):
        exact = branches * Decimal(share[1]) / 100
        texts["keep"] = str(max(1, int(exact.to_integral_value(ROUND_HALF_UP))))
    return int(texts["keep"]) <= branches
