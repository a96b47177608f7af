"""Classes whose layers may be mixtures of experts, in models where none is: they are dense."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UnsupportedModelError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.spec import ConversionSpec
from tests.families import COMMON, D_FF, LAYERS, VOCABULARY

EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 12}
LATENT = EXPERTS | {
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": LAYERS, "num_experts_per_tok": 2, "head_dim": 4,
}  # fmt: skip
ATTENTION = {"layer_types": ["full_attention"] * LAYERS}
MEMBERS = {
    "qwen3_moe": {"mlp_only_layers": [*range(LAYERS)]},
    "qwen3_next": ATTENTION | {"mlp_only_layers": [*range(LAYERS)]},
    "deepseek_v2": LATENT | {"q_lora_rank": None},
    "deepseek_v3": LATENT | {"q_lora_rank": 8, "n_group": 1, "topk_group": 1},
    "glm4_moe": EXPERTS | {"first_k_dense_replace": LAYERS},
    "dots1": EXPERTS | {"first_k_dense_replace": LAYERS},
    "ernie4_5_moe": {"moe_layer_start_index": LAYERS, "moe_layer_end_index": LAYERS},
    "lfm2_moe": ATTENTION | {"num_dense_layers": LAYERS},
    "afmoe": ATTENTION | {"num_dense_layers": LAYERS},
    "jamba": {
        "num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0,
        "expert_layer_period": LAYERS + 1, "expert_layer_offset": LAYERS,
    },
}  # fmt: skip


def build(model_type, **fields):
    config = AutoConfig.for_model(model_type, **COMMON | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", MEMBERS)
@torch.no_grad()
def test_they_are_read(model_type):
    model = build(model_type, **MEMBERS[model_type])
    assert [mlp.weights.d_ff for mlp in read_mlps(model)] == [D_FF] * LAYERS
    ids = torch.arange(1, 40)[None] % VOCABULARY
    expected = model(ids).logits
    made = convert(model, ConversionSpec(branches=4))(ids).logits
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    less = convert(model, ConversionSpec(branches=4, keep=2))(ids).logits
    assert (less - expected).abs().max() > 1e-4 * expected.abs().max()


def test_one_layer_that_is_a_mixture_is_named():
    model = build("glm4_moe", **MEMBERS["glm4_moe"] | {"first_k_dense_replace": 1})
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.mlp\.experts .*already"):
        read_mlps(model)
