"""Order: which neurons come first, and so which stay when only the first K branches are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .calibration import LayerActivations
from .mlps import MLPWeights

COMPACTED_AFTER = 64  # neurons dropped one by one before their rows are taken out of the matrices
DAMPING = 1e-2  # of the mean variance, added to all: few tokens leave the covariance singular


def by_activation(layer: LayerActivations) -> Tensor:
    """Mean |h|: the static baseline of the re-tests of CMoE (methods: keep-top)."""
    return layer.mean_size.argsort(descending=True, stable=True)


def by_fluctuation(layer: LayerActivations) -> Tensor:
    """Variance of h times squared length of its down column (FLAP, arXiv 2312.11983, WIFV): what
    remains lost when the mean of a dropped neuron is put into the bias."""
    score = layer.variance * layer.down_norms.square()
    return score.argsort(descending=True, stable=True)


def by_least_squares(layer: LayerActivations) -> Tensor:
    """Drop one neuron after the other, each time the one whose loss the others make up for best
    (optimal brain surgeon on the rows of down; d_ff³ operations)."""
    down = layer.weights.down.detach().cpu().T.double().clone()  # (d_ff, d_model)
    inverse = torch.linalg.inv(damped(layer.covariance.double()))
    neurons = torch.arange(len(down))  # those that are left
    dropped: list[int] = []
    while len(neurons) > 1:
        left = torch.ones(len(neurons), dtype=torch.bool)
        for _ in range(min(COMPACTED_AFTER, len(neurons) - 1)):
            loss = down.square().sum(1) / inverse.diagonal().clamp(min=1e-30)
            worst = int(loss.masked_fill(~left, float("inf")).argmin())
            column = inverse[:, worst] / inverse[worst, worst]
            down.addr_(column, down[worst].clone(), alpha=-1)
            inverse.addr_(column, inverse[worst].clone(), alpha=-1)
            left[worst] = False
            dropped.append(int(neurons[worst]))
        down, inverse, neurons = down[left], inverse[left][:, left], neurons[left]
    return torch.tensor([*neurons.tolist(), *reversed(dropped)])


def damped(covariance: Tensor) -> Tensor:
    """A covariance matrix with enough on its diagonal to be inverted."""
    size = covariance.diagonal().mean()
    extra = DAMPING * size + torch.finfo(covariance.dtype).tiny
    return covariance + extra * torch.eye(len(covariance)).to(covariance)


# name -> permutation of the neurons, those to keep first; None: as they are stored
ORDERS: dict[str, Callable[[LayerActivations], Tensor] | None] = {
    "contiguous": None,  # MLPMoE, section 3.1
    "activation": by_activation,
    "fluctuation": by_fluctuation,
    "least-squares": by_least_squares,
}
CALIBRATED = ("activation", "fluctuation", "least-squares")


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
