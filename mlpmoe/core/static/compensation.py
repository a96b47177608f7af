"""Compensation: how what stays makes up for what is dropped or zeroed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from math import sqrt

import torch
from torch import Tensor

from ..activations import LayerActivations, hidden
from ..mlps import MLPWeights
from ..registry import Choice
from ..stopping import may_stop
from .removal import damped


@dataclass(frozen=True)
class Compensation(Choice):
    """A way to compensate."""

    _: KW_ONLY
    alpha: Callable[[int, int], float] = lambda branches, keep: 1.0  # α of every kept branch


COMPENSATIONS: dict[str, Compensation] = {
    # MLPMoE, section 3.3: preserves the variance of the sum of branches if their outputs are
    # uncorrelated with zero mean
    "sqrt": Compensation(
        "× √(B/K) (MLPMoE)", "scales what stays by √(B/K)", short="× √(B/K)",
        alpha=lambda branches, keep: sqrt(branches / keep),
    ),
    # right if all branches said the same
    "ratio": Compensation(
        "× B/K", "scales what stays by B/K", alpha=lambda branches, keep: branches / keep
    ),
    "none": Compensation("none", "leaves what stays as it is", short="not compensated"),
    "alpha": Compensation(
        "a fitted α per branch", "fits a factor for every branch", short="fitted α",
        calibrated=True,
    ),
    "mean": Compensation(
        "mean as a bias (FLAP)", "adds the mean of what is lost as a bias",
        short="mean as a bias", calibrated=True,
    ),
    "refit": Compensation(
        "down refitted, and a bias", "fits down again by least squares",
        short="down refitted", calibrated=True,
    ),
}  # fmt: skip
FILLS = {  # what stands in for the experts that a router leaves out
    "none": Choice("nothing", "lets nothing stand in for experts that do not run"),
    "mean": Choice(
        "their mean output", "lets the mean output of experts that do not run stand in for them",
        short="mean output of the others", calibrated=True,
    ),
    "refit": Choice(
        "their mean, and down refitted",
        "lets the mean output of experts that do not run stand in for them, and fits down again "
        "by least squares",
        short="down refitted", calibrated=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """What least squares needs to know of the neurons that stay and of the output they should
    give: means and covariances over the calibration tokens, float64."""

    mean: Tensor  # (n,): of h
    covariance: Tensor  # (n, n)
    cross: Tensor  # (n, d_model): of h with the wanted output
    target: Tensor  # (d_model,): mean of the wanted output

    @property
    def second(self) -> Tensor:
        """(n, n): mean of h hᵀ."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @classmethod
    def of(cls, kept: MLPWeights, neurons: Tensor | None, layer: LayerActivations) -> Moments:
        """kept: the MLP that stays. neurons: which of the dense MLP's these are, if they say the
        same as there; None if their weights were changed. layer: of the dense MLP."""
        if neurons is None:
            return cls(*layer.regression(kept.d_ff, lambda x: hidden(kept, x)[1]))
        if layer.target is not None:
            mean, covariance, cross, target = layer.own_regression
        else:
            down, bias = layer.weights.down.detach().cpu().double(), layer.weights.down_bias
            mean, covariance = layer.moments
            cross, target = covariance @ down.T, down @ mean
            target = target if bias is None else target + bias.detach().cpu().double()
        return cls(mean[neurons], covariance[neurons][:, neurons], cross[neurons], target)


def refit(down: Tensor, moments: Moments) -> Tensor:
    """down (d_model, n), fitted so that the neurons predict the wanted output best in the
    least-squares sense beside a bias; ridge towards the down there is. Dtype as given."""
    before = down.detach().cpu().double()
    missing = moments.cross - moments.covariance @ before.T  # (n, d_model)
    may_stop()
    return (before + torch.linalg.solve(damped(moments.covariance), missing).T).to(down)


def mean_bias(down: Tensor, moments: Moments) -> Tensor:
    """(d_model,): the bias with which the mean output is the wanted one (FLAP's, for any loss)."""
    said = down.detach().cpu().double() @ moments.mean
    return (moments.target - said).to(down)


def fitted_alphas(weights: MLPWeights, sizes: Sequence[int], moments: Moments) -> Tensor:
    """(K,): the factors on the branches that bring their sum nearest to the wanted output, in the
    least-squares sense and without a bias, so that any architecture can hold the result."""
    down = weights.down.detach().cpu().double()
    bias = 0.0 if weights.down_bias is None else weights.down_bias.detach().cpu().double()
    wanted = moments.cross + torch.outer(moments.mean, moments.target - bias)  # (n, d_model)
    branch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def by_branch(matrix: Tensor) -> Tensor:
        total = matrix.new_zeros(len(sizes), *matrix.shape[1:])
        return total.index_add_(0, branch, matrix)

    # (K, K): mean products of the branches' outputs
    products = by_branch(by_branch((down.T @ down) * moments.second).T)
    towards = by_branch((down.T * wanted).sum(1))
    return torch.linalg.solve(damped(products, 1e-9), towards).to(weights.down)
