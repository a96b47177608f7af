"""Splits that look at nothing: MLPMoE's contiguous branches, and LLaMA-MoE's random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .method import Request, RoutedMethod
from .partition import Partition, split_counts, take_highest


def shared_and_rest(request: Request) -> tuple[Tensor, Tensor]:
    """The neurons of largest mean |h|·‖down‖, as many as the spec wants shared, and the others;
    both ascending."""
    _, always = split_counts(request.experts, request.spec.active, request.spec.shared)
    neurons = torch.arange(request.weights.d_ff)
    if not always:
        return neurons[:0], neurons
    score = request.layer.mean_size * request.layer.down_norms
    return take_highest(score, always * request.size)


def contiguous(request: Request) -> Partition:
    """Neurons as they are stored: MLPMoE's branches, with a router over them."""
    shared, rest = shared_and_rest(request)
    return Partition(shared, rest.view(-1, request.size))


def random(request: Request) -> Partition:
    """Neurons at random (LLaMA-MoE, arXiv 2406.16554): the floor for every clustering."""
    shared, rest = shared_and_rest(request)
    order = torch.randperm(len(rest), generator=request.generator)
    return Partition(shared, rest[order].view(-1, request.size).sort(1).values)


CONTIGUOUS = RoutedMethod(
    label="MLPMoE's branches, routed",
    about="MLPMoE's branches as they are stored, with a router over them: what its paper leaves to "
    "future work.",
    source="arXiv 2511.21089, future work",
    partition=contiguous,
    defaults={"experts": 16, "shared": 0.0, "router": "centroid"},
    calibrated=False,
)
RANDOM = RoutedMethod(
    label="Random split",
    about="Neurons at random: the floor that every clustering has to beat.",
    source="arXiv 2406.16554",
    partition=random,
    defaults={"experts": 64, "shared": 0.0, "router": "centroid"},
    fields=(
        "experts", "active", "shared", "router", "selection", "progressive", "seed",
    ),
    calibrated=False,
)  # fmt: skip
