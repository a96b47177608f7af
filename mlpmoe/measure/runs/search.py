"""Search the recipes for the best ones at a budget, by multi-objective optimisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite, log
from typing import TYPE_CHECKING

from ...core.errors import SpecError, UserError
from ...core.presets import PRESETS
from ...core.spec import MAX_SEED, ConversionSpec
from .deadline import Deadline, TimeUp
from .search_space import LEAST_SHARE, MOST_SHARE, Space
from .sweep import Run
from .trials import Report, TooSlow, Trials

if TYPE_CHECKING:
    pass

COSTS = {
    "nonzero": "MLP parameters that are not zero",
    "compute": "MLP multiply-adds per token",
}
ALLOWANCE = 0.0025  # of the dense cost above the budget: α and biases, in narrow MLPs
RANDOM_TRIALS = 8  # before the optimiser learns from what it has seen
MOST_PASSED_OVER = 64  # proposals in a row for which there is no time: none will come
RIVAL = 3.0  # standard errors within which another text could turn two runs round
FINALISTS = 3  # of the front, to be measured again
WORST_RATIO = 1e6  # of perplexity; what is broken is all the same


@dataclass(frozen=True)
class Budget:
    """What a conversion may cost: a share of the dense MLPs' parameters or multiply-adds at most,
    or, at the least cost, a perplexity."""

    cost: str = "nonzero"  # a key of COSTS
    share: float | None = 0.75  # of the dense cost, at most
    ratio: float | None = None  # of perplexity to dense, at most; instead of share

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise UserError(f"cost must be one of {', '.join(COSTS)}; got {self.cost!r:.60}.")
        if (self.share is None) == (self.ratio is None):
            raise UserError("a budget is either a share of the cost or a ratio of perplexity.")
        if self.share is not None and not LEAST_SHARE <= self.share <= MOST_SHARE:
            raise UserError(
                f"the budget must lie between {LEAST_SHARE:g} and {MOST_SHARE:g} of the "
                f"{COSTS[self.cost]}, not {self.share:g}."
            )
        if self.ratio is not None and not (self.ratio > 1 and isfinite(self.ratio)):
            raise UserError("the ratio of perplexity must be more than 1: 1.05 allows 5 % more.")

    @classmethod
    def from_text(cls, cost: str, share: str) -> Budget:
        """A share written as text; UserError if it is none."""
        try:
            return cls(cost, float(share))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the budget must be a number, not {share!r:.60}.") from None

    def cost_of(self, run: Run) -> float:
        """A share of the dense model's cost."""
        return run.mlp_nonzero_share if self.cost == "nonzero" else run.mlp_macs_share

    def allows(self, run: Run) -> bool:
        if self.share is not None:
            return self.cost_of(run) <= self.share + ALLOWANCE
        return run.ratio <= self.ratio


def front(runs: Sequence[Run], budget: Budget) -> list[Run]:
    """The runs that no other beats in both cost and perplexity, cheapest first."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda r: (budget.cost_of(r), r.ratio)):
        if not found or run.ratio < found[-1].ratio:
            found.append(run)
    return found


def best(runs: Sequence[Run], budget: Budget) -> Run | None:
    """The run that the budget asks for: the least perplexity, or the least cost."""
    allowed = [run for run in runs if budget.allows(run)]
    if budget.share is not None:
        return min(allowed, key=lambda r: (r.ratio, budget.cost_of(r)), default=None)
    return min(allowed, key=lambda r: (budget.cost_of(r), r.ratio), default=None)


def finalists(runs: Sequence[Run], budget: Budget) -> list[ConversionSpec]:
    """The specs worth measuring on the evaluation text, with all of the calibration: the best, the
    front nearest to it, and the presets that the budget allows and that are near the best, so that
    no suggestion is worse than a preset. The search leaves out layer by layer for its time; the
    best is also measured so, last, if it drops neurons."""
    chosen = best(runs, budget)
    near = budget.share or (budget.cost_of(chosen) if chosen else 1.0)
    found = sorted(front(runs, budget), key=lambda run: abs(budget.cost_of(run) - near))
    presets = [run for run in runs if run.spec in PRESETS.values() and _rivals(run, chosen, budget)]
    specs = [run.spec for run in (*found[:FINALISTS], *presets)]
    if chosen:
        specs.insert(0, chosen.spec)
        whole = chosen.spec.kept == chosen.spec.branches and chosen.spec.fade_unit != "neuron"
        if chosen.spec.looks_at_activations and not whole:
            specs.append(replace(chosen.spec, progressive=True))
    return list(dict.fromkeys(specs))


def _rivals(run: Run, chosen: Run | None, budget: Budget) -> bool:
    """Whether another text could make this run better than the chosen one."""
    if not budget.allows(run) or chosen is None:
        return False
    if budget.share is None:
        return budget.cost_of(run) < budget.cost_of(chosen) + ALLOWANCE
    return run.ratio - RIVAL * run.stderr <= chosen.ratio + RIVAL * chosen.stderr


def search(
    trials: Trials,
    budget: Budget,
    deadline: Deadline,
    most: int | None = None,
    seed: int = 0,
    report: Report = lambda *told: None,
) -> Iterator[Run]:
    """Try specs around the budget until the time is up, yielding each as it is measured.

    trials: on a text to go by; to know how good the finds are, measure them on another. Only with
    a calibration are specs tried that need one. deadline: nothing is begun that will not fit into
    what is left of it, and what was begun ends with it. most: proposals at most. Good recipes at
    the budget come first, then the presets, then what Optuna's tree-structured Parzen estimator
    proposes for the two objectives, log perplexity and cost.
    Raises UserError if optuna is not installed, or for a seed below 0 or of more than 32 bits.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed must lie between 0 and {MAX_SEED}, not {seed}.")
    try:
        import optuna
    except ImportError:
        raise UserError("the search needs optuna: pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = Space(
        budget=budget,
        calibrated=trials.calibration is not None,
        d_ff=min(mlp.weights.d_ff for mlp in trials.mlps),
        gated=trials.mlps[0].weights.gate is not None,
    )
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS),
    )
    starts = list(space.starts())
    for start in starts:
        study.enqueue_trial(start)
    yielded: set[ConversionSpec] = set()

    def run_for(spec: ConversionSpec) -> Run | None:
        """None where it cannot be: it would take too long, or its branches lose all neurons."""
        report(f"{len(yielded)} tried")
        try:
            return trials.run(spec, deadline)
        except (SpecError, TooSlow):
            return None

    def found(runs: Iterable[Run | None]) -> Iterator[Run]:
        for run in runs:
            if run is not None and run.spec not in yielded:
                yielded.add(run.spec)
                yield run

    def proposed() -> Iterator[Run | None]:
        asked = passed_over = 0
        while passed_over < MOST_PASSED_OVER and deadline.left > trials.seconds:
            if most is not None and asked >= most:
                return
            trial, asked = study.ask(), asked + 1
            run = run_for(space.spec(trial))
            passed_over = passed_over + 1 if run is None else 0
            yield run
            if run is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            cost, loss = budget.cost_of(run), log(min(run.ratio, WORST_RATIO))
            limit = cost - budget.share if budget.ratio is None else loss - log(budget.ratio)
            trial.set_constraint("budget", limit)
            study.tell(trial, [loss, cost])

    proposals = proposed()
    with suppress(TimeUp):
        yield from found(islice(proposals, len(starts)))
        yield from found(map(run_for, space.presets()))
        yield from found(proposals)
