"""Tiny random models of every family the tests know, and where each keeps its MLPs.

The table is written by hand from the sources of transformers, not from `mlpmoe.core.mlps`, so
that the tests can compare the two. Sizes are awkward on purpose: neither 5 nor 16 divides d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

D_FF = 44
LAYERS = 2
VOCABULARY = 64
INIT_STD = 0.2  # large enough that the MLPs matter for the logits

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # The defaults lie outside the tiny vocabulary. No end token: generations have a fixed length.
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """One architecture: what makes it tiny, and the names of its MLPs' parts."""

    model_type: str
    mlp: str = "model.layers.{}.mlp"  # path of layer N's MLP
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str | None = "act_fn"  # None: SiLU, called as a function
    fused: bool = False  # `up` holds gate rows first, then up
    adds_residual: bool = False  # called as mlp(x, residual)
    biases: bool = False  # whether the MLP has any
    d_ff: int = D_FF
    config: dict[str, Any] = field(default_factory=dict)  # what differs from COMMON
    without: tuple[str, ...] = ()  # what of COMMON the config class does not take


def gated(model_type: str, biases: bool = False, **config: Any) -> Family:
    return Family(model_type, biases=biases, config=config)


def fused(model_type: str) -> Family:
    return Family(model_type, gate=None, up="gate_up_proj", activation="activation_fn", fused=True)


def plain(model_type: str, mlp: str, up: str, down: str, act: str = "act", **more: Any) -> Family:
    return Family(model_type, mlp, None, up, down, act, **more)


LAYER, BLOCK = "model.layers.{}.mlp", "transformer.h.{}.mlp"
IN_4H = ("dense_h_to_4h", "dense_4h_to_h")
INNER = {"n_inner": D_FF}
FALCON = {"ffn_hidden_size": D_FF, "num_kv_heads": 2}
NO_HEAD_DIM = ("head_dim",)
# BLOOM and MPT have no d_ff of their own, it is 4·d_model: 132.
THREE_HEADS = {"hidden_size": 33, "num_attention_heads": 3}
LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 4}

