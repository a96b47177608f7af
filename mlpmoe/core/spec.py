"""ConversionSpec: one conversion request, whole, frozen and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any
from urllib.parse import parse_qsl, urlencode

from .compensation import COMPENSATIONS
from .errors import SpecError

METHODS = ("mlpmoe",)
MAX_FADE = 2.0  # at 2 the last half of the branches is empty; beyond, only branch 0 would be left


@dataclass(frozen=True, kw_only=True)
class ConversionSpec:
    """What to do with every MLP of a model. Defaults change nothing but the structure.

    Raises SpecError, with the allowed values in the message, for anything out of range.
    """

    method: str = "mlpmoe"
    branches: int = 16  # B, from 1 to the model's d_ff
    fade: float = 0.0  # Fractal Fade strength s: branch i loses the smallest min(1, s·i/B)
    keep: int | None = None  # K, from 1 to B: only the first K branches stay; None: all
    compensation: str = "sqrt"  # what multiplies kept branches: "sqrt" √(B/K), or "none"

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("compensation", self.compensation, COMPENSATIONS)
        set_field = object.__setattr__  # the dataclass is frozen; normalise numpy scalars once
        set_field(self, "branches", _integer("branches (B)", self.branches))
        set_field(self, "fade", _fade(self.fade))
        if self.branches < 1:
            raise SpecError(f"branches (B) must be at least 1, not {_shown(self.branches)}.")
        if self.keep is not None:
            set_field(self, "keep", _integer("keep (K)", self.keep))
            if not 1 <= self.keep <= self.branches:
                raise SpecError(
                    f"keep (K) is {_shown(self.keep)}, but must lie between 1 and "
                    f"branches (B) = {_shown(self.branches)}."
                )

    @property
    def kept(self) -> int:
        """K as a number: the count of branches that stay."""
        return self.branches if self.keep is None else self.keep

    @property
    def alpha(self) -> float:
        """The factor on every kept branch: its compensation."""
        return COMPENSATIONS[self.compensation](self.branches, self.kept)

    def check_fits(self, d_ff: int) -> None:
        """Raise SpecError if an MLP of `d_ff` neurons cannot be cut into this many branches."""
        if self.branches > d_ff:
            raise SpecError(
                f"branches (B) is {_shown(self.branches)}, but this model's MLPs have {d_ff} "
                f"neurons: choose B between 1 and {d_ff}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the fields' names; `from_dict` restores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConversionSpec:
        """The spec with these values; SpecError names unknown fields."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise SpecError(f"unknown field {_shown(unknown[0])}; allowed: {', '.join(known)}.")
        return cls(**values)

    def _changed(self) -> dict[str, Any]:
        """The fields that say something: branches always, others where they differ."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name == "branches" or getattr(self, field.name) != field.default
        }

    def to_query(self) -> str:
        """The spec as a link's query string, e.g. `branches=16&fade=0.9`."""
        return urlencode(self._changed())

    @classmethod
    def from_query(cls, query: str) -> ConversionSpec:
        """The spec a query string names; SpecError if a value cannot be read."""
        return cls.from_texts(dict(parse_qsl(query, keep_blank_values=True)))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> ConversionSpec:
        """The spec of values written as text; SpecError if one cannot be read."""
        readers = {"branches": int, "keep": int, "fade": float}
        values: dict[str, Any] = {}
        for name, text in texts.items():
            try:
                values[name] = readers.get(name, str)(text)
            except ValueError:
                raise SpecError(f"{name} must be a number, not {_shown(text)}.") from None
        return cls.from_dict(values)

    def to_python(self) -> str:
        """The expression that makes this spec again."""
        return f"ConversionSpec({', '.join(f'{k}={v!r}' for k, v in self._changed().items())})"

    def to_flags(self) -> str:
        """The spec as command-line flags, e.g. `--branches 16 --fade 0.9`."""
        return " ".join(f"--{name} {value}" for name, value in self._changed().items())


def _shown(value: Any) -> str:
    """A value for a message, short whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _choice(name: str, value: Any, allowed) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise SpecError(f"{name} must be one of {', '.join(allowed)}; got {_shown(value)}.")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SpecError(f"{name} must be a whole number, not {_shown(value)}.")
    return int(value)


def _fade(value: Any) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_FADE:
        raise SpecError(f"fade must be a number between 0 and {MAX_FADE:g}, not {_shown(value)}.")
    return float(value)


# A published recipe is a spec with a name.
PRESETS = {
    "All 16 branches": ConversionSpec(branches=16),
    "Fractal Fade (paper)": ConversionSpec(branches=16, fade=0.9),
    "Keep 12 of 16 (paper)": ConversionSpec(branches=16, keep=12),
    "Fade 0.9 and keep 12 of 16": ConversionSpec(branches=16, fade=0.9, keep=12),
    "Keep 12 of 16, not scaled": ConversionSpec(branches=16, keep=12, compensation="none"),
}
