"""How many neurons the experts of each layer have, so that a budget holds exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_out(logits: Sequence[Tensor], total: int) -> list[int]:
    """For each layer, how many neurons its experts have, all as many: `total` over all layers, and
    at least one in each.

    Those of the highest logits of the model are chosen, as many as the budget allows. A layer's
    experts have the mean number of those chosen in it, rounded down, or up where most is cut off
    (largest remainder). So logits are compared between layers, and layers may differ in width.

    logits: (experts, d_ff) of each layer. total: from the number of layers to the sum of all d_ff.
    """
    pooled = torch.cat([own.flatten() for own in logits])
    layer = torch.cat([torch.full((own.numel(),), n) for n, own in enumerate(logits)])
    experts = torch.tensor([len(own) for own in logits])
    ranked = pooled.argsort(descending=True, stable=True).cpu()
    spent = experts[layer[ranked]].double().reciprocal().cumsum(0)
    chosen = layer[ranked[spent < total + 1e-6]]
    wanted = torch.bincount(chosen, minlength=len(logits)).double() / experts
    counts = (wanted + 1e-6).floor().clamp(min=1)
    for n in (wanted - counts).argsort(descending=True, stable=True).tolist():
        counts[n] += counts.sum() < total and counts[n] < logits[n].shape[1]
    while counts.sum() > total:  # of those that were raised to one
        counts[counts.argmax()] -= 1
    return counts.long().tolist()


def best_neurons(logits: Tensor, count: int) -> Tensor:
    """(experts, count) int64, ascending: the highest logits of each expert, ties to the lower
    index. logits: (experts, d_ff)."""
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    return ranked[:, :count].sort(dim=1).values
