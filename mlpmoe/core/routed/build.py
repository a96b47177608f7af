"""One MLP, its experts and its router put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..static.compensation import Moments, mean_bias, refit
from ..static.order import permute
from ..stopping import may_stop
from .choosing import choose
from .method import Request, RoutedMethod
from .partition import expert_count, split_counts
from .routed_mlp import NeuronRows, RoutedMLP
from .routers import ROUTERS

SCORED_TOGETHER = 2048  # tokens that a router sees at a time: the oracle runs the whole MLP


def build_routed(
    weights: MLPWeights, spec, method: RoutedMethod, layer: LayerActivations | None
) -> nn.Module:
    """The routed module for one MLP: profile, share, cluster, route.

    layer: what the MLP does on the calibration text, where the spec needs to know.
    """
    if method.build is not None:
        built = method.build(weights, spec, layer)
    else:
        built = _with_experts(weights, spec, method, layer)
    if spec.compensation == "refit" and isinstance(built, NeuronRows) and built.idle_parameters:
        _refit(built, layer)
    return built


def _with_experts(
    weights: MLPWeights, spec, method: RoutedMethod, layer: LayerActivations | None
) -> RoutedMLP:
    experts = expert_count(weights.d_ff, spec.experts)
    generator = torch.Generator().manual_seed(spec.seed)
    partition = method.partition(Request(weights, spec, experts, layer, generator))
    running, _ = split_counts(experts, spec.active, 0)
    shared = len(partition.shared)
    routed = len(partition.experts)
    active: float = running - (experts - routed)
    ordered = permute(weights, partition.neurons)
    router = ROUTERS[spec.router].make(weights, partition, layer)
    threshold = idle_mean = None
    if active < routed and (spec.selection == "threshold" or spec.compensation != "none"):
        scores = _scores(router, layer)
        may_stop()
        if spec.selection == "threshold":
            threshold, active = _threshold(scores, int(active))
        if spec.compensation != "none":
            idle = ~choose(scores, int(active), threshold)
            idle_mean = torch.cat(
                [
                    torch.zeros(shared),
                    layer.mean_where(idle, partition.experts).flatten(),
                ]
            )
    built = RoutedMLP(ordered, shared, routed, router, active, threshold, idle_mean)
    built.partition = partition
    return built


def _refit(built: nn.Module, layer: LayerActivations) -> None:
    """Fit down and its bias again: to the wanted output, of what runs for each token."""
    moments = Moments(*layer.regression(built.d_ff, lambda x: built.summed(x).float()))
    down = refit(built.down.T, moments)
    built.down = nn.Parameter(down.T.contiguous())
    built.down_bias = nn.Parameter(mean_bias(down, moments))


def _scores(router: nn.Module, layer: LayerActivations) -> Tensor:
    """(tokens, experts): what the router says of the calibration text."""
    found = []
    for x in layer.x.flatten(0, 1).split(SCORED_TOGETHER):
        may_stop()
        found.append(router(x))
    return torch.cat(found)


def _threshold(scores: Tensor, active: int) -> tuple[float, float]:
    """The score above which `active` experts per token lie on average, and that average: the
    1 - active/experts quantile of the scores of all tokens and experts, pooled."""
    idle = len(scores) * (scores.shape[1] - active)
    value = float(scores.flatten().kthvalue(max(1, idle)).values)
    return value, float((scores > value).sum() / len(scores))
