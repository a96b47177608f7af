"""ConversionSpec: one conversion request, whole, frozen and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any
from urllib.parse import parse_qsl, urlencode

from .compensation import CALIBRATED as CALIBRATED_COMPENSATIONS
from .compensation import COMPENSATIONS, FILLS
from .errors import SpecError
from .order import CALIBRATED as CALIBRATED_ORDERS
from .order import ORDERS
from .routed import ROUTED_METHODS, RoutedMethod
from .routed.expertweaver import AUTO
from .routed.partition import expert_count
from .routed.routers import ROUTERS

METHODS = ("mlpmoe", *ROUTED_METHODS)
MAX_FADE = 2.0  # at 2 the last half of the branches is empty; beyond, only branch 0 would be left
STATIC_FIELDS = ("branches", "fade", "keep", "order")
ROUTED_FIELDS = (
    "experts", "active", "shared", "router", "selection", "profile", "tau", "progressive", "seed",
)  # fmt: skip
SELECTIONS = ("topk", "threshold")
PROFILES = ("signed", "absolute")
MAX_SEED = 2**32 - 1
MAX_TAU = 1000.0


@dataclass(frozen=True, kw_only=True)
class ConversionSpec:
    """What to do with every MLP of a model. Defaults change nothing but the structure.

    The method "mlpmoe" is static: the same branches for every token. All others are routed: a
    router picks experts, or neurons, token by token. A field that the method does not use must be
    left at its default. None stands for what the method's authors do, and is replaced by it.
    Raises SpecError, with the allowed values in the message, for anything out of range.
    """

    method: str = "mlpmoe"
    # static
    branches: int = 16  # B, from 1 to the model's d_ff
    fade: float = 0.0  # Fractal Fade strength s: branch i loses the smallest min(1, s·i/B)
    keep: int | None = None  # K, from 1 to B: only the first K branches stay; None: all
    order: str = "contiguous"  # which neurons come first: as stored, or sorted by a score
    # static: "sqrt" √(B/K), "none", "mean", "refit"; routed: "none", "mean"
    compensation: str | None = None
    # routed
    experts: int | None = None  # N_e per MLP, shared ones included; less where d_ff forbids it
    active: float = 0.75  # share of the neurons that run for a token, shared ones included
    shared: float | str | None = None  # share of the neurons that always run, or "auto"
    router: str | None = None  # what scores the experts for a token
    selection: str = "topk"  # the best k, or "threshold": all above one that gives k on average
    profile: str = "signed"  # sign of the gate activations that ExpertWeaver averages
    tau: float | None = None  # coefficient of variation above which a neuron is specialised;
    # None: the median of all neurons of the model
    progressive: bool = False  # profile each layer on the converted layers before it
    seed: int = 0  # of whatever a method draws

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        self._check_belonging()
        set_field = object.__setattr__  # the dataclass is frozen; normalise numpy scalars once
        set_field(self, "branches", _integer("branches (B)", self.branches))
        set_field(self, "fade", _real("fade", self.fade, 0, MAX_FADE))
        _choice("order", self.order, ORDERS)
        if self.branches < 1:
            raise SpecError(f"branches (B) must be at least 1, not {_shown(self.branches)}.")
        if self.keep is not None:
            set_field(self, "keep", _integer("keep (K)", self.keep))
            if not 1 <= self.keep <= self.branches:
                raise SpecError(
                    f"keep (K) is {_shown(self.keep)}, but must lie between 1 and "
                    f"branches (B) = {_shown(self.branches)}."
                )
        routed = self.routed
        if self.compensation is None:
            set_field(self, "compensation", "none" if routed else "sqrt")
        _choice("compensation", self.compensation, FILLS if routed else COMPENSATIONS)
        if routed:
            self._check_routed(routed)

    def _check_belonging(self) -> None:
        """Refuse fields of the other kind of method: they would be ignored silently."""
        others = STATIC_FIELDS if self.method in ROUTED_METHODS else ROUTED_FIELDS
        if self.routed:
            others += tuple(set(ROUTED_FIELDS) - set(self.routed.fields))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in others and value is not None and value != field.default:
                allowed = [m for m in METHODS if field.name in fields_of(m)]
                raise SpecError(
                    f"{field.name} does not belong to the method {self.method}; it is for "
                    f"{', '.join(allowed)}."
                )

    def _check_routed(self, method: RoutedMethod) -> None:
        set_field = object.__setattr__
        for name, default in method.defaults.items():
            if getattr(self, name) is None and not (name == "shared" and default != AUTO):
                set_field(self, name, default)
        set_field(self, "active", _real("active", self.active, 0, 1))
        if self.active == 0:
            raise SpecError("active must be more than 0: some neurons have to run.")
        if "shared" in method.fields and self.shared is None:  # half of what runs, at most
            set_field(self, "shared", min(method.defaults["shared"], self.active / 2))
        if "experts" in method.fields:
            set_field(self, "experts", _integer("experts", self.experts))
            if self.experts < 2:
                raise SpecError(f"experts must be at least 2, not {_shown(self.experts)}.")
        if "shared" in method.fields and self.shared != AUTO:
            set_field(self, "shared", _real("shared", self.shared, 0, 1))
            if self.shared > self.active:
                raise SpecError(
                    f"shared is {self.shared:g}, but of the active share {self.active:g} at most "
                    "that much can be shared."
                )
        if self.shared == AUTO and not method.layer_adaptive:
            raise SpecError(
                f"shared must be a number for {self.method}; only expertweaver has a rule for "
                f"{AUTO}."
            )
        _choice("router", self.router, method.routers)
        _choice("selection", self.selection, SELECTIONS)
        _choice("profile", self.profile, PROFILES)
        if self.tau is not None:
            set_field(self, "tau", _real("tau", self.tau, 0, MAX_TAU))
        if not isinstance(self.progressive, bool):
            raise SpecError(f"progressive must be True or False, not {_shown(self.progressive)}.")
        set_field(self, "seed", _integer("seed", self.seed))
        if not 0 <= self.seed <= MAX_SEED:
            raise SpecError(f"seed must lie between 0 and {MAX_SEED}, not {_shown(self.seed)}.")

    @property
    def routed(self) -> RoutedMethod | None:
        """The method's own part, if it routes."""
        return ROUTED_METHODS.get(self.method)

    @property
    def needs_calibration(self) -> bool:
        """Whether a stage looks at activations on a calibration text."""
        if routed := self.routed:
            return (
                routed.calibrated
                or self.progressive
                or self.selection == "threshold"
                or self.compensation == "mean"
                or bool(self.shared)
                or (self.router in ROUTERS and ROUTERS[self.router].calibrated)
            )
        return self.order in CALIBRATED_ORDERS or self.compensation in CALIBRATED_COMPENSATIONS

    @property
    def kept(self) -> int:
        """K as a number: the count of branches that stay."""
        return self.branches if self.keep is None else self.keep

    @property
    def alpha(self) -> float:
        """The factor on every kept branch: its compensation."""
        return COMPENSATIONS[self.compensation](self.branches, self.kept)

    def check_fits(self, d_ff: int) -> None:
        """Raise SpecError if an MLP of `d_ff` neurons cannot be cut into this many branches, or
        into experts of equal size."""
        if self.experts is not None:
            expert_count(d_ff, self.experts)
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
        """The fields that say something: the first choice always, others where they differ from
        what the method does by itself."""
        first = "active" if self.routed else "branches"
        usual = ConversionSpec(method=self.method)
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
    def from_query(cls, query: str) -> ConversionSpec:
        """The spec a query string names; SpecError if a value cannot be read."""
        return cls.from_texts(dict(parse_qsl(query, keep_blank_values=True)))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> ConversionSpec:
        """The spec of values written as text; SpecError if one cannot be read."""
        readers = {
            "branches": int, "keep": int, "fade": float, "experts": int, "active": float,
            "shared": lambda text: text if text == AUTO else float(text), "tau": float,
            "seed": int, "progressive": _boolean,
        }  # fmt: skip
        values: dict[str, Any] = {}
        for name, text in texts.items():
            try:
                values[name] = readers.get(name, str)(text)
            except ValueError:
                kind = "true or false" if name == "progressive" else "a number"
                raise SpecError(f"{name} must be {kind}, not {_shown(text)}.") from None
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


def _real(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise SpecError(
            f"{name} must be a number between {low:g} and {high:g}, not {_shown(value)}."
        )
    return float(value)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def fields_of(method: str) -> tuple[str, ...]:
    """The fields of the spec that a method uses, beside method and compensation."""
    return ROUTED_METHODS[method].fields if method in ROUTED_METHODS else STATIC_FIELDS


# A published recipe is a spec with a name.
PRESETS = {
    "All 16 branches": ConversionSpec(branches=16),
    "Fractal Fade (paper)": ConversionSpec(branches=16, fade=0.9),
    "Keep 12 of 16 (paper)": ConversionSpec(branches=16, keep=12),
    "Fade 0.9 and keep 12 of 16": ConversionSpec(branches=16, fade=0.9, keep=12),
    "Keep 12 of 16, not scaled": ConversionSpec(branches=16, keep=12, compensation="none"),
}
