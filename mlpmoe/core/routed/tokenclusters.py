"""Token clusters: for each kind of token, the neurons that matter most to it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..static.branched import BranchedMLP
from ..static.order import permute
from .cluster_mlp import ClusterMLP
from .clustering import kmeans, nearest
from .method import RoutedMethod
from .partition import Partition
from .routers import ROUTERS

TOKENS = 8192  # of the calibration text, that are clustered; all of them weigh the neurons


def build(weights: MLPWeights, spec, layer: LayerActivations) -> nn.Module:
    """The module for one MLP; the dense MLP where an expert has all neurons.

    What ToMoE (arXiv 2501.15316) has: overlapping experts of equal size, 8 of them, of which a
    linear router picks one for each token, with weight 1, and the model's own weights. What it
    trains for that (masks from a generator, the router, losses for budget and balance) is computed
    here: k-means of the calibration tokens by their MLP input at length 1, and in each cluster the
    neurons of largest mean h_j² · ‖down_j‖² over its tokens. Attention is left alone. Where masks
    are to be trained afterwards, this is a draft that still has all neurons.
    """
    size = max(1, round(spec.active * weights.d_ff))
    if size == weights.d_ff:
        return BranchedMLP(weights, (size,))
    key = "token clusters", spec.experts, spec.seed
    centres, score = layer.remembered(key, lambda: _clusters(layer, spec.experts, spec.seed))
    members = score.argsort(dim=1, descending=True, stable=True)[:, :size].sort(dim=1).values
    nobody = torch.empty(0, dtype=torch.long)
    partition = Partition(nobody, members.to(weights.up.device), centres=centres)
    router = ROUTERS[spec.router].make(weights, partition, layer)
    draft = score if spec.recover == "masks" else None
    return _of_experts(weights, members, router, spec, layer, draft)


def _clusters(layer: LayerActivations, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """(experts, d_model): the centres; (experts, d_ff): how much each neuron matters to each."""
    generator = torch.Generator().manual_seed(seed)
    _, centres = kmeans(F.normalize(layer.spread(TOKENS).float(), dim=-1), experts, generator)
    cluster = nearest(F.normalize(layer.inputs(), dim=-1), centres)
    mask = F.one_hot(cluster, len(centres)).bool()
    return centres, layer.mean_squares(mask) * layer.down_norms.square()


def _of_experts(
    weights: MLPWeights,
    members: Tensor,
    router: nn.Module,
    spec,
    layer: LayerActivations,
    importance: Tensor | None,
) -> ClusterMLP:
    """Without the neurons that no expert has; of these only the mean stays, as a bias.

    members: (experts, size) int64, neurons of each expert, ascending. importance: (experts, d_ff),
    of a draft, which has all neurons; or if down is fitted again, those that it is fitted for."""
    device = weights.up.device
    used, rows = members.unique(return_inverse=True)  # ascending
    if importance is not None:
        if spec.compensation != "refit":
            used, rows = torch.arange(weights.d_ff), members
        importance = importance[:, used].to(device)
    kept = permute(weights, used.to(device))
    built = ClusterMLP(kept, rows.to(device), router, weights.d_ff, importance=importance)
    if spec.compensation == "none":
        return built
    runs = torch.zeros(len(members), weights.d_ff, dtype=torch.bool).scatter_(1, members, True)
    runs = runs.to(device)
    mean = layer.idle_mean(lambda x, gated: runs[built.expert_of(x)])
    gone = mean.clone()
    gone[used] = 0
    down = weights.down.detach()
    bias = (down.float() @ gone.to(down.device)).to(down.dtype)
    if kept.down_bias is not None:
        bias = bias + kept.down_bias.detach()
    kept = replace(kept, down_bias=bias)
    return ClusterMLP(kept, built.members, router, weights.d_ff, mean[used], importance)


METHOD = RoutedMethod(
    label="Token clusters",
    about="Sorts the tokens of the calibration text by their input and gives each kind the neurons "
    "that matter most to it: overlapping experts, of which each token runs one.",
    source="this project, after ToMoE (arXiv 2501.15316), which trains",
    partition=None,
    defaults={"experts": 8, "router": "clusters"},
    routers=("clusters", "regression", "oracle"),
    fields=("experts", "active", "router", "progressive", "seed"),
    build=build,
)
