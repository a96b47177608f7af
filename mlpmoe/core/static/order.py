"""Order: which neurons come first, and so which stay when only the first K branches are kept.

Every order is a permutation of the neurons, so the MLP is the same function until something is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..registry import Choice
from ..stopping import may_stop

COMPACTED_AFTER = 64  # neurons dropped one by one before their rows are taken out of the matrices
LEAST_VARIANCE = 1e-30  # added too: a layer may be dead
DAMPING = 1e-2  # of the mean variance, added to all: few tokens leave the covariance singular


@dataclass(frozen=True)
class Order(Choice):
    """How to sort the neurons of an MLP."""

    _: KW_ONLY
    rank: Callable[[MLPWeights, LayerActivations | None, int], Tensor] | None  # None: as stored
    seeded: bool = False  # whether it draws


def at_random(weights: MLPWeights, layer: LayerActivations | None, seed: int) -> Tensor:
    """The same permutation in every layer of that width."""
    return torch.randperm(weights.d_ff, generator=torch.Generator().manual_seed(seed))


def by_norm(weights: MLPWeights, layer: LayerActivations | None = None, seed: int = 0) -> Tensor:
    """Product of the lengths of a neuron's row of gate, row of up and column of down: an upper
    bound on what it can say about an input of length 1, if φ does not amplify."""
    score = weights.down.detach().float().norm(dim=0)
    for rows in (weights.gate, weights.up):
        if rows is not None:
            score = score * rows.detach().float().norm(dim=1)
    return _largest_first(score)


def by_activation(weights: MLPWeights, layer: LayerActivations, seed: int = 0) -> Tensor:
    """Mean |h|: the static baseline of the re-tests of CMoE (methods: keep-top)."""
    return _largest_first(layer.mean_size)


def by_fluctuation(weights: MLPWeights, layer: LayerActivations, seed: int = 0) -> Tensor:
    """Variance of h times squared length of its down column (FLAP, arXiv 2312.11983, WIFV): what
    remains lost when the mean of a dropped neuron is put into the bias."""
    return _largest_first(layer.variance * layer.down_norms.square())


def by_least_squares(weights: MLPWeights, layer: LayerActivations, seed: int = 0) -> Tensor:
    """Drop one neuron after the other, each time the one whose loss the others make up for best
    (optimal brain surgeon on the rows of down; d_ff³ operations)."""
    down = weights.down.detach().cpu().T.double().clone()  # (d_ff, d_model)
    if layer.target is None:
        inverse = torch.linalg.inv(damped(layer.covariance))
    else:  # start from the best that all neurons can say
        _, covariance, cross, _ = layer.own_regression
        inverse = torch.linalg.inv(damped(covariance))
        down += inverse @ (cross - covariance @ down)
    neurons = torch.arange(len(down))  # those that are left
    dropped: list[int] = []
    while len(neurons) > 1:
        left = torch.ones(len(neurons), dtype=torch.bool)
        for _ in range(min(COMPACTED_AFTER, len(neurons) - 1)):
            may_stop()
            loss = down.square().sum(1) / inverse.diagonal().clamp(min=1e-30)
            worst = int(loss.masked_fill(~left, float("inf")).argmin())
            column = inverse[:, worst] / inverse[worst, worst]
            down.addr_(column, down[worst].clone(), alpha=-1)
            inverse.addr_(column, inverse[worst].clone(), alpha=-1)
            left[worst] = False
            dropped.append(int(neurons[worst]))
        down, inverse, neurons = down[left], inverse[left][:, left], neurons[left]
    return torch.tensor([*neurons.tolist(), *reversed(dropped)])


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """A covariance matrix with enough on its diagonal to be inverted."""
    extra = damping * covariance.diagonal().mean() + LEAST_VARIANCE
    return covariance + extra * torch.eye(len(covariance)).to(covariance)


def _largest_first(score: Tensor) -> Tensor:
    return score.cpu().argsort(descending=True, stable=True)


ORDERS: dict[str, Order] = {
    "contiguous": Order(
        "as stored (MLPMoE)", "as they are stored", short="as stored", rank=None
    ),
    "random": Order(
        "shuffled", "in random order", short="random order", rank=at_random, seeded=True
    ),
    "norm": Order(
        "long weight vectors first", "those with the longest weights first", short="norm order",
        rank=by_norm,
    ),
    "activation": Order(
        "most active first", "the most active first", short="activation order",
        rank=by_activation, calibrated=True,
    ),
    "fluctuation": Order(
        "most varying first (FLAP)", "the most varying first", short="fluctuation order",
        rank=by_fluctuation, calibrated=True,
    ),
    "least-squares": Order(
        "hardest to replace first", "those hardest to make up for first",
        short="least-squares order", rank=by_least_squares, calibrated=True,
    ),
}  # fmt: skip


def order_of(name: str, weights: MLPWeights, layer: LayerActivations | None, seed: int) -> Tensor:
    """(d_ff,): the neurons in the order of this name. Found once per layer of activations."""
    order = ORDERS[name]
    if order.rank is None:
        return torch.arange(weights.d_ff)
    if layer is None or not order.calibrated:
        return order.rank(weights, layer, seed)
    return layer.remembered(("order", name), lambda: order.rank(weights, layer, seed))


def permute(weights: MLPWeights, neurons: Tensor) -> MLPWeights:
    """The MLP of these neurons, in this order; of all neurons it is the same function."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[neurons]

    return replace(
        weights,
        gate=rows(weights.gate),
        up=rows(weights.up),
        down=weights.down.detach()[:, neurons],
        gate_bias=rows(weights.gate_bias),
        up_bias=rows(weights.up_bias),
    )
