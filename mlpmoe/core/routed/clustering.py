"""Clustering: k-means, and groups of exactly equal size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..stopping import may_stop

MAX_ITERATIONS = 20  # greedy assignment does not improve monotonically; the best one counts


def assign_balanced(distances: Tensor) -> Tensor:
    """(n,) group of each point, groups of n / groups points each; distances (n, groups).

    The same as taking the pairs from the smallest distance up and giving each point the first
    group with a free place, ties in the order of points, then groups. Points and groups rank each
    other by the same number, so that outcome is the only stable matching, and all points can
    propose at once: each goes to its nearest group, a group that is too full sends its farthest
    points on.
    """
    count, groups = distances.shape
    places = count // groups
    if places * groups != count:
        raise ValueError(f"{count} points do not make {groups} equal groups")
    # ranks instead of distances: equal distances would leave open who has to go
    rank = torch.empty(count * groups, dtype=torch.long, device=distances.device)
    order = distances.flatten().argsort(stable=True)
    rank[order] = torch.arange(count * groups, device=distances.device)
    rank = rank.view(count, groups)
    preferred = rank.argsort(dim=1)  # (n, groups)
    choice = torch.zeros(count, 1, dtype=torch.long, device=distances.device)
    while True:
        may_stop()
        group = preferred.gather(1, choice)  # (n, 1)
        waiting = group[:, 0] * rank.numel() + rank.gather(1, group)[:, 0]
        line = waiting.argsort()  # by group, and within a group the nearest first
        sizes = torch.bincount(group[:, 0], minlength=groups)
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(count, device=distances.device) - starts[group[line, 0]]
        rejected = line[place >= places]
        if not len(rejected):
            return group[:, 0]
        choice[rejected] += 1


def balanced_kmeans(points: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """(n,) group of each point, from k-means with equal groups; points (n, features).

    Centres start at points drawn at random; assignment and means alternate until nothing changes,
    at most MAX_ITERATIONS times. Returns the assignment with the smallest sum of squared
    distances to the means of its groups.
    """
    start = torch.randperm(len(points), generator=generator)[:groups].to(points.device)
    centres, best, least = points[start], None, float("inf")
    for _ in range(MAX_ITERATIONS):
        may_stop()
        assigned = assign_balanced(torch.cdist(points, centres))
        centres = group_means(points, assigned, groups)
        cost = float((points - centres[assigned]).square().sum())
        if cost >= least:
            break
        best, least = assigned, cost
    return best


def kmeans(points: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n,) group of each point, and (groups, features) their means; points (n, features).

    As `balanced_kmeans`, but each point goes to the nearest centre. Groups that end up empty are
    left out, and there are no more groups than points.
    """
    start = torch.randperm(len(points), generator=generator)[:groups].to(points.device)
    centres, assigned = points[start], None
    for _ in range(MAX_ITERATIONS):
        may_stop()
        before, assigned = assigned, nearest(points, centres)
        if before is not None and torch.equal(before, assigned):
            break
        _, assigned, counts = assigned.unique(return_inverse=True, return_counts=True)
        centres = F.one_hot(assigned).to(points).T @ points / counts[:, None]
    return assigned, centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """(n,) the nearest centre of each point; points (n, features), centres (groups, features)."""
    return (points @ (2 * centres).T - centres.square().sum(1)).argmax(1)


def group_means(points: Tensor, assigned: Tensor, groups: int) -> Tensor:
    """(groups, features): the mean of each group of equal size."""
    sums = points.new_zeros(groups, points.shape[1]).index_add_(0, assigned, points)
    return sums / (len(points) // groups)


def members(assigned: Tensor, groups: int) -> Tensor:
    """(groups, n / groups): the points of each group, in ascending order."""
    return assigned.argsort(stable=True).view(groups, -1)
