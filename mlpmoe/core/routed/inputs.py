"""Input sparsity: each matrix reads, token by token, only the most important of its inputs."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..stopping import may_stop
from .input_mlp import ALL, InputMLP, Stages
from .method import RoutedMethod

TOKENS = 256  # of the calibration text, that errors are compared on
STEP = 0.05  # of a matrix, by which its share is lowered
LEAST = 0.2  # of the MLP's multiply-adds, where the path ends
THRESHOLD_SCORES = 2**24  # scores that a threshold is taken from


def build(weights: MLPWeights, spec, layer: LayerActivations | None) -> InputMLP:
    """The module for one MLP. Routers: "inputs", "inputs-norm" and "inputs-gate", which is the
    same as "inputs-norm" where the MLP has no gate.

    With topk every matrix has the active share; with a threshold the matrices share it out (see
    `_path`), and so many inputs are read on average.
    """
    rule = _rule(weights, spec.router)
    inputs = max(1, round(spec.active * weights.d_model))
    neurons = max(1, round(spec.active * weights.d_ff))
    read = Stages(inputs, neurons if rule[0] else weights.d_ff, neurons), None
    if spec.active < 1 and spec.selection == "threshold":
        everything = Stages(weights.d_model, weights.d_ff, weights.d_ff)
        dense = InputMLP(weights, *rule, everything)
        read = _thresholds(dense, layer, _shares(dense, spec, layer))
    module = InputMLP(weights, *rule, *read)
    if spec.compensation != "none" and module.idle_parameters:
        idle_mean = layer.idle_mean(lambda x, gated: module.select(x))
        module = InputMLP(weights, *rule, *read, idle_mean)
    return module


def _rule(weights: MLPWeights, router: str) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether neurons are opened; and the importances of inputs and of neurons."""
    opens = router == "inputs-gate" and weights.gate is not None
    if router == "inputs":
        return opens, None, None
    first = weights.up if weights.gate is None else weights.gate
    met = (first,) if opens or weights.gate is None else (first, weights.up)
    squares = sum(matrix.detach().float().square().sum(0) for matrix in met)
    return opens, squares.sqrt(), weights.down.detach().float().norm(dim=0)


# How the matrices share the budget out


def _shares(dense: InputMLP, spec, layer: LayerActivations) -> Stages:
    """The shares on the path at which the active share of the multiply-adds is left."""
    key = "inputs path", spec.router
    path = layer.remembered(key, lambda: _path(dense, layer))
    costs = _costs(dense)
    for before, after in pairwise(path):
        high, low = _left(before, costs), _left(after, costs)
        if low <= spec.active:
            part = (high - spec.active) / (high - low)
            return Stages(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
    last = spec.active / _left(path[-1], costs)  # beyond the end: the same proportions
    return Stages(*(share * last for share in path[-1]))


def _costs(module: InputMLP) -> Stages:
    """What each stage takes of the MLP's multiply-adds, if it leaves nothing out."""
    opened = 1 if module.opens else 0
    return Stages(*(n / module.matrices for n in (len(module.by_columns), opened, 1)))


def _left(shares: Stages, costs: Stages) -> float:
    return sum(share * cost for share, cost in zip(shares, costs, strict=True))


def _path(dense: InputMLP, layer: LayerActivations) -> list[Stages]:
    """Shares from 1 down, as TEAL finds them: the share of that stage is lowered by STEP whose
    error grows least for what is saved. Down reads no more neurons than are opened."""
    error = _errors(dense, layer.spread(TOKENS))
    costs, state, known = _costs(dense), Stages(1.0, 1.0, 1.0), 0.0
    path = [state]
    while _left(state, costs) > LEAST + 1e-9:
        tried = []
        for stage, cost in costs._asdict().items():
            share = round(getattr(state, stage) - STEP, 9)
            if cost and share > 0:
                lower = state._replace(**{stage: share})
                if dense.opens:
                    lower = lower._replace(read=min(lower.read, lower.opened))
                found = error(lower)
                saved = _left(state, costs) - _left(lower, costs)
                tried.append(((found - known) / saved, found, lower))
        _, known, state = min(tried)
        path.append(state)
    return path


def _errors(dense: InputMLP, x: Tensor):
    """A function of shares: the squared error of the output on x, relative to its size. The
    thresholds are those of x itself."""
    down = dense.down.float()

    def by_share(shares: Stages):
        return lambda stage, scores: scores > _threshold(scores, getattr(shares, stage))

    @lru_cache(maxsize=2)  # the share at hand, and the next one
    def products(share: float) -> tuple[Tensor, Tensor]:
        shares = Stages(share, 1.0, 1.0)
        return dense.products(x, by_share(shares)("inputs", dense.input_scores(x)))

    def said(shares: Stages) -> Tensor:
        may_stop()
        gated, h = products(shares.inputs)
        choose = by_share(shares)
        return (h * dense.reads(h, dense.opened(gated, choose), choose)).float() @ down

    wanted = said(Stages(1.0, 1.0, 1.0))
    size = wanted.square().sum().clamp(min=1e-30)
    return lambda shares: float((said(shares) - wanted).square().sum() / size)


# What is read at given shares


def _threshold(scores: Tensor, share: float) -> float:
    """The value above which this share of all scores lies. NumPy finds it many times faster."""
    idle = round(scores.numel() * (1 - share))
    if idle == 0:
        return ALL
    return float(np.partition(scores.flatten().float().cpu().numpy(), idle - 1)[idle - 1])


def _thresholds(dense: InputMLP, layer: LayerActivations, shares: Stages) -> tuple[Stages, Stages]:
    """What is read per token on average, and the thresholds: one stage after the other, each on
    what those before it left."""
    x = layer.spread(THRESHOLD_SCORES // max(dense.down.shape))
    active, thresholds = Stages(*dense.active)._asdict(), Stages(ALL, ALL, ALL)._asdict()

    def choose(stage: str, scores: Tensor) -> Tensor:
        may_stop()
        thresholds[stage] = _threshold(scores, getattr(shares, stage))
        chosen = scores > thresholds[stage]
        active[stage] = float(chosen.sum() / len(chosen))
        return chosen

    dense.run(x, choose)
    return Stages(**active), Stages(**thresholds)


METHOD = RoutedMethod(
    label="Input sparsity",
    about="Each matrix reads, token by token, only the most important of its inputs: no experts, "
    "and nothing is computed in full only to choose.",
    source="TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427); by open gates: this project",
    partition=None,
    defaults={"router": "inputs-gate"},
    routers=("inputs-gate", "inputs", "inputs-norm"),
    fields=("active", "router", "selection", "progressive"),
    calibrated=False,
    build=build,
    family="inputs",
)
