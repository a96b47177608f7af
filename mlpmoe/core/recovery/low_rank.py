"""A matrix plus a change of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANK, SCALE = 16, 2.0  # an alpha of 32 over the rank


class LowRank(nn.Module):
    """A matrix plus a change of low rank (LoRA, arXiv 2106.09685): W + 2·B·A, B zero at first.

    A (rank, columns) and B (rows, rank) are trained, in float32 at least; rank is never more than
    W (rows, columns) has. `forward()`: the sum, in their dtype.
    """

    def __init__(self, tensor: Tensor, generator: torch.Generator, rank: int = RANK) -> None:
        super().__init__()
        wide = torch.promote_types(tensor.dtype, torch.float32)
        rows, columns = tensor.shape
        rank = min(rank, rows, columns)
        drawn = torch.rand(rank, columns, generator=generator, dtype=wide)
        self.a = nn.Parameter(((2 * drawn - 1) * columns**-0.5).to(tensor.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=wide, device=tensor.device))
        self.register_buffer("given", tensor.detach(), persistent=False)

    def forward(self) -> Tensor:
        return self.given + SCALE * (self.b @ self.a)
