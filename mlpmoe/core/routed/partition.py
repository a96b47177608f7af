"""Partition: which neurons every token runs, and which expert each other neuron belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpecError


@dataclass(frozen=True)
class Partition:
    """The neurons of one MLP, each in exactly one place; but experts for token clusters overlap."""

    shared: Tensor  # (shared neurons,) int64
    experts: Tensor  # (routed experts, neurons per expert) int64
    representatives: Tensor | None = None  # (routed experts,) int64: CMoE's router reads these
    centres: Tensor | None = None  # (routed experts, d_model): means of the tokens of each expert
    variation: Tensor | None = None  # (d_ff,): coefficient of variation, for display

    @property
    def neurons(self) -> Tensor:
        """(d_ff,): all neurons, shared first, then expert by expert."""
        return torch.cat([self.shared, self.experts.flatten()])


def take_highest(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The neurons of the `count` highest scores, ties to the lower index, and the others; both
    ascending. score: (d_ff,)."""
    ranked = score.argsort(descending=True, stable=True)
    return ranked[:count].sort().values, ranked[count:].sort().values


def expert_count(d_ff: int, experts: int) -> int:
    """How many experts of equal size an MLP can have: the largest divisor of d_ff up to
    `experts`. SpecError if that is 1."""
    count = next(n for n in range(min(experts, d_ff), 0, -1) if d_ff % n == 0)
    if count == 1:
        divisors = [n for n in range(2, d_ff + 1) if d_ff % n == 0]
        raise SpecError(
            f"{d_ff} neurons cannot be cut into 2 to {experts} experts of equal size; allowed "
            f"numbers of experts: {', '.join(map(str, divisors[:12]))}."
        )
    return count


def split_counts(experts: int, active: float, shared: float) -> tuple[int, int]:
    """How many experts run for a token, and how many of these always do.

    Both round to the nearest whole expert; at least one runs. At least one is left to the router
    unless all run.
    """
    running = max(1, round(active * experts))
    always = min(round(shared * experts), experts if running == experts else running - 1)
    return running, always
