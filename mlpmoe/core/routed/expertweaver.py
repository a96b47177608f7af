"""ExpertWeaver (arXiv 2602.15521): experts from how gate activations vary over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from .clustering import balanced_kmeans, members
from .method import Request, RoutedMethod
from .partition import Partition, split_counts, take_highest

AUTO = "auto"  # shared share by the rule of section 3.2
ALPHA_MIN, ALPHA_MAX = 0.2, 0.7  # bounds of the shared share of a layer
EPSILON = 1e-6


def variation(profile: Tensor) -> Tensor:
    """(d_ff,): coefficient of variation of each neuron over the samples; profile (samples, d_ff).

    The mean counts without its sign, as signed profiles need."""
    return profile.std(0) / (profile.mean(0).abs() + EPSILON)


def shared_share(values: Tensor, tau: float) -> float:
    """α of one layer: the more neurons vary by more than τ, the fewer are shared (section 3.2)."""
    specialised = float((values > tau).float().mean())
    return ALPHA_MAX - (ALPHA_MAX - ALPHA_MIN) * specialised


def partition(request: Request) -> Partition:
    """Shared: the neurons of largest mean gate activation. Experts: balanced k-means on the
    profiles of the others (section 3.2). Layers share more or less, the rest runs by routing."""
    profile = request.layer.gate_means(request.spec.profile)  # (samples, d_ff)
    values = variation(profile)
    share = request.spec.shared
    if share == AUTO:
        share = shared_share(values, request.spec.tau)
    _, always = split_counts(request.experts, request.spec.active, share)
    shared, rest = take_highest(profile.mean(0).abs(), always * request.size)
    groups = request.experts - always
    if groups:
        assigned = balanced_kmeans(profile[:, rest].T.contiguous(), groups, request.generator)
        experts = rest[members(assigned, groups)]
    else:
        experts = torch.empty((0, request.size), dtype=torch.long)
    return Partition(shared, experts, variation=values)


METHOD = RoutedMethod(
    label="ExpertWeaver",
    about="Groups neurons whose gates react alike over the samples of the calibration text; "
    "layers share more or less, by how much their neurons vary.",
    source="arXiv 2602.15521",
    partition=partition,
    defaults={"experts": 64, "shared": AUTO, "router": "centroid"},
    fields=(
        "experts", "active", "shared", "router", "selection", "profile", "tau", "progressive",
        "seed",
    ),
    layer_adaptive=True,
)  # fmt: skip
