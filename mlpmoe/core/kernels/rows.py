"""Products with a few rows of a matrix that read only these rows: what makes decoding faster.

Copying the rows first costs more than is saved on a CPU. Two kernels of torch read them in place:
sampled_addmm (products with chosen rows; not in 16-bit formats) and embedding_bag (weighted sums
of chosen rows). Both share the work by the parts it is cut into.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 16  # pieces of the work, at least one per core

with warnings.catch_warnings():  # said once per process, and then no more
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([]).long(), torch.tensor([]), check_invariants=False
    )


def dot_rows(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """(n,): x (1, d) times the given rows of `weight` (d_ff, d). rows: (n,) int64, ascending."""
    in_place = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    if not in_place or torch.is_grad_enabled() or not len(rows):
        return F.linear(x, weight.index_select(0, rows))[0]
    pattern = torch.sparse_csr_tensor(
        _cuts(len(rows)),
        rows,
        x.new_zeros(len(rows)),
        size=(PARTS, len(weight)),
        check_invariants=False,
    )
    x = x.expand(PARTS, -1).contiguous()
    return torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0).values()


def sum_rows(h: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """(1, d): Σ h_j · row_j over the given rows of `weight` (d_ff, d). h, rows: (n,)."""
    if torch.is_grad_enabled() or weight.device.type != "cpu" or not len(rows):
        return h[None] @ weight.index_select(0, rows)
    cuts = _cuts(len(rows))[:-1]
    return F.embedding_bag(rows, weight, cuts, per_sample_weights=h, mode="sum").sum(
        0, keepdim=True
    )


def _cuts(count: int) -> Tensor:
    """(PARTS + 1,): where `count` things are cut into PARTS parts."""
    return torch.arange(PARTS + 1) * count // PARTS
