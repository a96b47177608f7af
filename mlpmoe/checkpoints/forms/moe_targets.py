"""Stock Mixture-of-Experts architectures, and how a routed model is written in each.

Stock routers weigh the experts that they choose; a converted model counts each of them once. So
router rows are multiplied by a small power of two: the order of the scores stays, and the weights
that sigmoid or softmax make of them become nearly one constant, which a config value or the
experts' down matrices undo. Smaller is flatter, but where experts are chosen by these weights,
scores that differ by less than float32 resolves become ties: each target says how small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Glm4MoeForCausalLM,
    GraniteMoeSharedForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
)

from ...core.routed import RoutedMLP
from ...core.static.branched import BranchedMLP
from .moe_needs import (
    DENSE,
    FIRST_DENSE,
    FLOAT16,
    HEAD_DIM,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    ROUTER_BIAS,
    SHARED,
    SINGLE,
    UNEVEN,
    WINDOW,
    Routing,
    head_dim,
)

ALWAYS_RUNS = 10.0  # added to the score of an expert that has to run; a sigmoid is at most 1
# A sigmoid of this times the input is 1/2. Not 0: silu(g) / g, as a server may write a sigmoid,
# is undefined there.
SHARED_GATE = 2.0**-40


@dataclass(frozen=True)
class Target:
    """A stock architecture, what of `needs_of` it holds, and how a layer is written in it."""

    model_class: type[PreTrainedModel]
    holds: frozenset[str]
    flatness: int  # the largest score becomes 2^-flatness
    exact: bool
    float32: tuple[str, ...]  # as Form has it
    config: Callable[[Routing, Sequence[str], Any], dict[str, Any]]
    layer: Callable[[Routing, RoutedMLP, Tensor, Tensor | None], dict[str, Tensor]]
    note: str
    # the same and what is said of it, where files of 16 bits round more than that changes anyway
    rounded: tuple[int, str] | None = None

    def in_files(self, dtype: torch.dtype) -> tuple[int, str]:
        """Flatness and note for files of this dtype."""
        return self.rounded if self.rounded and dtype.itemsize == 2 else (self.flatness, self.note)

    @property
    def title(self) -> str:
        return self.model_class.__name__.removesuffix("ForCausalLM")


def obstacle(target: Target, needs: Sequence[str]) -> str | None:
    """The sentence that says why a target does not hold a model; None if it does."""
    missing = [need for need in needs if need not in target.holds]
    return f"{target.title} has no place for {missing[0]}." if missing else None


def _experts(
    routing: Routing, mlp: RoutedMLP, first: int, factor: float = 1.0
) -> dict[str, Tensor]:
    """All neurons from `first` on as experts: gate_up_proj (experts, 2 · width, d_model) and
    down_proj (experts, d_model, width), down times `factor`."""
    gate, up, down = (
        _filled(matrix.detach()[first:].unflatten(0, (-1, routing.size)), routing.width)
        for matrix in (mlp.gate, mlp.up, mlp.down)
    )  # (experts, width, d_model)
    return {
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": (down * factor).transpose(1, 2).contiguous(),
    }


def _always(mlp: RoutedMLP, count: int, width: int, factor: float = 1.0) -> dict[str, Tensor]:
    """The first `count` neurons as a dense MLP of `width`, down times `factor`."""
    gate, up, down = (
        _filled(matrix.detach()[:count], width) for matrix in (mlp.gate, mlp.up, mlp.down)
    )
    down = (down * factor).T.contiguous()
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


def _filled(neurons: Tensor, width: int) -> Tensor:
    """(..., n, d_model) -> (..., width, d_model), with zeros."""
    return F.pad(neurons, (0, 0, 0, width - neurons.shape[-2]))


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def dense_layer(mlp: BranchedMLP) -> dict[str, Tensor]:
    """A spared layer, as it is in all architectures that have dense layers."""
    return {f"mlp.{name}_proj.weight": one.weight.detach() for name, one in mlp.projections.items()}


def _granite_config(routing: Routing, needs: Sequence[str], config: Any) -> dict[str, Any]:
    return {
        "intermediate_size": routing.width,
        "shared_intermediate_size": routing.common * routing.size,
        "num_local_experts": routing.total - routing.common,
        "num_experts_per_tok": routing.running - routing.common,
        "attention_bias": QKV_BIAS in needs,
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }


def _granite_layer(
    routing: Routing, mlp: RoutedMLP, rows: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """Softmax over the chosen scores: 1 / active."""
    made = {"router.weight": rows.to(mlp.gate.dtype)}
    made |= _experts(routing, mlp, mlp.shared, float(mlp.active))
    made = _prefixed("block_sparse_moe", made)
    if mlp.shared:
        dense = _always(mlp, mlp.shared, mlp.shared)
        made["shared_mlp.input_linear.weight"] = torch.cat(
            [dense["gate_proj.weight"], dense["up_proj.weight"]]
        )
        made["shared_mlp.output_linear.weight"] = dense["down_proj.weight"]
    return made


def _glm_config(routing: Routing, needs: Sequence[str], config: Any) -> dict[str, Any]:
    return {
        "head_dim": head_dim(config),
        "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "attention_bias": QKV_BIAS in needs,
        "use_qk_norm": QK_NORM in needs,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": routing.width,
        "n_shared_experts": max(1, routing.common),
        "n_routed_experts": routing.total - routing.common,
        "num_experts_per_tok": routing.running - routing.common,
        "routed_scaling_factor": float(routing.running - routing.common),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": len(routing.spared),
        "num_nextn_predict_layers": 0,
    }


def _glm_layer(
    routing: Routing, mlp: RoutedMLP, rows: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """Sigmoids of the chosen, made to sum to their number: about 1. What the layer shares beyond
    the common experts is routed: a row of zeros gives it the middle of all sigmoids, and the
    correction bias lets it always run.

    That bias is added to the sigmoids before experts are chosen. Around 0 these are
    1/2 + score / 4, so a quarter of a router's own bias does there what it did to the scores.
    """
    first = routing.common * routing.size
    fixed = rows.new_zeros(mlp.shared // routing.size - routing.common, rows.shape[1])
    own = rows.new_zeros(len(rows)) if bias is None else bias / 4
    made = {
        "gate.weight": torch.cat([fixed, rows]),
        "gate.e_score_correction_bias": torch.cat(
            [fixed.new_full((len(fixed),), ALWAYS_RUNS), own]
        ),
        **_experts(routing, mlp, first),
        **_prefixed("shared_experts", _always(mlp, first, max(1, routing.common) * routing.width)),
    }
    return _prefixed("mlp", made)


def _mixtral_config(routing: Routing, needs: Sequence[str], config: Any) -> dict[str, Any]:
    return {
        "head_dim": head_dim(config),
        "sliding_window": config.sliding_window if WINDOW in needs else None,
        "intermediate_size": routing.width,
        "num_local_experts": routing.total,
        "num_experts_per_tok": routing.running,
    }


def _mixtral_layer(
    routing: Routing, mlp: RoutedMLP, rows: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """Softmax over all scores, those of the chosen made to sum to 1: about 1 / active."""
    made = {"gate.weight": rows.to(mlp.gate.dtype)}
    made |= _experts(routing, mlp, 0, float(mlp.active))
    return _prefixed("mlp", made)


def _qwen_config(routing: Routing, needs: Sequence[str], config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": QKV_BIAS in needs,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": routing.width,
        "shared_expert_intermediate_size": routing.common * routing.size or routing.width,
        "num_experts": routing.total - routing.common,
        "num_experts_per_tok": routing.running - routing.common,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(routing.spared),
        "use_sliding_window": False,
    }


def _qwen_layer(
    routing: Routing, mlp: RoutedMLP, rows: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """Softmax over all scores: about 1 / experts. The shared expert counts half."""
    made = {
        "gate.weight": rows.to(mlp.gate.dtype),
        "shared_expert_gate.weight": torch.full_like(mlp.gate[:1], SHARED_GATE),
        **_experts(routing, mlp, mlp.shared, float(mlp.experts)),
        **_prefixed("shared_expert", _always(mlp, mlp.shared, mlp.shared or routing.width, 2.0)),
    }
    return _prefixed("mlp", made)


NEARLY = (
    "a chosen expert counts nearly 1, and where scores are almost equal another one can be chosen; "
    "that changes less than rounding the model to bfloat16 does."
)
TARGETS = {
    "granite-moe": Target(
        GraniteMoeSharedForCausalLM,
        frozenset({QKV_BIAS, O_BIAS, SHARED, SINGLE}),
        24,
        True,
        (),
        _granite_config,
        _granite_layer,
        "computes the same as the converted model in transformers; software that takes the "
        "softmax over all experts before it chooses, as llama.cpp does, would confuse them: for "
        "that, save it in 16 bits.",
        (10, "computes the same as the converted model, but for rounding."),
    ),
    "glm4-moe": Target(
        Glm4MoeForCausalLM,
        frozenset({QKV_BIAS, QK_NORM, HEAD_DIM, SHARED, UNEVEN, ROUTER_BIAS, FLOAT16, FIRST_DENSE}),
        8,
        False,
        ("mlp.gate.",),
        _glm_config,
        _glm_layer,
        NEARLY,
    ),
    "mixtral": Target(
        MixtralForCausalLM,
        frozenset({WINDOW, HEAD_DIM}),
        9,
        False,
        (),
        _mixtral_config,
        _mixtral_layer,
        NEARLY,
    ),
    "qwen2-moe": Target(
        Qwen2MoeForCausalLM,
        frozenset({QKV_BIAS, SHARED, SINGLE, FIRST_DENSE, DENSE}),
        10,
        False,
        (),
        _qwen_config,
        _qwen_layer,
        NEARLY,
    ),
}
MOE_FORMS = tuple(TARGETS)
