"""Compensation: how the kept branches make up for the dropped ones."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from .calibration import LayerActivations
from .mlps import MLPWeights
from .order import damped

# name -> α of every kept branch, from B (branches) and K (kept)
COMPENSATIONS = {
    # MLPMoE, section 3.3: preserves the variance of the sum of branches if their outputs are
    # uncorrelated with zero mean
    "sqrt": lambda branches, keep: sqrt(branches / keep),
    "none": lambda branches, keep: 1.0,
    "mean": lambda branches, keep: 1.0,  # the mean output of what is dropped becomes a bias
    "refit": lambda branches, keep: 1.0,  # and down is fitted again by least squares
}
CALIBRATED = ("mean", "refit")  # compensations that look at activations
# what stands in for the experts that a router leaves out: nothing, or the mean of their output
FILLS = ("none", "mean")


def refit(
    weights: MLPWeights, kept: Tensor, dropped: Tensor, layer: LayerActivations, name: str
) -> tuple[Tensor, Tensor]:
    """down (d_model, kept) and its bias (d_model,) for the kept neurons, in the dtype of the
    weights.

    "mean" adds the mean output of the dropped neurons to the bias (FLAP). "refit" also fits
    down so that the kept neurons predict the whole output best in the least-squares sense.
    """
    down = weights.down.detach().cpu().double()
    mean = layer.mean.double()
    bias = down[:, dropped] @ mean[dropped]
    stays = down[:, kept]
    if name == "refit" and len(dropped):
        covariance = layer.covariance.double()
        among = damped(covariance[kept][:, kept])
        across = covariance[kept][:, dropped] @ down[:, dropped].T  # (kept, d_model)
        change = torch.linalg.solve(among, across).T
        stays = stays + change
        bias = bias - change @ mean[kept]
    if weights.down_bias is not None:
        bias = bias + weights.down_bias.detach().cpu().double()
    return stays.to(weights.down), bias.to(weights.down)
