"""How anything here is trained: AdamW, with a rate that rises for a little while and then falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import cos, isfinite, pi

import torch
from torch import Tensor, nn

from .errors import UserError

BETAS, CLIP = (0.9, 0.95), 1.0
WARM_UP = 20  # steps at most, a tenth of all at most


def height(step: int, steps: int) -> float:
    """The share of the largest rate at a step: a short way up, then half a cosine to 0."""
    warm = min(WARM_UP, steps // 10)
    if step < warm:
        return (step + 1) / (warm + 1)
    return (1 + cos(pi * (step - warm) / (steps - warm))) / 2


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    decay: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train `parameters` in place by AdamW for so many steps, gradients cut to length CLIP; returns
    the loss of each step.

    loss(step): a scalar with a gradient, of the step's own data. on_step(done) is called before
    the first step and after each, without gradients; it may raise to end the training.
    Deterministic, as `loss` is. Raises UserError for a loss that is not finite.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay)
    found = []
    with torch.no_grad():
        if on_step:
            on_step(0)
        for step in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(step)
                value.backward()
            if not isfinite(value):
                raise UserError(f"the loss is not finite at step {step + 1}; try a smaller rate.")
            found.append(float(value))
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate * height(step, steps)
            optimizer.step()
            if on_step:
                on_step(step + 1)
    return found
