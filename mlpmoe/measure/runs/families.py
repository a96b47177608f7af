"""Which line a run belongs to, and what the runs beside it say: of one model on one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import exp, isfinite, log

from ...core.spec import ConversionSpec
from ...core.static.schedule import DEFAULT_EXPONENT, branch_sparsities
from .search import Budget
from .sweep import Run

LEVEL = 0.015  # of the dense cost: runs that lie nearer than that cost the same
LEAST_SAVED = 0.005  # of the dense cost: who saves less has no place on that axis
AMONG: dict[str, Callable[[ConversionSpec], bool]] = {
    "all": lambda spec: True,
    "static": lambda spec: not spec.routed,
    "uncalibrated": lambda spec: not spec.needs_calibration,  # look at no text
}
# How log(perplexity ratio) grows with what is removed: as a power, whose exponent two runs give.
# Between the first run and dense it is not known, and a typical one is taken: larger where weights
# or neurons go one by one, the least of them first, than where whole groups go. LEAST_EXPONENT and
# MOST_EXPONENT span what was found, leaving out one shipped run after the other; see `estimate`.
GROUPS, ONE_BY_ONE = 1.5, 3.0
LEAST_EXPONENT, MOST_EXPONENT = 0.9, 4.2
BETWEEN = 2.0  # the factor that log(ratio) is uncertain by, midway between two runs
NOTHING, MOST = 1e-4, 690.0  # log(ratio) that counts as none, and as broken
ERRORS = 2.0  # standard errors of the runs an estimate comes from


@dataclass(frozen=True)
class Shares:
    """What a conversion leaves of the cost of the dense MLPs."""

    nonzero: float  # of their non-zero parameters
    compute: float  # of their multiply-adds per token, routers included

    def of(self, cost: str) -> float:
        return self.nonzero if cost == "nonzero" else self.compute


@dataclass(frozen=True)
class Estimate:
    """Perplexity to dense, of a spec that was not measured."""

    ratio: float
    low: float  # about nine in ten are between low and high
    high: float
    of: tuple[Run, ...]  # the runs it comes from


def family_of(spec: ConversionSpec) -> str:
    """ "published": MLPMoE as its paper has it, whatever B, K and fade; "static": any other static
    recipe; "routed": experts chosen by a router; "neurons": single neurons chosen by the gate;
    "inputs": of each matrix, those that it reads; "directions": of each matrix, seen as a sum of
    rank-one matrices, those that stay, for all tokens or for each; "oracle": chosen by what only
    the dense model knows, a bound that cannot be deployed."""
    if spec.router == "oracle":
        return "oracle"
    if spec.routed:
        return spec.routed.family
    paper = ConversionSpec(
        branches=spec.branches, keep=spec.keep, fade=spec.fade, seed=spec.seed, spared=spec.spared
    )
    return "published" if recipe_of(spec) == recipe_of(paper) else "static"


def cost_of(run: Run, cost: str) -> float:
    """A share of the dense MLPs' cost, a key of `search.COSTS`."""
    return Budget(cost).cost_of(run)


def expected_shares(spec: ConversionSpec, gated: bool = True) -> Shares:
    """What the spec asks for, before anything is converted: biases, α and routers aside, and
    spared layers not reckoned with. gated: whether MLPs have a gate beside up and down."""
    matrices = ("gate", "up", "down") if gated else ("up", "down")
    if spec.routed:
        compute = spec.routed.compute_share(spec.active, len(matrices))
        return Shares(compute if spec.router in spec.routed.fixed else 1.0, compute)
    kept = spec.kept / spec.branches
    left = kept * (1 - _sparsity(spec))
    if spec.fade_unit == "neuron":
        return Shares(left, left)
    fading = sum(name in spec.projections for name in matrices) / len(matrices)
    return Shares(kept - (kept - left) * fading, kept)


# lines


def saving(runs: Iterable[Run], cost: str) -> list[Run]:
    """The runs with a place on an axis of cost: they save some of it, and are not broken."""
    return [r for r in runs if isfinite(r.ratio) and cost_of(r, cost) < 1 - LEAST_SAVED]


