"""Fractal Fade: zero small weights, more in later branches (MLPMoE, section 3.2).

The published loop takes `torch.quantile(|w|.float(), s_i)` per branch: a full sort in float32,
12 s for a 0.5 B model, and an error above 2**24 elements. The same numbers come from a
selection: magnitudes of floating-point numbers order like their bit patterns without the sign,
so the two order statistics around the quantile are found by an integer partition, and the mask
is an integer comparison. On the CPU this runs in NumPy, one branch at a time, which stays in
cache and needs no thread pool: it is as fast on a busy server as on an idle one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .mlps import MLPWeights

QUANTILE_LIMIT = 2**24  # elements; torch.quantile refuses more up to torch 2.13


@dataclass(frozen=True)
class Threshold:
    """Weights with |w| <= cut are zeroed. `value` is the quantile, `cut` the largest magnitude
    in the tensor that does not exceed it: the same mask, but exact in the tensor's own dtype."""

    value: float
    cut: float


def fade_sparsities(branches: int, strength: float) -> list[float]:
    """Requested sparsity of each branch: s_i = min(1, strength·i/B). Branch 0 is untouched."""
    return [min(1.0, strength * i / branches) for i in range(branches)]


def magnitude_threshold(weight: Tensor, sparsity: float) -> Threshold:
    """The magnitude at quantile `sparsity` of `weight`, as torch.quantile(|w|.float(), s) gives it.

    `weight`: any shape, float16/bfloat16/float32/float64. The rank is computed in float32 as
    torch does, up to 2**24 elements; above, where torch has no answer, in float64. Quantiles
    between two magnitudes are interpolated linearly, also as torch does.
    """
    last = weight.numel() - 1
    if last < QUANTILE_LIMIT:
        rank = float(torch.tensor(sparsity, dtype=torch.float32) * last)
    else:
        rank = sparsity * last
    below, above = _order_statistics(weight, floor(rank), min(ceil(rank), last))
    value = float(torch.lerp(below, above, torch.tensor(rank - floor(rank), dtype=torch.float32)))
    return Threshold(value, cut=float(above) if value >= float(above) else float(below))


def _order_statistics(weight: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The magnitudes of rank `low` and `high` (0-based) as float32 scalars."""
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    if weight.is_cuda:
        magnitudes = weight.abs().float().flatten()
        found = [magnitudes.kthvalue(rank + 1).values.cpu() for rank in (low, high)]
        return found[0], found[1]
    magnitudes = _magnitude_bits(weight.cpu()).ravel()
    magnitudes.partition(low)
    next_up = magnitudes[low + 1 :].min() if high > low else magnitudes[low]
    found = np.array([magnitudes[low], next_up])
    below, above = torch.from_numpy(found).view(weight.dtype).float()
    return below, above


def _bits(weight: Tensor) -> np.ndarray:
    """The bit patterns of a 16- or 32-bit float tensor on the CPU, as signed integers; a view
    where the tensor is contiguous."""
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return weight.contiguous().view(bits).numpy()


def _magnitude_bits(weight: Tensor) -> np.ndarray:
    bits = _bits(weight)
    return bits & np.iinfo(bits.dtype).max


def _shrink(source: Tensor, threshold: Threshold, target: Tensor) -> None:
    """target = source * (|source| > threshold), exactly."""
    if source.dtype == torch.float64:  # the paper compares in float32
        target.copy_(source * (source.abs().float() > threshold.value))
    elif source.device.type == "cpu":
        cut = _bits(torch.tensor([threshold.cut], dtype=source.dtype))
        np.multiply(_bits(source), _magnitude_bits(source) > cut, out=_bits(target))
    else:
        target.copy_(F.hardshrink(source, threshold.cut))


def fade_projection(
    weight: Tensor, sizes: tuple[int, ...], sparsities: list[float]
) -> tuple[Tensor, tuple[float, ...]]:
    """Fade one projection (d_ff, d_model), branch by branch, each against its own quantile.

    Returns the new weight and the threshold per branch (0.0 where nothing was asked for:
    quantile 0 is the smallest magnitude, and a strict `>` would zero it).
    """
    faded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    thresholds = []
    pieces = zip(weight.detach().split(sizes), faded.split(sizes), sparsities, strict=True)
    for source, target, sparsity in pieces:
        if sparsity == 0:
            target.copy_(source)
            thresholds.append(0.0)
            continue
        threshold = magnitude_threshold(source, sparsity)
        _shrink(source, threshold, target)
        thresholds.append(threshold.value)
    return faded, tuple(thresholds)


def fade(
    weights: MLPWeights, sizes: tuple[int, ...], sparsities: list[float]
) -> tuple[MLPWeights, dict[str, tuple[float, ...]]]:
    """Fade gate and up of an MLP; down is untouched, as published.

    `sizes`: neurons per branch, summing to d_ff; `sparsities`: the share to zero, per branch.
    Returns the new weights (the same tensors if nothing is to be zeroed) and the thresholds by
    projection name.
    """
    if not any(sparsities):
        return weights, {}
    changed, thresholds = {}, {}
    for name in ("gate", "up"):
        weight = getattr(weights, name)
        if weight is not None:
            changed[name], thresholds[name] = fade_projection(weight, sizes, sparsities)
    return replace(weights, **changed), thresholds
