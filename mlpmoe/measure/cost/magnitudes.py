"""Weight magnitudes branch by branch: histograms for one projection, sums for all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.conversion import mlp_modules
from ...core.errors import UserError
from ...core.static.branched import BranchedMLP


@dataclass(frozen=True)
class Magnitudes:
    """Histograms of |w| of one projection of one layer, a row per branch."""

    edges: Tensor  # (bins + 1,) float32, from 0 to `upper`
    counts: Tensor  # (branches, bins) int64: weights that are not zero
    zeros: Tensor  # (branches,) int64
    thresholds: tuple[float, ...]  # fade threshold per branch; 0.0: branch not faded


def magnitudes(
    model: PreTrainedModel,
    layer: int,
    projection: str,
    bins: int = 60,
    upper: float | None = None,
) -> Magnitudes:
    """Per-branch histograms of |w| in a converted model.

    layer: 0-based. projection: "gate" (if the MLPs have one), "up" or "down". upper: right edge
    of the last bin, the largest magnitude if None; weights above it are not counted. Raises
    UserError if there is no such layer or projection, or if the model is dense (convert it with
    fade 0 for its plain histograms).
    """
    mlps = branched_mlps(model)
    if not 0 <= layer < len(mlps):
        raise UserError(f"layer must lie between 0 and {len(mlps) - 1}, not {layer}.")
    weights = branch_weights(mlps[layer], projection)
    if upper is None:
        upper = max(float(weight.abs().max()) for weight in weights if weight.numel()) or 1.0
    counts, zeros = np.zeros((len(weights), bins), np.int64), []
    for row, weight in zip(counts, weights, strict=True):
        magnitude = weight.abs().float().cpu().numpy().ravel()
        zeros.append(magnitude.size - np.count_nonzero(magnitude))
        row[:] = np.histogram(magnitude, bins, (0.0, upper))[0]
        row[0] -= zeros[-1]
    return Magnitudes(
        edges=torch.linspace(0, upper, bins + 1, dtype=torch.float32),
        counts=torch.from_numpy(counts),
        zeros=torch.tensor(zeros),
        thresholds=mlps[layer].fade_thresholds.get(projection, (0.0,) * len(weights)),
    )


QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {  # what is summed, weight by weight
    "nonzero": lambda weight: (weight != 0).view(torch.int8),
    "energy": lambda weight: weight.float().square(),
}


def neuron_sums(weight: Tensor, projection: str, quantity: str) -> Tensor:
    """What every neuron of one projection holds; (d_ff,) float64. See `branch_sums`.

    Summed in NumPy, which is several times faster than torch along rows of small numbers."""
    weights = QUANTITIES[quantity](weight.detach()).cpu().numpy()
    exact = np.int32 if weights.dtype == np.int8 else np.float64
    sums = weights.sum(0 if projection == "down" else 1, dtype=exact)
    return torch.from_numpy(sums).double()


def branch_sums(
    model: PreTrainedModel,
    quantity: str,
    sums_of: Callable[[Tensor, str, str], Tensor] = neuron_sums,
) -> dict[str, Tensor]:
    """What every branch of a converted model holds, projection by projection.

    quantity: "nonzero" (weights that are not zero) or "energy" (sum of squared weights).
    sums_of: `neuron_sums`, or one that remembers what it has counted. Returns (layers, B) float64
    for each projection; branches that were dropped hold 0.
    """
    mlps = branched_mlps(model)
    shape = len(mlps), mlps[0].branches
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in mlps[0].projections}
    for layer, mlp in enumerate(mlps):
        for projection, total in sums.items():
            neurons = sums_of(mlp.projections[projection].weight, projection, quantity)
            for branch, some in enumerate(neurons.split(mlp.sizes)):
                total[layer, branch] = some.sum()
    return sums


def branched_mlps(model: PreTrainedModel) -> list[BranchedMLP]:
    """The converted MLPs of a model, in order of the layers."""
    mlps = mlp_modules(model)
    if not all(isinstance(mlp, BranchedMLP) for mlp in mlps):
        raise UserError("this model is dense, so it has no branches; convert it first.")
    return mlps


def branch_weights(mlp: BranchedMLP, projection: str) -> tuple[Tensor, ...]:
    """One projection of an MLP cut into its branches, as views: gate and up
    (neurons, d_model), down (d_model, neurons)."""
    if projection not in mlp.projections:
        allowed = ", ".join(mlp.projections)
        raise UserError(f"this model's MLPs have no projection {projection!r}; allowed: {allowed}.")
    weight = mlp.projections[projection].weight.detach()
    return weight.split(mlp.sizes, dim=1 if projection == "down" else 0)
