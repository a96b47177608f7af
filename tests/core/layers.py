"""One random MLP with the input that a calibration text would give it, and its activations
computed from the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmoe.core.activations import LayerActivations
from mlpmoe.core.mlps import MLPWeights

DAMPING = 1e-2  # of the mean variance: what ridge regression adds to each one
D_MODEL, D_FF = 12, 24
SAMPLES, LENGTH = 12, 10
KINDS = ("gated", "gated with biases", "plain", "plain with biases")


def random_mlp(
    kind: str = "gated", d_ff: int = D_FF, d_model: int = D_MODEL, dtype=torch.float32, seed=0
) -> MLPWeights:
    generator = torch.Generator().manual_seed(seed)
    gated, biases = kind.startswith("gated"), kind.endswith("biases")

    def random(*shape):
        return nn.Parameter((torch.randn(shape, generator=generator) / 3).to(dtype))

    return MLPWeights(
        gate=random(d_ff, d_model) if gated else None,
        up=random(d_ff, d_model),
        down=random(d_model, d_ff),
        gate_bias=random(d_ff) if gated and biases else None,
        up_bias=random(d_ff) if biases else None,
        down_bias=random(d_model) if biases else None,
        activation=F.silu,
    )


def random_input(d_model: int = D_MODEL, dtype=torch.float32, seed: int = 1) -> Tensor:
    """(samples, tokens, d_model): samples differ in their mean, features depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, LENGTH, d_model, generator=generator)
    x = x + torch.randn(SAMPLES, 1, d_model, generator=generator)
    return (x @ torch.randn(d_model, d_model, generator=generator) / d_model**0.5).to(dtype)


def random_sensitivity(d_model: int = D_MODEL) -> Tensor:
    """(d_model, d_model) float64: of a loss to which some directions matter much more."""
    gradients = torch.randn(3 * d_model, d_model, generator=torch.Generator().manual_seed(5))
    gradients = (gradients * torch.arange(1, d_model + 1)).double()
    return gradients.T @ gradients / len(gradients)


def layer_of(mlp: MLPWeights, seed: int = 1) -> LayerActivations:
    x = random_input(mlp.d_model, mlp.up.dtype, seed)
    return LayerActivations(mlp, x, sensitivity=random_sensitivity(mlp.d_model))


@torch.no_grad()
def gated_and_h(mlp: MLPWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """φ(gate x) and h of all neurons: (..., d_ff) in the dtype of x."""

    def project(matrix, bias):
        y = x @ matrix.to(x.dtype).T
        return y if bias is None else y + bias.to(x.dtype)

    up = project(mlp.up, mlp.up_bias)
    if mlp.gate is None:
        return mlp.activation(up), mlp.activation(up)
    gated = mlp.activation(project(mlp.gate, mlp.gate_bias))
    return gated, gated * up


def ridge(h: Tensor, wanted: Tensor, down: Tensor) -> Tensor:
    """(d_model, n): least squares of the wanted output (tokens, d_model) on h (tokens, n), both
    float64 and without their means, with rows of data that draw it towards the down there is."""
    centred = (h - h.mean(0)) / len(h) ** 0.5
    strength = (DAMPING * centred.square().sum(0).mean()).sqrt()
    data = torch.cat([centred, strength * torch.eye(h.shape[1]).double()])
    target = torch.cat([(wanted - wanted.mean(0)) / len(h) ** 0.5, strength * down.double().T])
    return torch.linalg.lstsq(data, target).solution.T


@torch.no_grad()
def output(mlp: MLPWeights, x: Tensor, h: Tensor | None = None) -> Tensor:
    """What the MLP gives for x; of `h` instead of its activations, if given."""
    h = gated_and_h(mlp, x)[1] if h is None else h
    y = h @ mlp.down.to(x.dtype).T
    return y if mlp.down_bias is None else y + mlp.down_bias.to(x.dtype)
