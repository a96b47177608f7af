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
from .removal import Removal, damped, removal


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
    """Drop a few neurons at a time, those whose loss in the output the others make up for best."""
    down, covariance = _to_drop_from(weights, layer)
    return removal(down, covariance).order


def by_loss(weights: MLPWeights, layer: LayerActivations, seed: int = 0) -> Tensor:
    """The same, with what is lost weighed by what it means for the loss of the model."""
    return removal_by_loss(weights, layer).order


def removal_by_loss(weights: MLPWeights, layer: LayerActivations) -> Removal:
    """Neurons dropped by the loss of the model, in nats per token as the sensitivity has it."""

    def make() -> Removal:
        down, covariance = _to_drop_from(weights, layer)
        values, vectors = torch.linalg.eigh(layer.sensitivity / 2)
        return removal(down @ (vectors * values.clamp(min=0).sqrt()), covariance)

    return layer.remembered("removal by loss", make)


def by_gradient(weights: MLPWeights, layer: LayerActivations, seed: int = 0) -> Tensor:
    """Variance of h times what a unit of it costs the loss of the model: activation × gradient,
    squared (Molchanov et al., arXiv 1906.10771), less what the mean as a bias makes up for."""
    down = weights.down.detach().cpu().double()
    cost = (layer.sensitivity @ down).mul_(down).sum(0)
    return _largest_first(layer.variance.double() * cost)


def _to_drop_from(weights: MLPWeights, layer: LayerActivations) -> tuple[Tensor, Tensor]:
    """Rows of down (d_ff, d_model) and covariance of h (d_ff, d_ff), float64, to begin with."""
    down = weights.down.detach().cpu().T.double()
    if layer.target is None:
        return down, layer.covariance
    _, covariance, cross, _ = layer.own_regression  # the best that all neurons can say
    return down + torch.linalg.solve(damped(covariance), cross - covariance @ down), covariance


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
    "gradient": Order(
        "largest activation × gradient first", "those with the largest activation × gradient first",
        short="gradient order", rank=by_gradient, calibrated=True, by_loss=True,
    ),
    "loss": Order(
        "costliest for the model's loss first", "those first whose loss costs the model most",
        short="order by loss", rank=by_loss, calibrated=True, by_loss=True,
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
