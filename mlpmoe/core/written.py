"""The forms in which a spec is written: dict, query string, texts, Python, flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from .checks import boolean, shown
from .errors import SpecError
from .routed.expertweaver import AUTO
from .static.schedule import strength_for

SPARSITY = "sparsity"  # no field: another way to write fade, as the mean share that it zeroes


class Written:
    """What a spec, a dataclass, can be written as and read from."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the fields' names; `from_dict` restores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The spec with these values; SpecError names unknown fields. In place of `fade` may stand
        `sparsity`: the share to zero, in the mean over the branches that stay, of the matrices
        that fade."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in (*known, SPARSITY)]
        if unknown:
            raise SpecError(f"unknown field {shown(unknown[0])}; allowed: {', '.join(known)}.")
        return cls._of_sparsity(dict(values)) if SPARSITY in values else cls(**values)

    @classmethod
    def _of_sparsity(cls, values: dict[str, Any]) -> Self:
        """The spec of values that name a sparsity. progressive waits for the fade, without which
        there may be nothing to calibrate."""
        sparsity, progressive = values.pop(SPARSITY), values.pop("progressive", False)
        if "fade" in values:
            raise SpecError("fade and sparsity say the same in two ways: give one of them.")
        spec = cls(**values)
        if spec.routed:
            raise SpecError(f"sparsity does not belong to the method {spec.method}, as fade.")
        if spec.pattern:
            raise SpecError(f"{spec.fade_unit} fixes the share of zeros: leave out sparsity.")
        fade = strength_for(
            sparsity, spec.branches, spec.fade_schedule, spec.fade_exponent, spec.kept
        )
        return replace(spec, fade=fade, progressive=progressive)

    def _changed(self) -> dict[str, Any]:
        """The fields that say something: the first choice always, others where they differ from
        what the method does by itself."""
        first = "active" if self.routed else "branches"
        # what a method shares by itself depends on the active share
        usual = type(self)(method=self.method, active=self.active)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name == first or value != getattr(usual, name) or (name == "method" and self.routed)
        }

    def to_query(self) -> str:
        """The spec as a link's query string, e.g. `branches=16&fade=0.9`."""
        return urlencode(self._changed())

    @classmethod
    def from_query(cls, query: str) -> Self:
        """The spec a query string names; SpecError if a value cannot be read."""
        return cls.from_texts(dict(parse_qsl(query, keep_blank_values=True)))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Self:
        """The spec of values written as text; SpecError if one cannot be read."""
        return cls.from_dict(read_texts(texts))

    def to_python(self) -> str:
        """The expression that makes this spec again."""
        return f"ConversionSpec({', '.join(f'{k}={v!r}' for k, v in self._changed().items())})"

    def to_flags(self) -> str:
        """The spec as command-line flags, e.g. `--branches 16 --fade 0.9`."""
        return " ".join(f"--{flag_of(name)} {value}" for name, value in self._changed().items())


def read_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of a spec's fields, written as text; SpecError if one cannot be read."""
    readers = {
        "branches": int, "keep": int, "fade": float, SPARSITY: float, "fade_exponent": float,
        "experts": int, "active": float,
        "shared": lambda text: text if text == AUTO else float(text),
        "tau": float, "seed": int, "progressive": boolean,
        "recover_steps": int, "recover_rate": float,
    }  # fmt: skip
    values: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            values[name] = readers.get(name, str)(text)
        except ValueError:
            kind = "true or false" if name == "progressive" else "a number"
            raise SpecError(f"{name} must be {kind}, not {shown(text)}.") from None
    return values


def flag_of(field: str) -> str:
    """A field's name on the command line, without the dashes in front."""
    return field.replace("_", "-")
