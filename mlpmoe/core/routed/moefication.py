"""MoEfication (arXiv 2110.01786): experts of neurons with similar weights."""

from __future__ import annotations

import torch.nn.functional as F

from .clustering import balanced_kmeans, members
from .method import Request, RoutedMethod
from .partition import Partition
from .splits import shared_and_rest


def partition(request: Request) -> Partition:
    """Balanced k-means on the rows of gate (of up, where there is none), scaled to length 1
    (section 3.2). It was made for MLPs without a gate; the gate decides here what W_in did."""
    shared, rest = shared_and_rest(request)
    first = request.weights.up if request.weights.gate is None else request.weights.gate
    rows = F.normalize(first.detach().float()[rest], dim=-1)
    groups = len(rest) // request.size
    assigned = balanced_kmeans(rows, groups, request.generator)
    return Partition(shared, rest[members(assigned, groups).cpu()])


METHOD = RoutedMethod(
    label="MoEfication",
    about="Groups neurons with similar weights; a token goes to the nearest groups.",
    source="arXiv 2110.01786",
    partition=partition,
    defaults={"experts": 64, "shared": 0.0, "router": "similarity"},
    fields=(
        "experts", "active", "shared", "router", "selection", "progressive", "seed",
    ),
    calibrated=False,
)  # fmt: skip
