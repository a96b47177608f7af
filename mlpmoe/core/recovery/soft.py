"""Routed MLPs whose choices have a gradient, and the same output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.one_token import OneToken
from ..routed.choosing import choose
from ..routed.cluster_mlp import ClusterMLP
from ..routed.routed_mlp import RoutedMLP

TEMPERATURE = 0.4  # of a choice of one expert, and of a mask (ToMoE, its code)


class SoftlyRouted(RoutedMLP):
    """Choosing the best k has no gradient, so it is that of a soft choice (straight through): a
    sigmoid of the score's distance to the border between chosen and not, in units of the scores'
    standard deviation. All experts run, so that a router learns of those it left out, too.

    A RoutedMLP becomes one, and one a RoutedMLP, by its `__class__`: both have the same tensors.
    """

    def select(self, x: Tensor) -> Tensor:
        """(tokens, experts), 0 or 1 in the dtype of x."""
        scores = self.router(x)
        with torch.no_grad():
            chosen = choose(scores, int(self.active), self.threshold)
            ends = scores.topk(min(int(self.active) + 1, self.experts)).values[:, -2:]
            border, unit = ends.mean(1, keepdim=True), scores.std().clamp(min=1e-12)
        soft = ((scores - border) / unit).sigmoid()
        return straight_through(chosen, soft, x.dtype)

    def _many(self, x: Tensor) -> Tensor:
        return self.summed(x) @ self.down


class SoftlyClustered(ClusterMLP):
    """The expert of the highest score runs, with the gradient of a softmax; which neurons it has
    is a mask that is given, a buffer `running` (experts, d_ff), 0 or 1, with a gradient of its own.
    """

    running: Tensor
    balance: Tensor  # of the last pass: from 1 / experts, if all are chosen as often, up to 1

    def gates(self, x: Tensor) -> Tensor:
        """(tokens, experts), 0 or 1 in the dtype of x. Scores count in units of their standard
        deviation among the experts of a token."""
        scores = self.router(x)
        chosen = F.one_hot(scores.argmax(-1), self.experts)
        unit = scores.detach().std(1).mean().clamp(min=1e-12)
        soft = (scores / (TEMPERATURE * unit)).softmax(-1)
        # of Switch Transformers, arXiv 2101.03961
        self.balance = (chosen.to(soft).mean(0) * soft.mean(0)).sum()
        return straight_through(chosen, soft, x.dtype)

    def summed(self, x: Tensor) -> Tensor:
        return self._activations(x, slice(None)) * (self.gates(x) @ self.running)

    def _many(self, x: Tensor) -> Tensor:
        return self.summed(x) @ self.down

    def _one(self, x: Tensor) -> Tensor:
        return self._many(x)

    def one_token(self) -> OneToken | None:
        return None


def straight_through(hard: Tensor, soft: Tensor, dtype: torch.dtype) -> Tensor:
    """`hard`, to the bit, with the gradient of `soft`."""
    return hard.to(dtype) + (soft - soft.detach()).to(dtype)
