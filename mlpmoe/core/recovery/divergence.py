"""KL divergence of next-token distributions, by a bounded number of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..wide import wide_sum, wide_zeros

AT_ONCE = 2**22  # logits that are held in float32


class _Divergence(torch.autograd.Function):
    """Keeps the gradient in the dtype of the logits, and none of what lies between."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        total = wide_zeros(device=logits.device)
        gradient = torch.empty_like(logits)
        rows = max(1, AT_ONCE // logits.shape[-1])
        parts = (tensor.split(rows) for tensor in (logits, wanted, gradient))
        for some, target, place in zip(*parts, strict=True):
            said, due = (_wide(tensor).log_softmax(-1) for tensor in (some, target))
            probability = due.exp()
            terms = probability * (due - said)
            # a logit of -inf counts nothing; what is undefined stays undefined
            total += wide_sum(terms.masked_fill_(probability == 0, 0))
            place.copy_(said.exp_().sub_(probability))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient), None


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Σ over tokens of KL(wanted ‖ logits) in nats, a float64 scalar (on the CPU where their device
    has none); both (..., vocabulary), of any floating dtype. Computed in float32, or float64 where
    that is given; differentiable in `logits`."""
    return _Divergence.apply(logits.flatten(0, -2), wanted.flatten(0, -2))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
