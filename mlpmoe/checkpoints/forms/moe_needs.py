"""What a routed model needs of a stock Mixture-of-Experts architecture, and how it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.routed import ClusterMLP, InputMLP, LowRankMLP, RoutedMLP
from ...core.routed.routers import LinearRouter
from ...core.static.branched import BranchedMLP
from .form import FormError, converted_mlps, quantisable

# What some models need and some targets hold, as a refusal says it
QKV_BIAS = "q, k and v biases"
O_BIAS = "a bias after attention"
QK_NORM = "norms of queries and keys"
WINDOW = "attention within a sliding window"
HEAD_DIM = "heads of another size than hidden_size / heads"
ROUTER_BIAS = "a router with a bias"
SHARED = "shared experts"
UNEVEN = "shared experts that differ in number from layer to layer"
SINGLE = "a single routed expert"
FLOAT16 = "router rows so small that float16 rounds them to zero"
FIRST_DENSE = "first layers that are dense"
DENSE = "dense layers behind routed ones"

SOURCES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Neurons of an expert come in multiples of this, filled up with zeros: kernels for grouped
# products want rows of 16 bytes, which are 8 numbers of 16 bits. See also `quantisable`.
MULTIPLE = 8


@dataclass(frozen=True)
class Routing:
    """What the routed layers of a model have in common: all are cut into equal experts."""

    mlps: Mapping[str, RoutedMLP]
    dense: Mapping[str, BranchedMLP]  # of the spared layers
    spared: tuple[int, ...]  # their numbers
    size: int  # neurons per expert
    running: int  # experts that run for a token, shared ones included
    total: int
    shared: tuple[int, ...]  # of each layer, in experts

    @property
    def width(self) -> int:
        """Neurons per expert, those of zeros included."""
        return quantisable(-(-self.size // MULTIPLE) * MULTIPLE)

    @property
    def first_dense(self) -> bool:
        """Whether the spared layers are the first ones."""
        return self.spared == tuple(range(len(self.spared)))

    @property
    def common(self) -> int:
        """Experts that are shared in every layer."""
        return min(self.shared)


def routing_of(model: PreTrainedModel) -> Routing:
    """FormError for models that no stock architecture holds."""
    found = converted_mlps(model)
    dense = {path: mlp for path, mlp in found.items() if isinstance(mlp, BranchedMLP)}
    if len(dense) == len(found):
        raise FormError(
            "this conversion is static: nothing is routed, and a dense checkpoint holds it."
        )
    spared = tuple(layer for layer, path in enumerate(found) if path in dense)
    mlps = {path: mlp for path, mlp in found.items() if path not in dense}
    for mlp in mlps.values():
        if reason := _unroutable(mlp):
            raise FormError(reason)
    if type(model).__name__ not in SOURCES:
        raise FormError(
            f"no stock mixture of experts computes what {type(model).__name__} does beside its "
            f"MLPs; there are some for {', '.join(SOURCES)}."
        )
    cuts = {(m.size, m.shared // m.size + m.experts) for m in mlps.values()}
    running = {m.shared // m.size + int(m.active) for m in mlps.values()}
    if len(cuts) > 1 or len(running) > 1:
        raise FormError(
            "layers differ in the size, number or active number of their experts; a stock "
            "architecture has one of each for all layers."
        )
    size, total = cuts.pop()
    shared = tuple(m.shared // size for m in mlps.values())
    return Routing(mlps, dense, spared, size, running.pop(), total, shared)


def _unroutable(mlp: nn.Module) -> str | None:
    if isinstance(mlp, InputMLP):
        return (
            "this conversion chooses the inputs that each matrix reads; stock architectures choose "
            "experts."
        )
    if isinstance(mlp, LowRankMLP):
        return (
            "this conversion splits each matrix into two factors; stock architectures keep it in "
            "one piece."
        )
    if isinstance(mlp, ClusterMLP):
        return (
            "experts overlap here, and a neuron is stored once; stock architectures would store it "
            "once for each of its experts."
        )
    if not isinstance(mlp, RoutedMLP):
        return "this conversion chooses single neurons; stock architectures choose experts."
    if mlp.experts == 0:
        return "all neurons are shared: nothing is routed, and a dense checkpoint holds it."
    if mlp.threshold is not None:
        return (
            "experts are chosen by a threshold, so their number differs from token to token; "
            "stock architectures choose a fixed number: use the selection topk."
        )
    if mlp.idle_mean is not None:
        return (
            "with the compensation mean or refit, experts that do not run count with their mean "
            "output; in stock architectures they count nothing."
        )
    if mlp.gate is None:
        return "the MLPs have no gate; stock experts have one."
    if not (mlp.gate_bias is None and mlp.up_bias is None and mlp.down_bias is None):
        return "the MLPs have biases; stock experts have none."
    router = mlp.router
    if mlp.active < mlp.experts and (not isinstance(router, LinearRouter) or router.normalise):
        return (
            "the router's scores are not linear in the MLP's input, as those of stock "
            "architectures are: use the router centroid or regression."
        )
    return None


def needs_of(model: PreTrainedModel, routing: Routing) -> list[str]:
    """What this model needs that not every target holds."""
    config, names = model.config, model.state_dict().keys()
    if hasattr(config, "use_sliding_window"):  # Qwen's layers choose for themselves
        slides = "sliding_attention" in config.layer_types
    else:
        slides = getattr(config, "sliding_window", None) is not None
    routers = [m.router for m in routing.mlps.values() if m.active < m.experts]
    found = {
        QKV_BIAS: any(name.endswith("q_proj.bias") for name in names),
        O_BIAS: any(name.endswith("o_proj.bias") for name in names),
        QK_NORM: any(name.endswith("q_norm.weight") for name in names),
        WINDOW: slides,
        HEAD_DIM: head_dim(config) * config.num_attention_heads != config.hidden_size,
        ROUTER_BIAS: any(router.bias is not None for router in routers),
        SHARED: max(routing.shared) > 0,
        UNEVEN: len(set(routing.shared)) > 1,
        SINGLE: routing.total - routing.common == 1,
        FLOAT16: model.dtype == torch.float16,
        FIRST_DENSE: bool(routing.spared) and routing.first_dense,
        DENSE: bool(routing.spared) and not routing.first_dense,
    }
    return [need for need, there in found.items() if there]


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
