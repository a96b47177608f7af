"""The specs that a search proposes, as choices that fit a budget by construction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ...core.choices import ALLOCATIONS
from ...core.errors import SpecError
from ...core.presets import PRESETS
from ...core.routed import ROUTED_METHODS
from ...core.spec import MAX_FADE, ConversionSpec
from ...core.static.order import ORDERS
from ...core.static.schedule import branch_sparsities, strength_for
from ...core.static.scores import SCORES

if TYPE_CHECKING:
    from optuna.trial import Trial

    from .search import Budget

BRANCHES = (16, 32, 64)  # what the search cuts into
EXPERTS = (16, 32, 64)
LEAST_SHARE, MOST_SHARE = 0.2, 0.98  # of the dense cost; the search looks no further
ROUTED = ("gate", "inputs", "experts")  # what tokens may choose: single neurons, inputs, experts
AROUND = 0.15  # of the dense cost, below and above the budget
LEAST_ACTIVE = 0.02  # share of single neurons below which nothing is left to choose


@dataclass(frozen=True)
class Space:
    """Around one budget, for one model."""

    budget: Budget
    calibrated: bool
    d_ff: int
    gated: bool

    def presets(self) -> Iterator[ConversionSpec]:
        """Those that may be within the budget and remove something."""
        for spec in PRESETS.values():
            allowed = self.calibrated or not spec.needs_calibration
            allowed &= spec.branches <= self.d_ff
            allowed &= not (spec.fades and self.budget.cost == "compute")  # zeros save nothing
            left = self._left(spec)
            if allowed and left < 1 and (self.budget.ratio or left <= self.budget.share + 0.01):
                yield spec

    def _left(self, spec: ConversionSpec) -> float:
        """About what share of the dense cost a preset has."""
        left = spec.kept / spec.branches
        if self.budget.cost == "nonzero" and spec.fade:
            matrices = 3 if self.gated else 2
            faded = sum(name != "gate" or self.gated for name in spec.projections)
            shares = branch_sparsities(spec.branches, spec.fade, spec.fade_schedule)[: spec.kept]
            left *= 1 - faded / matrices * sum(shares) / len(shares)
        return left

    def starts(self) -> Iterator[dict[str, object]]:
        """Good recipes at the budget itself; a trial takes of them what it asks for."""
        shares = [self.budget.share] if self.budget.share else [0.9, 0.75, 0.6]
        if self.calibrated:  # the best of those that take little time, and the best
            recipes = [("fluctuation", "mean", "wanda"), ("loss", "refit", "sparsegpt")]
        else:
            recipes = [("norm", "none", "relative")]
        usual = {"schedule": "uniform", "projections": "all", "part": 0.5}
        usual |= {"branches": max(self._branches())}
        for by, share, (order, compensation, score) in product(self._by(), shares, recipes):
            if by in ROUTED:
                continue
            recipe = {"order": order, "compensation": compensation, "score": score}
            # fade that is shared out meets a budget in steps only
            shared = by == "keep" and order == "loss"
            recipe["allocation"] = "sensitivity" if shared else "uniform"
            yield usual | recipe | {"by": by, "share": share}
        for by, share in product(self._by(), shares):
            if by in ROUTED:
                yield self._routed_start(by) | {"by": by, "share": share}

    def spec(self, trial: Trial) -> ConversionSpec:
        """The spec of a trial's choices."""
        low, high = LEAST_SHARE, MOST_SHARE
        if self.budget.share:
            low = max(low, self.budget.share - AROUND)
            high = min(high, self.budget.share + AROUND)
        by = trial.suggest_categorical("by", self._by())
        share = trial.suggest_float("share", low, high)
        if by == "gate":
            return self._by_gate(trial, share)
        if by == "inputs":
            return self._by_inputs(trial, share)
        if by == "experts":
            return self._by_experts(trial, share)
        fields: dict[str, object] = {"branches": min(BRANCHES[0], self.d_ff)}
        if by == "keep and weights":
            kept = share ** trial.suggest_float("part", 0.1, 0.9)
        else:
            kept = share if by == "keep" else 1.0
        if by in ("keep", "keep and weights"):
            branches = trial.suggest_categorical("branches", self._branches())
            keep = max(1, min(int(branches * kept + 1e-9), branches - 1))
            order = trial.suggest_categorical("order", self._orders())
            fields |= {"branches": branches, "keep": keep, "order": order}
            kept = keep / branches
        if by in ("keep", "keep and weights") or self.calibrated:
            fields["compensation"] = trial.suggest_categorical("compensation", self._fills())
        if by != "keep":
            keep = fields.get("keep", fields["branches"])
            fields |= self._fade(trial, by, min(1.0, share / kept), fields["branches"], keep)
        if self.calibrated:
            fields["allocation"] = trial.suggest_categorical("allocation", list(ALLOCATIONS))
        return ConversionSpec(**fields).canonical()

    def _fade(
        self, trial: Trial, by: str, left: float, branches: int, keep: int
    ) -> dict[str, object]:
        """The fields of a fade that leaves this share of the kept weights or neurons."""
        schedule = trial.suggest_categorical("schedule", ["uniform", "linear"])
        fields = {"fade_schedule": schedule}
        fields["fade_score"] = trial.suggest_categorical("score", self._scores())
        zeros = 1 - left
        if by == "neurons":
            fields["fade_unit"] = "neuron"
        elif trial.suggest_categorical("projections", ["all", "gate and up"]) == "all":
            fields["fade_projections"] = "gate-up-down"
        else:
            zeros *= 1.5 if self.gated else 2.0
        return fields | {"fade": _strength(zeros, branches, keep, schedule)}

    def _by(self) -> list[str]:
        everything = ["weights", "keep", "keep and weights", "neurons"]
        if self.budget.cost == "nonzero":  # who routes keeps all weights
            return everything
        return ["keep", "neurons", "gate", "inputs", *(["experts"] if self._experts() else [])]

    @property
    def matrices(self) -> int:
        """Of an MLP."""
        return 3 if self.gated else 2

    def _routed_start(self, by: str) -> dict[str, object]:
        """The best that is known: what looks at a text, where it may."""
        choice = {"selection": "threshold", "fill": "refit"} if self.calibrated else {}
        if by == "gate":
            return choice | {"gate": "gate-norm"}
        if by == "inputs":
            return choice | {"inputs": self._input_routers()[-1]}
        method = self._methods()[0]
        return choice | {"method": method, "experts": max(self._experts()), "fitted": True}

    def _by_gate(self, trial: Trial, share: float) -> ConversionSpec:
        """Single neurons."""
        return ConversionSpec(
            method="neurons",
            active=round(max(LEAST_ACTIVE, self._active("neurons", share)), 6),
            router=trial.suggest_categorical("gate", ["gate", "gate-norm"]),
            **self._selection(trial),
        )

    def _by_inputs(self, trial: Trial, share: float) -> ConversionSpec:
        """Inputs of each matrix."""
        return ConversionSpec(
            method="inputs",
            active=round(self._active("inputs", share), 6),
            router=trial.suggest_categorical("inputs", self._input_routers()),
            **self._selection(trial),
        )

    def _input_routers(self) -> list[str]:
        """From the simplest on; without a gate nothing can be opened by it."""
        return ["inputs", "inputs-norm", *(["inputs-gate"] if self.gated else [])]

    def _active(self, method: str, share: float) -> float:
        """The active share that leaves a share of the compute."""
        return ROUTED_METHODS[method].active_share(share, self.matrices)

    def _by_experts(self, trial: Trial, share: float) -> ConversionSpec:
        """Experts, of whose compute the router takes its part."""
        method = trial.suggest_categorical("method", self._methods())
        experts = trial.suggest_categorical("experts", self._experts())
        running = max(1, int((share - experts / (self.matrices * self.d_ff)) * experts + 1e-9))
        router = {}
        if self.calibrated and trial.suggest_categorical("fitted", [True, False]):
            router = {"router": "regression"}
        return ConversionSpec(
            method=method, experts=experts, active=min(1.0, running / experts),
            **router, **self._selection(trial),
        )  # fmt: skip

    def _selection(self, trial: Trial) -> dict[str, object]:
        if not self.calibrated:
            return {}
        return {
            "selection": trial.suggest_categorical("selection", ["topk", "threshold"]),
            "compensation": trial.suggest_categorical("fill", ["none", "mean", "refit"]),
        }

    def _methods(self) -> list[str]:
        """That share neurons out to experts; what shares some always needs a calibration text."""
        best = ["coactivation", "expertweaver"] if self.calibrated else []
        plain = [
            name for name, method in ROUTED_METHODS.items()
            if method.partition and not method.calibrated
        ]  # fmt: skip
        return best or plain

    def _experts(self) -> list[int]:
        return [count for count in EXPERTS if self.d_ff % count == 0]

    def _branches(self) -> list[int]:
        return [b for b in BRANCHES if b <= self.d_ff] or [self.d_ff]

    def _orders(self) -> list[str]:
        more = [name for name, order in ORDERS.items() if self.calibrated and order.calibrated]
        return ["contiguous", "norm", *more]

    def _fills(self) -> list[str]:
        return ["sqrt", "none", *(["mean", "refit", "alpha"] if self.calibrated else [])]

    def _scores(self) -> list[str]:
        return [name for name, score in SCORES.items() if self.calibrated or not score.calibrated]


def _strength(zeros: float, branches: int, keep: int, schedule: str) -> float:
    """The fade that zeroes this share in the mean over the kept branches, as far as there is one;
    three digits are enough for a person to read."""
    try:
        strength = strength_for(min(1.0, max(0.0, zeros)), branches, schedule, kept=keep)
    except SpecError:
        return MAX_FADE
    return min(MAX_FADE, round(strength + 5e-4, 3))
