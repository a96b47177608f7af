"""Neuron top-k: the gate, computed in full, chooses the neurons that run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..stopping import may_stop
from .choosing import choose_neurons
from .method import RoutedMethod
from .routed_mlp import NeuronMLP

THRESHOLD_SCORES = 2**24  # scores that a threshold is taken from


def compute_share(active: float, matrices: int) -> float:
    """What is left of an MLP's multiply-adds where this share of its neurons runs.

    matrices: 3 of an MLP with a gate, 2 of one without. One is computed in full: it chooses."""
    return (1 + (matrices - 1) * active) / matrices


def active_share(compute: float, matrices: int) -> float:
    """The share of the neurons that leaves this share of the multiply-adds; at most 0 where the
    matrix that chooses takes more than that."""
    return (matrices * compute - 1) / (matrices - 1)


def build(weights: MLPWeights, spec, layer: LayerActivations | None) -> NeuronMLP:
    """The module for one MLP: |φ(gate x)| of a neuron is its score, with the router "gate-norm"
    times the length of its column of down."""
    importance = weights.down.detach().float().norm(dim=0) if spec.router == "gate-norm" else None
    active = max(1, round(spec.active * weights.d_ff))
    threshold = idle_mean = None
    if active < weights.d_ff:
        if spec.selection == "threshold":
            threshold, active = _threshold(layer, importance, active)
        if spec.compensation != "none":
            idle_mean = layer.idle_mean(
                lambda x, gated: choose_neurons(gated, importance, int(active), threshold)
            )
    return NeuronMLP(weights, importance, active, threshold, idle_mean)


def _threshold(
    layer: LayerActivations, importance: Tensor | None, active: int
) -> tuple[float, float]:
    """The score above which `active` neurons per token lie on average, and that average."""
    d_ff = layer.weights.d_ff
    step = -(-layer.tokens * d_ff // THRESHOLD_SCORES)
    scores = torch.cat(
        [
            (g.abs() if importance is None else g.abs() * importance).flatten(0, 1)[::step]
            for _, g, _ in layer.pieces()
        ]
    )
    may_stop()
    idle = int(len(scores) * (d_ff - active))
    value = float(scores.flatten().kthvalue(max(1, idle)).values)
    return value, float((scores > value).sum() / len(scores))


METHOD = RoutedMethod(
    label="Neuron top-k",
    about="The gate is computed in full and picks single neurons, so there are no experts: up and "
    "down run for the picked ones only. A third of the MLP is always computed.",
    source="AbsTopK-GLU (arXiv 2602.15521); CATS (arXiv 2404.08763) with a threshold",
    partition=None,
    defaults={"router": "gate"},
    routers=("gate", "gate-norm"),
    fields=("active", "router", "selection", "progressive"),
    calibrated=False,
    build=build,
    compute_share=compute_share,
    active_share=active_share,
    family="neurons",
)
