"""Co-activation: experts of neurons that are strong on the same tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .clustering import balanced_kmeans, members
from .method import Request, RoutedMethod
from .partition import Partition, split_counts, take_highest

TOKENS = 2048  # of the calibration text that neurons are compared on


def partition(request: Request) -> Partition:
    """Shared: the neurons whose output varies most and so would be missed most (FLAP's score).
    Experts: balanced k-means on the sizes |h| over tokens, each neuron scaled to length 1."""
    score = request.layer.variance * request.layer.down_norms.square()
    _, always = split_counts(request.experts, request.spec.active, request.spec.shared)
    shared, rest = take_highest(score, always * request.size)
    groups = request.experts - always
    if not groups:
        return Partition(shared, torch.empty((0, request.size), dtype=torch.long))
    sizes = request.layer.sizes(TOKENS)[:, rest]  # (tokens, n)
    points = F.normalize(sizes.T, dim=-1)
    assigned = balanced_kmeans(points, groups, request.generator)
    return Partition(shared, rest[members(assigned, groups)])


METHOD = RoutedMethod(
    label="Co-activation",
    about="Groups neurons that are strong on the same tokens; the router is fitted to the experts' "
    "output. Made in this project from the parts of the others.",
    source="this project",
    partition=partition,
    defaults={"experts": 64, "shared": 0.25, "router": "regression"},
    fields=(
        "experts", "active", "shared", "router", "selection", "progressive", "seed",
    ),
)  # fmt: skip
