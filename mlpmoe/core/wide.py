"""float64 on every device: Apple's GPUs have none, so for them such sums are kept on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_DOUBLE = ("mps",)  # types of devices


def wide_device(device: torch.device) -> torch.device:
    """Where float64 of tensors on `device` is kept: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_DOUBLE else device


def wide_zeros(*shape: int, device: torch.device) -> Tensor:
    """float64 sums, to which what is found on `device` is added: `sums += found.to(sums.device)`.

    Copies change the device and the dtype in two steps: an Apple GPU would change it first."""
    return torch.zeros(shape, dtype=torch.float64, device=wide_device(device))


def wide_sum(values: Tensor, dim: int | None = None) -> Tensor:
    """The sum over one dimension, or of all, added up in float64."""
    return values.to(wide_device(values.device)).sum(dim, dtype=torch.float64)


def widened(values: Tensor) -> Tensor:
    """The same numbers in float64."""
    return values.to(wide_device(values.device)).double()
