"""Fractal Fade by magnitude: zero the small weights of each branch (MLPMoE, section 3.2).

The published loop takes `torch.quantile(|w|.float(), s_i)` per branch: a full sort in float32,
12 s for a 0.5 B model, and an error above 2**24 elements. The same numbers come from a
selection: magnitudes of floating-point numbers order like their bit patterns without the sign,
so the two order statistics around the quantile are found by an integer partition, and the mask
is an integer comparison. On the CPU this runs in NumPy, one branch at a time, which stays in
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..stopping import may_stop

QUANTILE_LIMIT = 2**24  # elements; torch.quantile refuses more up to torch 2.13


@dataclass(frozen=True)
class Threshold:
    """Weights with |w| <= cut are zeroed. `value` is the quantile, `cut` the largest magnitude
    in the tensor that does not exceed it: the same mask, but exact in the tensor's own dtype."""

    value: float
    cut: float


def magnitude_threshold(
    weight: Tensor, sparsity: float, memory: np.ndarray | None = None
) -> Threshold:
    """The magnitude at quantile `sparsity` of `weight`, as torch.quantile(|w|.float(), s) gives it.

    `weight`: any shape, float16/bfloat16/float32/float64. The rank is computed in float32 as
    torch does, up to 2**24 elements; above, where torch has no answer, in float64. Quantiles
    between two magnitudes are interpolated linearly, also as torch does. `memory`: see
    `_magnitude_bits`.
    """
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()  # the paper compares in float32
    rank, low, high = _rank(weight.numel(), sparsity)
    if weight.is_cuda:
        magnitudes = weight.abs().float().flatten()
        below, above = (magnitudes.kthvalue(k + 1).values.cpu() for k in (low, high))
    else:
        bits = _magnitude_bits(weight.cpu(), memory).ravel()
        bits.partition(low)
        next_up = bits[low + 1 :].min() if high > low else bits[low]
        found = np.array([bits[low], next_up])
        below, above = torch.from_numpy(found).view(weight.dtype).float()
    return _between(below, above, rank - low)


def _rank(count: int, sparsity: float) -> tuple[float, int, int]:
    """Where the quantile lies among `count` sorted magnitudes, and the places beside it."""
    last = count - 1
    if last < QUANTILE_LIMIT:
        rank = float(np.float32(sparsity) * np.float32(last))
    else:
        rank = sparsity * last
    return rank, floor(rank), min(ceil(rank), last)


def _between(below: Tensor, above: Tensor, part: float) -> Threshold:
    value = float(torch.lerp(below, above, part))
    return Threshold(value, cut=float(above) if value >= float(above) else float(below))


class MagnitudeCounts:
    """How often each magnitude occurs in a tensor of 16-bit floats, which have few: what a fade
    leaves of it, for any strength, without fading it."""

    def __init__(self, weight: Tensor) -> None:
        counts = np.bincount(_magnitude_bits(weight.detach().cpu()).ravel())
        found = counts.nonzero()[0]
        values = torch.from_numpy(found.astype(np.int16)).view(weight.dtype)
        self.values = values.float().numpy()  # distinct magnitudes, ascending
        self.counts = counts[found].astype(np.int32)
        self.ends = self.counts.cumsum()  # weights up to each magnitude

    def threshold(self, sparsity: float) -> float:
        """As `magnitude_threshold` gives it; 0.0 if nothing is asked for."""
        return self._threshold(sparsity).value if sparsity else 0.0

    def left(self, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
        """The magnitudes above zero that stay, ascending, and how often each occurs."""
        cut = self._threshold(sparsity).cut if sparsity else 0.0
        first = np.searchsorted(self.values, np.float32(cut), side="right")
        return self.values[first:], self.counts[first:]

    def _threshold(self, sparsity: float) -> Threshold:
        rank, low, high = _rank(int(self.ends[-1]), sparsity)
        below, above = np.searchsorted(self.ends, (low, high), side="right")
        return _between(*torch.from_numpy(self.values[[below, above]]), rank - low)


def fade_projection(
    weight: Tensor, sizes: tuple[int, ...], sparsities: list[float]
) -> tuple[Tensor, tuple[float, ...]]:
    """Fade one projection (d_ff, d_model), branch by branch, each against its own quantile.

    Returns the new weight and the threshold per branch.
    """
    faded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    memory = np.empty(max(sizes) * weight.shape[1], _integers(weight.dtype))
    pieces = zip(weight.detach().split(sizes), faded.split(sizes), sparsities, strict=True)
    return faded, tuple(_fade_branch(*piece, memory) for piece in pieces)


def _fade_branch(source: Tensor, target: Tensor, sparsity: float, memory: np.ndarray) -> float:
    """Write the faded `source` into `target`, both (neurons, d_model).

    Returns the threshold, or 0.0 if nothing is asked for: quantile 0 is the smallest magnitude,
    and a strict `>` would zero it.
    """
    may_stop()
    if sparsity == 0:
        target.copy_(source)
        return 0.0
    threshold = magnitude_threshold(source, sparsity, memory)
    if source.dtype == torch.float64:
        target.copy_(source * (source.abs().float() > threshold.value))
    elif source.device.type == "cpu":
        (cut,) = _bits(torch.tensor([threshold.cut], dtype=source.dtype))
        bits, survives = _bits(source), _magnitude_bits(source, memory)
        # the difference is negative where the weight survives; its sign, spread over all bits,
        # is the mask
        np.subtract(cut, survives, out=survives)
        np.right_shift(survives, np.iinfo(bits.dtype).bits - 1, out=survives)
        np.bitwise_and(bits, survives, out=_bits(target))
    else:
        target.copy_(F.hardshrink(source, threshold.cut))
    return threshold.value


def _integers(dtype: torch.dtype) -> type[np.signedinteger]:
    """The integers that hold the bits of a float dtype; float64 is compared in float32."""
    return np.int16 if dtype.itemsize == 2 else np.int32


def _bits(weight: Tensor) -> np.ndarray:
    """The bit patterns of a float tensor on the CPU; a view where the tensor is contiguous."""
    bits = torch.int16 if weight.dtype.itemsize == 2 else torch.int32
    return weight.contiguous().view(bits).numpy()


def _magnitude_bits(weight: Tensor, memory: np.ndarray | None = None) -> np.ndarray:
    """The bit patterns without the sign, in `memory` if there is some: fresh memory for every
    branch would cost more than the arithmetic."""
    bits = _bits(weight)
    out = None if memory is None else memory[: bits.size].reshape(bits.shape)
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out)