def lines(runs: Iterable[Run], cost: str) -> dict[str, list[Run]]:
    """Label -> runs from cheap to dear, for the lines that have any; each of them meets the dense
    model at all of the cost and a ratio of 1, which is not among the runs.

    cost: "compute" or "nonzero", on which routers save nothing and have no line, but for low rank
    that is the same for all tokens. Of runs at the
    same level of cost, the best counts. A "best" line joins what is not beaten by a cheaper run of
    its kind. The published recipe removes in two ways, K and fade, that do not lie on one line:
    only what drops branches saves compute, and of the parameters there are two lines, each
    with the runs that do nothing else.
    """
    of: dict[str, list[Run]] = {}
    for run in saving(runs, cost):
        of.setdefault(family_of(run.spec), []).append(run)
    paper = [run for run in of.get("published", []) if not run.spec.spared]
    dropping = [run for run in paper if not run.spec.fades]
    static = _unbeaten([*of.get("published", []), *of.get("static", [])], cost)
    if all(family_of(run.spec) == "published" for run in static):
        static = []  # the line of the published recipe says it
    if cost == "compute":
        found = {
            "MLPMoE as published": _best_per_level(dropping, cost),
            "best static": static,
            "best routed": _unbeaten(of.get("routed", []), cost),
            "single neurons": _unbeaten(of.get("neurons", []), cost),
            "input sparsity": _unbeaten(of.get("inputs", []), cost),
            "low rank": _unbeaten(of.get("directions", []), cost),
            "oracle": _unbeaten(of.get("oracle", []), cost),
        }
    else:
        fading = [run for run in paper if run.spec.kept == run.spec.branches]
        found = {
            "MLPMoE, K": _best_per_level(dropping, cost),
            "MLPMoE, fade": _best_per_level(fading, cost),
            "best static": static,
            "low rank": _unbeaten(of.get("directions", []), cost),
        }
    return {name: some for name, some in found.items() if some}


def _best_per_level(runs: Iterable[Run], cost: str) -> list[Run]:
    """The best run at each level of cost, from cheap to dear."""
    levels: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (cost_of(run, cost), run.ratio)):
        if not levels or cost_of(run, cost) - cost_of(levels[-1][0], cost) >= LEVEL:
            levels.append([])
        levels[-1].append(run)
    found: list[Run] = []
    for run in (min(level, key=lambda run: run.ratio) for level in levels):
        if found and cost_of(run, cost) - cost_of(found[-1], cost) < LEVEL / 2:
            run = min(found.pop(), run, key=lambda run: run.ratio)  # on both sides of a border
        found.append(run)
    return found


def _unbeaten(runs: Iterable[Run], cost: str) -> list[Run]:
    found: list[Run] = []
    for run in _best_per_level(runs, cost):
        if not found or run.ratio < found[-1].ratio:
            found.append(run)
    return found


def best_at(runs: Iterable[Run], cost: str, share: float, among: str = "all") -> Run | None:
    """The run with the least perplexity at no more than this share of the dense MLPs' cost; never
    an oracle. among: a key of AMONG."""
    allowed = [
        run for run in runs
        if AMONG[among](run.spec) and family_of(run.spec) != "oracle" and isfinite(run.ratio)
        and cost_of(run, cost) <= share + LEVEL
    ]  # fmt: skip
    return min(allowed, key=lambda run: run.ratio, default=None)


def along(line: Sequence[Run], cost: str, shares: Iterable[float]) -> list[float]:
    """The ratio of perplexity on a line of `lines`, at shares of the dense cost from that of its
    cheapest run to 1, by the rule of `estimate`."""
    points = [(1 - cost_of(run, cost), _log(run, 0)) for run in reversed(line)]
    exponent = _exponent(line[-1].spec)
    return [_exp(_between(points, 1 - share, exponent)) for share in shares]


def _between(points: Sequence[tuple[float, float]], removed: float, exponent: float) -> float:
    """log(ratio) where so much is removed; points: removed and log(ratio), removed rising. Beyond
    the last it stays as it is. exponent: towards dense."""
    low = max((p for p in points if p[0] <= removed), default=None)
    high = min((p for p in points if p[0] > removed), default=None)
    if high is None:
        return points[-1][1]
    if low is None:
        return high[1] * (max(0.0, removed) / high[0]) ** exponent
    t = log(removed / low[0]) / log(high[0] / low[0])
    return low[1] ** (1 - t) * high[1] ** t


# estimates