FAMILIES: dict[str, Family] = {
    "llama": gated("llama"),
    "llama-bias": gated("llama", biases=True, mlp_bias=True, attention_bias=True),
    "qwen2": gated("qwen2", tie_word_embeddings=True),
    "qwen3": gated("qwen3"),
    "mistral": gated("mistral"),
    "gemma": gated("gemma"),
    "gemma2": gated("gemma2", query_pre_attn_scalar=8),
    "gemma3_text": gated("gemma3_text", query_pre_attn_scalar=8),
    "olmo": gated("olmo"),
    "olmo2": gated("olmo2"),
    "smollm3": gated("smollm3", no_rope_layer_interval=2),
    "granite": gated("granite", residual_multiplier=0.5),
    "granite-bias": gated("granite", biases=True, mlp_bias=True),
    "stablelm": gated("stablelm"),
    "cohere": gated("cohere"),
    "lfm2": Family(
        "lfm2",
        mlp="model.layers.{}.feed_forward",
        gate="w1",
        up="w3",
        down="w2",
        activation=None,
        config={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "ernie4_5": gated("ernie4_5"),
    "ernie4_5-bias": gated("ernie4_5", biases=True, use_bias=True),
    "helium": gated("helium"),
    "seed_oss": gated("seed_oss"),
    "phi3": fused("phi3"),
    "glm": fused("glm"),
    "glm4": fused("glm4"),
    "qwen2_moe-dense": gated("qwen2_moe", mlp_only_layers=[*range(LAYERS)]),
    "granitemoehybrid-dense": Family(
        "granitemoehybrid",
        mlp="model.layers.{}.shared_mlp",
        gate=None,
        up="input_linear",
        down="output_linear",
        activation="activation",
        fused=True,
        config={
            "shared_intermediate_size": D_FF,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["attention"] * LAYERS,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
    ),
    "gpt2": plain("gpt2", BLOCK, "c_fc", "c_proj", biases=True, config=INNER),
    "gpt_neox": plain("gpt_neox", "gpt_neox.layers.{}.mlp", *IN_4H, biases=True),
    "phi": plain("phi", LAYER, "fc1", "fc2", "activation_fn", biases=True),
    "starcoder2": plain("starcoder2", LAYER, "c_fc", "c_proj", biases=True),
    "falcon": plain("falcon", BLOCK, *IN_4H, config=FALCON, without=NO_HEAD_DIM),
    "falcon-bias": plain(
        "falcon", BLOCK, *IN_4H, biases=True, config={**FALCON, "bias": True}, without=NO_HEAD_DIM
    ),
    "bloom": plain(
        "bloom",
        BLOCK,
        *IN_4H,
        "gelu_impl",
        adds_residual=True,
        biases=True,
        d_ff=132,
        config=THREE_HEADS,
    ),
    "mpt": plain(
        "mpt",
        "transformer.blocks.{}.ffn",
        "up_proj",
        "down_proj",
        adds_residual=True,
        d_ff=132,
        config=THREE_HEADS,
    ),
    "gptj": plain("gptj", BLOCK, "fc_in", "fc_out", biases=True, config=INNER | {"rotary_dim": 4}),
    "codegen": plain(
        "codegen", BLOCK, "fc_in", "fc_out", biases=True, config=INNER | {"rotary_dim": 4}
    ),
    "gpt_neo": plain("gpt_neo", BLOCK, "c_fc", "c_proj", biases=True, config=LOCAL),
    "gpt_bigcode": plain("gpt_bigcode", BLOCK, "c_fc", "c_proj", biases=True, config=INNER),
    "arcee": plain("arcee", LAYER, "up_proj", "down_proj", "act_fn"),
    "arcee-bias": plain(
        "arcee", LAYER, "up_proj", "down_proj", "act_fn", biases=True, config={"mlp_bias": True}
    ),
    "apertus": plain(
        "apertus",
        LAYER,
        "up_proj",
        "down_proj",
        "act_fn",
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "nanochat": plain("nanochat", LAYER, "fc1", "fc2", "activation_fn"),
    "persimmon": plain("persimmon", LAYER, *IN_4H, biases=True),
}


@dataclass(frozen=True)
class RefusedFamily:
    """An architecture whose MLPs do not split, and what the refusal has to say."""

    family: Family
    module: str  # the module that the message names
    reason: str  # words of the message


ALREADY_MIXED = "mixture of experts already"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

REFUSED_FAMILIES: dict[str, RefusedFamily] = {
    "bitnet": RefusedFamily(
        Family("bitnet"), "model.layers.0.mlp.ffn_sub_norm", "works across all neurons at once"
    ),
    "gemma3n_text": RefusedFamily(
        Family(
            "gemma3n_text",
            config={
                "layer_types": ["sliding_attention", "full_attention"],
                "activation_sparsity_pattern": [0.0, 0.95],
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 4,
            },
        ),
        "model.layers.1.mlp",
        "only its strongest activations",
    ),
    "opt": RefusedFamily(
        Family("opt", config={"ffn_dim": D_FF, "word_embed_proj_dim": 32}),
        "model.decoder.layers.0",
        "without an MLP module",
    ),
    "mixtral": RefusedFamily(
        Family("mixtral", config=EXPERTS), "model.layers.0.mlp.experts", ALREADY_MIXED
    ),
    "qwen2_moe": RefusedFamily(
        Family(
            "qwen2_moe",
            config={
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 12,
                "shared_expert_intermediate_size": 12,
            },
        ),
        "model.layers.0.mlp.experts",
        ALREADY_MIXED,
    ),
    "granitemoe": RefusedFamily(
        Family("granitemoe", config=EXPERTS),
        "model.layers.0.block_sparse_moe.experts",
        ALREADY_MIXED,
    ),
    "gpt_oss": RefusedFamily(
        Family(
            "gpt_oss",
            config=EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ),
        "model.layers.0.mlp.experts",
        ALREADY_MIXED,
    ),
}


def build(
    family: str | Family, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A random model of `family` in evaluation mode. The same arguments give the same weights."""
    if isinstance(family, str):
        family = FAMILIES[family]
    values = {**COMMON, **family.config, **config}
    for name in family.without:
        del values[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family.model_type, **values), dtype=torch.float32
        )
        _randomise(model)
    return model.to(dtype).eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights that matter, and no vector at its default: biases start as zeros, and a zero that
    is forgotten or counted twice shows nowhere."""
    for parameter in model.parameters():
        noise = INIT_STD * torch.randn(parameter.shape)
        parameter.copy_(parameter + noise if parameter.ndim < 2 else noise)
