"""Which experts, neurons or inputs each token runs, by their scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def choose(scores: Tensor, active: int, threshold: float | None) -> Tensor:
    """(tokens, n) bool: the `active` highest scores of each token, ties to the lower index, or all
    scores above `threshold`. scores: (tokens, n)."""
    if threshold is not None:
        return scores > threshold
    if not 0 < active < scores.shape[-1]:
        return torch.full_like(scores, active > 0, dtype=torch.bool)
    if scores.device.type != "cpu":
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best(scores, active), True)
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()  # compared faster
    least = _highest(scores.detach(), active)
    chosen, equal = scores > least, scores == least
    missing = active - chosen.sum(-1, keepdim=True)
    if (equal.sum(-1, keepdim=True) == missing).all():
        return chosen | equal
    return chosen | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def best(scores: Tensor, active: int) -> Tensor:
    """(tokens, active) int64: where the highest scores are, the best first, ties to the lower
    index. Nothing waits for a device."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :active]


def choose_neurons(
    gated: Tensor, importance: Tensor | None, active: int, threshold: float | None
) -> Tensor:
    """The same for neurons: scores are |φ(gate x)|, times a factor."""
    return choose(sizes(gated, importance), active, threshold)


def sizes(values: Tensor, importance: Tensor | None) -> Tensor:
    """The scores of single values."""
    return values.abs() if importance is None else values.abs() * importance


def _highest(scores: Tensor, number: int) -> Tensor:
    """(tokens, 1): the score that `number` of them reach. NumPy finds it several times faster."""
    place = scores.shape[-1] - number
    return torch.from_numpy(np.partition(scores.numpy(), place, axis=-1)[..., place, None])
