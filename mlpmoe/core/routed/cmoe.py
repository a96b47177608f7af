"""CMoE (arXiv 2502.04416): experts of neurons that are among the strongest for the same tokens."""

from __future__ import annotations

import torch

from ..stopping import may_stop
from .clustering import assign_balanced, group_means, members
from .method import Request, RoutedMethod
from .partition import Partition, split_counts

STRONGEST = 10  # K_a: markers per token


def partition(request: Request) -> Partition:
    """Shared: the neurons marked most often. Experts: one balanced assignment to the markers of
    the most often marked neurons of the rest, by L1 distance (sections 3.2 and 3.3; the balanced
    greedy assignment stands in for Jonker-Volgenant).

    Markers are 0 or 1, so distances are sums: |A_i - A_j| = n_i + n_j - 2 A_i·A_j, and for a
    centre c with values from 0 to 1, Σ c + Σ A (1 - 2c).
    """
    markers = request.layer.markers(STRONGEST)  # (tokens, d_ff)
    rate = markers.sum(0)
    ranked = rate.argsort(descending=True, stable=True)
    _, always = split_counts(request.experts, request.spec.active, request.spec.shared)
    shared = ranked[: always * request.size].sort().values
    rest = ranked[always * request.size :]
    groups = request.experts - always
    if not groups:
        empty = torch.empty((0, request.size), dtype=torch.long)
        return Partition(shared, empty, representatives=empty[:, 0])
    columns = markers[:, rest].float()  # (tokens, n)
    may_stop()
    counts = columns.sum(0)
    distances = counts[:, None] + counts[:groups] - 2 * columns.T @ columns[:, :groups]
    may_stop()
    grouped = members(assign_balanced(distances), groups)  # (groups, size)
    assigned = torch.empty(len(rest), dtype=torch.long)
    assigned[grouped] = torch.arange(groups)[:, None]
    centres = group_means(columns.T.contiguous(), assigned, groups)  # (groups, tokens)
    may_stop()
    to_centre = centres.sum(1)[:, None] + ((1 - 2 * centres) @ columns)  # (groups, n)
    nearest = to_centre.gather(1, grouped).argmin(1, keepdim=True)
    representatives = rest[grouped.gather(1, nearest)[:, 0]]
    return Partition(shared, rest[grouped].sort(1).values, representatives=representatives)


METHOD = RoutedMethod(
    label="CMoE",
    about="Shares the neurons that are most often among the strongest, groups the others by the "
    "tokens they are strong on; one neuron stands for each expert as its router.",
    source="arXiv 2502.04416",
    partition=partition,
    defaults={"experts": 8, "shared": 0.375, "router": "representative"},
    routers=("representative", "centroid", "similarity", "regression", "oracle"),
)
