"""Launches of the kernels in `triton_kernels`: block sizes, and what is made between them.

On the CPU they run in triton's interpreter only (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .one_token import Rows
from .triton_kernels import add_parts, grouped_hidden, grouped_parts, some_hidden, some_summed

ROWS, COLUMNS = 8, 512  # of a matrix, at a time, in products with one token
ADDED_ROWS, ADDED_COLUMNS = 32, 128  # that are added up at a time
PROGRAMS = 512  # about as many share a sum: several per processor
NEURONS = 64  # of an expert, at a time, for a block of tokens
LEAST_TOKENS, MOST_TOKENS = 16, 128  # in a block
PARTIAL_BYTES = 1 << 25  # of what pairs of token and expert say, which should stay in a cache


def hidden(
    mlp: Rows, kind: int, x: Tensor, experts: Tensor, shared: int, size: int, gated=None
) -> Tensor:
    """(n,) float32: h of one token for the shared neurons and those of its experts, less its mean
    when idle.

    x: (1, d_model). experts: (k,) int, n = shared + k · size. gated: (1, d_ff), φ(gate x) where it
    is known already.
    """
    count, d_model = shared + len(experts) * size, x.shape[1]
    gate = None if gated is not None else mlp.gate
    h = torch.empty(count, dtype=torch.float32, device=x.device)
    some_hidden[(triton.cdiv(count, ROWS),)](
        x.contiguous(), gate, mlp.up, mlp.gate_bias, mlp.up_bias, mlp.idle_mean, gated, experts, h,
        count, shared, size, d_model, 0 if gate is None else gate.stride(0), mlp.up.stride(0),
        KIND=kind, ROWS=ROWS, COLUMNS=min(COLUMNS, triton.next_power_of_2(d_model)),
    )  # fmt: skip
    return h


def summed(
    mlp: Rows, h: Tensor, experts: Tensor, shared: int, size: int, dtype: torch.dtype
) -> Tensor:
    """(1, d_model): Σ h_i · down_i + bias, in a dtype. The other arguments as of `hidden`."""
    count, d_model = len(h), mlp.down.shape[1]
    pieces = triton.cdiv(d_model, ADDED_COLUMNS)
    steps = triton.cdiv(count, ADDED_ROWS)
    per_part = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, pieces)))
    number = triton.cdiv(steps, per_part)
    parts = torch.empty(number, d_model, dtype=torch.float32, device=h.device)
    some_summed[(pieces, number)](
        h, mlp.down, experts, parts, count, shared, size, d_model, mlp.down.stride(0),
        per_part * ADDED_ROWS, ROWS=ADDED_ROWS, COLUMNS=ADDED_COLUMNS,
    )  # fmt: skip
    out = torch.empty(1, d_model, dtype=dtype, device=h.device)
    add_parts[(1, pieces)](
        parts, None, mlp.down_bias, out, number, d_model, 0, d_model, COLUMNS=ADDED_COLUMNS
    )
    return out


def grouped(
    mlp: Rows, kind: int, x: Tensor, experts: Tensor, shared: int, size: int, base: Tensor | None
) -> Tensor:
    """(tokens, d_model): what the chosen experts of each token add up to, with the bias of down.

    x: (tokens, d_model). experts: (tokens, k) int. base: (tokens, d_model), is added: what the
    shared neurons say.
    """
    x, (tokens, chosen) = x.contiguous(), experts.shape
    d_model, number = x.shape[1], (mlp.up.shape[0] - shared) // size
    each = triton.next_power_of_2(triton.cdiv(tokens * chosen, number))
    block = min(MOST_TOKENS, max(LEAST_TOKENS, each))
    depth = 32 if x.dtype == torch.float32 else 64
    pairs, *blocks = _blocks(experts, number, block)
    options = {
        "WIDEN": x.device.type == "cpu", "TOKENS": block, "DEPTH": depth,
        "num_warps": 8 if block == MOST_TOKENS else 4,
    }  # fmt: skip
    h = x.new_empty(len(pairs), triton.cdiv(size, 16) * 16)
    grouped_hidden[(len(blocks[0]) * triton.cdiv(size, NEURONS),)](
        x, mlp.gate, mlp.up, mlp.gate_bias, mlp.up_bias, mlp.idle_mean, pairs, *blocks, h,
        chosen, number, shared, size, d_model,
        0 if mlp.gate is None else mlp.gate.stride(0), mlp.up.stride(0), h.stride(0),
        KIND=kind, NEURONS=NEURONS, **options,
    )  # fmt: skip

    fitting = PARTIAL_BYTES // (4 * len(pairs) * ADDED_COLUMNS)
    width = ADDED_COLUMNS * min(max(1, fitting), triton.cdiv(d_model, ADDED_COLUMNS))
    pieces = width // ADDED_COLUMNS
    parts = torch.empty(len(pairs), width, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    for first in range(0, d_model, width):
        grouped_parts[(len(blocks[0]) * pieces,)](
            h, mlp.down, pairs, *blocks, parts, number, shared, size, d_model,
            mlp.down.stride(0), h.stride(0), first, width, COLUMNS=ADDED_COLUMNS, **options,
        )  # fmt: skip
        add_parts[(tokens, pieces)](
            parts, base, mlp.down_bias, out, chosen, width, first, d_model, COLUMNS=ADDED_COLUMNS
        )
    return out


def _blocks(experts: Tensor, number: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of token and expert (token · k + place), sorted by expert, (pairs,), and blocks of
    at most `block` of them, none of two experts: their expert, first pair and last pair + 1.

    There are as many blocks as there could be, and those that are not needed have the expert
    `number`. experts: (tokens, k). All int64.
    """
    owner, pairs = experts.flatten().long().sort(stable=True)
    edges = torch.searchsorted(owner, torch.arange(number + 1, device=owner.device))
    needed = (edges.diff() + block - 1) // block  # (number,) blocks of each expert
    until = needed.cumsum(0)
    most = min(len(pairs), len(pairs) // block + number)
    places = torch.arange(most, device=owner.device)
    owners = torch.searchsorted(until, places, right=True)
    real = owners.clamp(max=number - 1)
    starts = edges[real] + (places - (until - needed)[real]) * block
    return pairs, owners, starts, torch.minimum(starts + block, edges[real + 1])