def estimate(runs: Iterable[Run], spec: ConversionSpec) -> Estimate | None:
    """What the perplexity will be, from runs of the same recipe: one that differs in nothing but
    how much it removes. None without a run on the far side: nothing is extrapolated.

    Between two runs log(ratio) is a power of what is removed; from the last one towards dense one
    with a typical exponent. Leaving out one shipped run after the other, log(ratio) came out
    within a factor of (median, 90th percentile): 1.3 and 1.8 between two runs (18 of the demo
    model); towards dense 1.3 and 2.2 (15 of the demo model, by half of what is removed) and 1.3
    and 2.4 (36 of SmolLM2-135M). low and high span that and twice the errors of the runs; all but
    three of these 69 lay between them.
    """
    recipe, removed = recipe_of(spec), removed_by(spec)
    if removed == 0:
        return Estimate(1.0, 1.0, 1.0, ())
    near: dict[float, Run] = {}
    for run in runs:
        if recipe_of(run.spec) == recipe and isfinite(run.ratio) and removed_by(run.spec) > 0:
            at = round(removed_by(run.spec), 6)
            if at not in near or _nearer(run, near[at], spec):
                near[at] = run
    below = max((at for at in near if at <= removed + 1e-6), default=None)
    above = min((at for at in near if at >= removed - 1e-6), default=None)
    if above is None or (below is None and recipe[0] != 0):
        return None
    if below is None:  # towards dense
        far, share = near[above], removed / above
        ratio, low, high = (
            _exp(_log(far, errors) * share**exponent)
            for errors, exponent in (
                (0, _exponent(spec)), (-ERRORS, MOST_EXPONENT), (ERRORS, LEAST_EXPONENT)
            )
        )  # fmt: skip
        return Estimate(ratio, low, high, (far,))
    a, b = near[below], near[above]
    t = 0.0 if above == below else log(removed / below) / log(above / below)
    factor = BETWEEN ** (4 * t * (1 - t))  # none where a run was measured

    def between(errors: float, times: float) -> float:
        return _log(a, errors) ** (1 - t) * _log(b, errors) ** t * times

    middle = between(0, 1)  # low and high: who removes more does no less damage
    low = min(middle, max(between(-ERRORS, 1 / factor), _log(a, -ERRORS)))
    high = max(middle, min(between(ERRORS, factor), _log(b, ERRORS)))
    return Estimate(_exp(middle), _exp(low), _exp(high), (a,) if a is b else (a, b))


def removed_by(spec: ConversionSpec) -> float:
    """The share of the budget that a spec removes, 0 to 1: of the neurons (or inputs) a token does
    not meet, or, where fade works, of the weights or neurons in the matrices that fade."""
    if spec.routed:
        return 1 - spec.active
    return _sparsity(spec) if spec.fades else 1 - spec.kept / spec.branches


def recipe_of(spec: ConversionSpec) -> tuple:
    """All that a spec says, but for how much it removes: what runs have in common that can be
    compared so. First the share of branches that K drops, where fade removes something as well."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    silent = {"branches", "keep", "fade", "active"}
    if spec.routed:
        if spec.shared == ConversionSpec(method=spec.method, active=spec.active).shared:
            silent.add("shared")  # the method's own, which may depend on the active share
    else:
        if not spec.fades:
            silent |= {name for name in values if name.startswith("fade_")}
        if spec.kept == spec.branches and not spec.fits:
            silent.add("compensation")  # there is nothing to make up for
    dropped = 1 - spec.kept / spec.branches if spec.fades else 0.0
    return (dropped, *((name, value) for name, value in values.items() if name not in silent))


def _exponent(spec: ConversionSpec) -> float:
    """Of log(ratio), between dense and the first run."""
    if (spec.routed and spec.experts is None) or (spec.fades and spec.fade_unit != "neuron"):
        return ONE_BY_ONE
    return GROUPS


def _sparsity(spec: ConversionSpec) -> float:
    """The mean share that fade removes in the branches that are kept."""
    if spec.pattern:
        n, m = spec.pattern
        return n / m
    exponent = DEFAULT_EXPONENT if spec.fade_exponent is None else spec.fade_exponent
    shares = branch_sparsities(spec.branches, spec.fade, spec.fade_schedule, exponent)
    return sum(shares[: spec.kept]) / spec.kept


def _nearer(run: Run, other: Run, spec: ConversionSpec) -> bool:
    """Whether a run that removes as much as another says more about the spec."""
    keys = [(one.spec.branches != spec.branches, one.stderr) for one in (run, other)]
    return keys[0] < keys[1]


def _log(run: Run, errors: float) -> float:
    """log(ratio), so many standard errors further up."""
    error = run.stderr / run.ratio if isfinite(run.stderr) else 0.0
    return max(NOTHING, log(run.ratio) + errors * error)


def _exp(value: float) -> float:
    return exp(min(value, MOST))
