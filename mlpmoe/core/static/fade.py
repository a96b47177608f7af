"""Fractal Fade by magnitude: zero the small weights of each branch (MLPMoE, section 3.2).

The published loop takes `torch.quantile(|w|.float(), s_i)` per branch: a full sort in float32,
12 s for a 0.5 B model, and an error above 2**24 elements. The same numbers come from a
selection: magnitudes of floating-point numbers order like their bit patterns without the sign,
so the two order statistics around the quantile are found by an integer partition, and the mask
is an integer comparison. On the CPU this runs in NumPy, one branch at a time, which stays in
cache. What is left is mostly the system's: to be given memory for the new weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, floor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..stopping import may_stop

QUANTILE_LIMIT = 2**24  # elements; torch.quantile refuses more up to torch 2.13

# What 16-bit numbers are ordered as. NumPy (2.4) partitions them with vector instructions only
# where there are those of AVX-512 VBMI2, 30 times faster than without; 32-bit ones with AVX2 too.
_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()
_ORDERED = np.int16 if _FEATURES.get("avx512_vbmi2") else np.int32


@dataclass(frozen=True)
class Threshold:
    """Weights with |w| <= cut are zeroed. `value` is the quantile, `cut` the largest magnitude
    in the tensor that does not exceed it: the same mask, but exact in the tensor's own dtype."""

    value: float
    cut: float


def magnitude_threshold(weight: Tensor, sparsity: float) -> Threshold:
    """The magnitude at quantile `sparsity` of `weight`, as torch.quantile(|w|.float(), s) gives it.

    `weight`: any shape, float16/bfloat16/float32/float64. The rank is computed in float32 as
    torch does, up to 2**24 elements; above, where torch has no answer, in float64. Quantiles
    between two magnitudes are interpolated linearly, also as torch does.
    """
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()  # the paper compares in float32
    if weight.is_cuda:
        rank, low, high = _rank(weight.numel(), sparsity)
        magnitudes = weight.abs().float().flatten()
        below, above = (magnitudes.kthvalue(k + 1).values.cpu() for k in (low, high))
        return _between(below, above, rank - low)
    return _threshold_of_bits(_magnitude_bits(weight), weight.dtype, sparsity)


def _threshold_of_bits(bits: np.ndarray, dtype: torch.dtype, sparsity: float) -> Threshold:
    """The same of the bit patterns of magnitudes of a dtype, (numbers,). They may be reordered."""
    rank, low, high = _rank(bits.size, sparsity)
    ordered = bits.astype(_ORDERED, copy=False) if bits.itemsize == 2 else bits
    ordered.partition(low)
    next_up = ordered[low + 1 :].min() if high > low else ordered[low]
    found = np.array([ordered[low], next_up], bits.dtype)
    return _between(*torch.from_numpy(found).view(dtype).float(), rank - low)


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
        counts = np.bincount(_magnitude_bits(weight.detach()))
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
    weight: Tensor, sizes: Sequence[int], sparsities: Sequence[float], axis: int = 0
) -> tuple[Tensor, tuple[float, ...]]:
    """Fade one projection, branch by branch, each against its own quantile.

    axis: of the neurons; 0 for gate and up, (d_ff, d_model), 1 for down, (d_model, d_ff).
    Returns the new weight and the threshold per branch.
    """
    weight, sizes = weight.detach(), tuple(sizes)
    faded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if weight.device.type == "cpu" and weight.dtype != torch.float64:
        source, target = _bits(weight), _bits(faded)
        memory = np.empty(max(sizes) * weight.shape[1 - axis], source.dtype)
        fade, ends = partial(_fade_bits, dtype=weight.dtype, memory=memory), np.cumsum(sizes)[:-1]
        pieces = np.split(source, ends, axis), np.split(target, ends, axis)
    else:
        fade, pieces = _fade_branch, (weight.split(sizes, axis), faded.split(sizes, axis))
    return faded, tuple(fade(*branch) for branch in zip(*pieces, sparsities, strict=True))


def _fade_branch(source: Tensor, target: Tensor, sparsity: float) -> float:
    """Write the faded `source` into `target`, both of one branch.

    Returns the threshold, or 0.0 if nothing is asked for: quantile 0 is the smallest magnitude,
    and a strict `>` would zero it.
    """
    may_stop()
    if sparsity == 0:
        target.copy_(source)
        return 0.0
    threshold = magnitude_threshold(source, sparsity)
    if source.dtype == torch.float64:
        target.copy_(source * (source.abs().float() > threshold.value))
    else:
        target.copy_(F.hardshrink(source, threshold.cut))
    return threshold.value


def _fade_bits(
    source: np.ndarray,
    target: np.ndarray,
    sparsity: float,
    dtype: torch.dtype,
    memory: np.ndarray,
) -> float:
    """The same with the bit patterns of a dtype, on the CPU: by NumPy, since torch's threads would
    wait for cores that other layers are on. In `memory`, as fresh memory for every branch would
    cost more than the arithmetic."""
    may_stop()
    if sparsity == 0:
        np.copyto(target, source)
        return 0.0
    memory = memory[: source.size]
    magnitudes, info = memory.reshape(source.shape), np.iinfo(source.dtype)
    np.bitwise_and(source, info.max, out=magnitudes)
    threshold = _threshold_of_bits(memory, dtype, sparsity)
    (cut,) = _bits(torch.tensor([threshold.cut], dtype=dtype))
    np.bitwise_and(source, info.max, out=magnitudes)  # again: the threshold reordered them
    # the difference is negative where the weight survives; its sign, spread over all bits, is
    # the mask
    np.subtract(cut, magnitudes, out=magnitudes)
    np.right_shift(magnitudes, info.bits - 1, out=magnitudes)
    np.bitwise_and(source, magnitudes, out=target)
    return threshold.value


def _bits(weight: Tensor) -> np.ndarray:
    """The bit patterns of a float tensor on the CPU, as a view."""
    return weight.view(torch.int16 if weight.dtype.itemsize == 2 else torch.int32).numpy()


def _magnitude_bits(weight: Tensor) -> np.ndarray:
    """The bit patterns without the sign, (numbers,)."""
    bits = _bits(weight.cpu())
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max).ravel()
