"""ConversionSpec: one conversion request, whole, frozen and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from .checks import check_choice, integer, known, layer_numbers, pattern, real, shown
from .choices import ALLOCATIONS, METHODS, PROFILES, SELECTIONS, UNITS
from .errors import SpecError
from .recovery.kinds import FIELDS as RECOVERY_FIELDS
from .recovery.kinds import NOTHING, RECOVERIES, check_recovery
from .routed import ROUTED_METHODS, RoutedMethod
from .routed.expertweaver import AUTO
from .routed.partition import expert_count
from .routed.routers import ROUTERS
from .static.compensation import COMPENSATIONS, FILLS
from .static.order import ORDERS
from .static.schedule import MAX_FADE, SCHEDULES, branch_sparsities
from .static.scores import SCORES
from .written import SPARSITY, Written

COMMON_FIELDS = ("compensation", "spared", "seed", *RECOVERY_FIELDS)  # that every method uses
FADE_CHOICES = (
    "fade_schedule", "fade_exponent", "fade_projections", "fade_score", "fade_unit",
)  # fmt: skip
MAX_SEED = 2**32 - 1
MAX_TAU = 1000.0
MAX_EXPONENT = 100.0
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class ConversionSpec(Written):
    """What to do with every MLP of a model. Defaults change nothing but the structure.

    The method "mlpmoe" is static: the same branches for every token. All others are routed: a
    router picks experts, or neurons, token by token. A field that the method does not use must be
    left at its default. None stands for what the method's authors do, and is replaced by it.
    Raises SpecError, with the allowed values in the message, for anything out of range.
    """

    method: str = "mlpmoe"
    # static
    branches: int = 16  # B, from 1 to the model's d_ff
    order: str = "contiguous"  # which neurons come first: as stored, or sorted by a score
    fade: float = 0.0  # Fractal Fade strength s: branch i loses the share min(1, s·i/B)
    fade_schedule: str = "linear"  # how the zeros are shared among branches, see schedule.py
    fade_exponent: float | None = None  # of the schedule "power", above 0
    fade_projections: str = "gate-up"  # matrices that fade zeroes, joined by hyphens
    fade_score: str = "magnitude"  # which weights go first, see scores.py
    # what goes: "weight", "neuron" (which shrinks the matrices), or a pattern n:m such as "2:4",
    # n zeros in every m inputs of each matrix, which leaves nothing for `fade` to say
    fade_unit: str = "weight"
    keep: int | None = None  # K, from 1 to B: only the first K branches stay; None: all
    # the same K (or fade) in every layer, or shared out among them with the same mean
    allocation: str = "uniform"
    # static: see compensation.py, "sqrt" is √(B/K); routed: "none", "mean"
    compensation: str | None = None
    # routed
    experts: int | None = None  # N_e per MLP, shared ones included; less where d_ff forbids it
    # share of the neurons that run for a token, shared ones included; of the methods "inputs" and
    # "lowrank" that of the multiply-adds
    active: float = 0.75
    shared: float | str | None = None  # share of the neurons that always run, or "auto"
    router: str | None = None  # what scores the experts for a token
    selection: str = "topk"  # the best k, or "threshold": all above one that gives k on average
    profile: str = "signed"  # sign of the gate activations that ExpertWeaver averages
    tau: float | None = None  # coefficient of variation above which a neuron is specialised;
    # None: the median of all neurons of the model
    # both
    spared: str = ""  # layers that stay dense: numbers from 0, ascending, joined by commas
    progressive: bool = False  # calibrate each layer on the converted layers before it
    seed: int = 0  # of whatever is drawn
    # a little training after all else: what is trained, see recovery/kinds.py
    recover: str = NOTHING
    recover_steps: int = 200  # of 512 tokens each
    recover_rate: float | None = None  # the largest learning rate; None: usual for what is trained

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        self._check_belonging()
        set_field = object.__setattr__  # the dataclass is frozen; normalise numpy scalars once
        routed = self.routed
        if self.compensation is None:
            set_field(self, "compensation", "none" if routed else "sqrt")
        check_choice("compensation", self.compensation, FILLS if routed else COMPENSATIONS)
        set_field(self, "spared", ",".join(map(str, layer_numbers(self.spared))))
        if not isinstance(self.progressive, bool):
            raise SpecError(f"progressive must be True or False, not {shown(self.progressive)}.")
        set_field(self, "seed", integer("seed", self.seed))
        if not 0 <= self.seed <= MAX_SEED:
            raise SpecError(f"seed must lie between 0 and {MAX_SEED}, not {shown(self.seed)}.")
        if routed:
            self._check_routed(routed)
        else:
            self._check_static()
        check_recovery(self)

    def _check_belonging(self) -> None:
        """Refuse fields of the other kind of method: they would be ignored silently."""
        used = ("method", *fields_of(self.method))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in used and value is not None and value != field.default:
                allowed = [m for m in METHODS if field.name in fields_of(m)]
                raise SpecError(
                    f"{field.name} does not belong to the method {self.method}; it is for "
                    f"{', '.join(allowed)}."
                )

    def _check_static(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; normalise numpy scalars once
        set_field(self, "branches", integer("branches (B)", self.branches))
        if self.branches < 1:
            raise SpecError(f"branches (B) must be at least 1, not {shown(self.branches)}.")
        if self.keep is not None:
            set_field(self, "keep", integer("keep (K)", self.keep))
            if not 1 <= self.keep <= self.branches:
                raise SpecError(
                    f"keep (K) is {shown(self.keep)}, but must lie between 1 and "
                    f"branches (B) = {shown(self.branches)}."
                )
        check_choice("order", self.order, ORDERS)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        self._check_fade()
        if self.progressive and not self.looks_at_activations:
            raise SpecError(
                "progressive calibrates each layer on the converted layers before it, but no "
                "stage of this spec looks at activations. Leave it off."
            )

    def _check_fade(self) -> None:
        set_field = object.__setattr__
        set_field(self, "fade", real("fade", self.fade, 0, MAX_FADE))
        check_choice("fade_schedule", self.fade_schedule, SCHEDULES)
        check_choice("fade_score", self.fade_score, SCORES)
        usual = SCHEDULES[self.fade_schedule].exponent
        if usual is not None:
            exponent = usual if self.fade_exponent is None else self.fade_exponent
            set_field(self, "fade_exponent", real("fade_exponent", exponent, 0, MAX_EXPONENT))
            if self.fade_exponent == 0:
                raise SpecError("fade_exponent must be more than 0.")
        elif self.fade_exponent is not None:
            whose = " or ".join(n for n, s in SCHEDULES.items() if s.exponent is not None)
            raise SpecError(
                f"fade_exponent belongs to the schedule {whose}, not to {self.fade_schedule}."
            )
        names = self.fade_projections.split("-") if isinstance(self.fade_projections, str) else [""]
        if not set(names) <= set(PROJECTIONS):
            raise SpecError(
                "fade_projections must name gate, up or down, joined by hyphens; got "
                f"{shown(self.fade_projections)}."
            )
        set_field(self, "fade_projections", "-".join(p for p in PROJECTIONS if p in names))
        if self.fade_unit == "neuron" and self.fade_projections != "gate-up":
            raise SpecError(
                "a neuron is a row of gate and up and a column of down: with fade_unit neuron "
                "leave fade_projections alone."
            )
        if not known(self.fade_unit, UNITS):
            n, m = pattern(self.fade_unit)
            set_field(self, "fade_unit", f"{n}:{m}")
            if self.fade or self.fade_schedule != "linear":
                raise SpecError(
                    f"{n}:{m} fixes the share of zeros: leave fade at 0 and fade_schedule at "
                    "linear."
                )

    def _check_routed(self, method: RoutedMethod) -> None:
        set_field = object.__setattr__
        for name, default in method.defaults.items():
            if getattr(self, name) is None and not (name == "shared" and default != AUTO):
                set_field(self, name, default)
        set_field(self, "active", real("active", self.active, 0, 1))
        if self.active == 0:
            raise SpecError("active must be more than 0: some neurons have to run.")
        if "shared" in method.fields and self.shared is None:  # half of what runs, at most
            set_field(self, "shared", min(method.defaults["shared"], self.active / 2))
        if "experts" in method.fields:
            set_field(self, "experts", integer("experts", self.experts))
            if self.experts < 2:
                raise SpecError(f"experts must be at least 2, not {shown(self.experts)}.")
        if "shared" in method.fields and self.shared != AUTO:
            set_field(self, "shared", real("shared", self.shared, 0, 1))
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
        check_choice("router", self.router, method.routers)
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("profile", self.profile, PROFILES)
        if self.tau is not None:
            set_field(self, "tau", real("tau", self.tau, 0, MAX_TAU))

    @property
    def routed(self) -> RoutedMethod | None:
        """The method's own part, if it routes."""
        return ROUTED_METHODS.get(self.method)

    @property
    def needs_calibration(self) -> bool:
        """Whether a stage looks at a calibration text, or it is trained on."""
        return self.converts_by_text or self.recovers

    @property
    def converts_by_text(self) -> bool:
        """Whether a stage looks at activations on a calibration text, before any training."""
        if self.routed:
            return self.looks_at_activations or self.progressive
        return self.looks_at_activations or self.shares_out

    @property
    def looks_at_activations(self) -> bool:
        """Whether a stage looks at the activations of a layer when it converts it."""
        if routed := self.routed:
            return (
                routed.calibrated
                or SELECTIONS[self.selection].calibrated
                or FILLS[self.compensation].calibrated
                or bool(self.shared)
                or ROUTERS[self.router].calibrated
            )
        return (
            ORDERS[self.order].calibrated
            or self.fits
            or (self.fades and SCORES[self.fade_score].calibrated)
        )

    @property
    def recovers(self) -> bool:
        """Whether a little training follows: something is lost that it may win back."""
        return self.canonical().recover != NOTHING

    @property
    def looks_at_loss(self) -> bool:
        """Whether a stage looks at how the model's loss depends on its layers."""
        shared = self.shares_out and ALLOCATIONS[self.allocation].by_loss
        return shared or ORDERS[self.order].by_loss

    @property
    def shares_out(self) -> bool:
        """Whether layers may get another K, or another fade, than the mean."""
        drops = self.kept < self.branches
        return {"uniform": False, "global": drops}.get(self.allocation, drops or self.fade > 0)

    @property
    def fits(self) -> bool:
        """Whether a static compensation is fitted to activations, also where only fade removes."""
        return COMPENSATIONS[self.compensation].calibrated

    @property
    def fades(self) -> bool:
        """Whether weights or neurons inside the kept branches are removed."""
        return self.fade > 0 or self.pattern is not None

    @property
    def pattern(self) -> tuple[int, int] | None:
        """n and m, if fade leaves n zeros in every m inputs."""
        return None if self.fade_unit in UNITS else pattern(self.fade_unit)

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices that fade zeroes weights of."""
        return tuple(self.fade_projections.split("-"))

    @property
    def kept(self) -> int:
        """K as a number: the count of branches that stay."""
        return self.branches if self.keep is None else self.keep

    @property
    def alpha(self) -> float:
        """The factor on every kept branch, before one is fitted."""
        return COMPENSATIONS[self.compensation].alpha(self.branches, self.kept)

    @property
    def spared_layers(self) -> tuple[int, ...]:
        """The layers that stay dense, ascending."""
        return layer_numbers(self.spared)

    def at(self, layer: int) -> ConversionSpec:
        """What is asked of one layer: this, or of a spared one nothing but to be cut into the
        branches that the others have, or into a single one where those are routed."""
        if layer not in self.spared_layers:
            return self
        return ConversionSpec(branches=1 if self.routed else self.branches)

    def canonical(self, layers: int | None = None) -> ConversionSpec:
        """The spec with every field at its default that has no effect beside the others: specs
        that convert alike become one. The number and order of the branches are an effect, even
        where nothing is removed. layers: of the model, where it is known: if all are spared,
        nothing else counts."""
        if layers is not None and set(range(layers)) <= set(self.spared_layers):
            return self.at(0)
        return _canonical(self)

    def _idle_routed(self) -> set[str]:
        idle = set() if self.shared == AUTO else {"tau"}
        if self.active == 1:  # nothing is left to choose, and nothing lost
            idle |= {"selection", "compensation", "recover"}
        return idle

    def _idle_static(self) -> set[str]:
        whole = self.kept == self.branches
        # of which layers may keep more branches, where they share out K
        kept = self.kept if self.allocation == "uniform" else self.branches
        shares = branch_sparsities(self.branches, self.fade, self.fade_schedule, self.fade_exponent)
        fades = self.pattern is not None or any(shares[:kept])
        idle = set()
        if not fades:
            idle |= {"fade", *FADE_CHOICES}
        if whole:
            idle.add("keep")
            if self.alpha == 1 and not (self.fits and fades):
                idle.add("compensation")
            if not fades or not self.shares_out:
                idle.add("allocation")
        if whole and not fades:
            idle |= {"progressive", "recover"}
            if self.order == "contiguous":
                idle.add("spared")
        return idle

    def _idle_after(self, idle: set[str]) -> set[str]:
        """Of recovery and of what is drawn, given what else is idle."""
        draws = "seed" in self.routed.fields if self.routed else ORDERS[self.order].seeded
        if self.recover == NOTHING or "recover" in idle:
            return set(RECOVERY_FIELDS) if draws else {*RECOVERY_FIELDS, "seed"}
        return {"recover_rate"} if RECOVERIES[self.recover].is_usual(self.recover_rate) else set()

    def check_fits(self, d_ff: int, layers: int | None = None) -> None:
        """Raise SpecError if an MLP of `d_ff` neurons cannot be cut into this many branches, or
        into experts of equal size, and for a spared layer beyond the `layers` of the model."""
        if layers is not None and self.spared and self.spared_layers[-1] >= layers:
            raise SpecError(
                f"there is no layer {self.spared_layers[-1]} to spare: this model has layers 0 to "
                f"{layers - 1}."
            )
        if self.experts is not None and self.routed.partition is not None:
            expert_count(d_ff, self.experts)
        if self.branches > d_ff:
            raise SpecError(
                f"branches (B) is {shown(self.branches)}, but this model's MLPs have {d_ff} "
                f"neurons: choose B between 1 and {d_ff}."
            )


@lru_cache(maxsize=4096)
def _canonical(spec: ConversionSpec) -> ConversionSpec:
    idle = spec._idle_routed() if spec.routed else spec._idle_static()
    idle |= spec._idle_after(idle)
    once = replace(spec, **{name: _default(name) for name in idle | {"progressive"}})
    again = spec.progressive and "progressive" not in idle and once.looks_at_activations
    return replace(once, progressive=True) if again else once


def without_idle(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a spec's fields without those that it would refuse as of no use beside the
    others: for who offers all fields at a time. SpecError for what is wrong anyway."""
    left = dict(values)
    if known(left.get("method"), ROUTED_METHODS):
        return left
    unit, idle = left.get("fade_unit", "weight"), set()
    if not known(unit, UNITS):  # n:m fixes the share of zeros
        idle |= {"fade", SPARSITY, "fade_schedule", "fade_exponent"}
    if unit == "neuron":
        idle.add("fade_projections")
    schedule = left.get("fade_schedule", "linear")
    if known(schedule, SCHEDULES) and SCHEDULES[schedule].exponent is None:
        idle.add("fade_exponent")
    left = {name: value for name, value in left.items() if name not in idle}
    if left.get("progressive") is True:
        plain = {name: value for name, value in left.items() if name != "progressive"}
        left = left if ConversionSpec.from_dict(plain).looks_at_activations else plain
    return left


def _default(name: str) -> Any:
    return next(field.default for field in fields(ConversionSpec) if field.name == name)


def fields_of(method: str) -> tuple[str, ...]:
    """The fields of the spec that a method uses, beside method."""
    return COMMON_FIELDS + METHODS[method].fields
