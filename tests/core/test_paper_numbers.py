"""The paper's parameter table, on random weights of Qwen2.5-0.5B's shape (MLPMoE, table 1).

Only gate and up need random numbers: nothing else is faded, and a constant is as non-zero as a
trained weight.
"""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.spec import ConversionSpec

LAYERS, D_MODEL, D_FF = 24, 896, 4864
DENSE_PARAMETERS = 494_032_768
CONVERTED_PARAMETERS = 494_033_152  # one alpha per branch and layer: 24·16 more
PAPER_NONZERO = 405_604_020  # at strength 0.9, from the trained weights
# 27/64 of gate and up; the strict `>` adds the weights that equal a threshold.
ZEROS_ASKED_FOR = LAYERS * 2 * D_MODEL * D_FF * 27 // 64
PAPER_TIES = 176_716


@pytest.fixture(scope="module")
def qwen():
    config = Qwen2Config(
        num_hidden_layers=LAYERS,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        vocab_size=151_936,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            parameter.normal_(0, 0.02, generator=generator)
            parameter.masked_fill_(parameter == 0, 0.02)  # bfloat16 draws a few exact zeros
        else:
            parameter.fill_(0.01)
    return model.eval()


def count(model: nn.Module) -> tuple[int, int]:
    """All parameters and the non-zero ones, each tensor once."""
    parameters = list({id(p): p for p in model.parameters()}.values())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)


def test_dense_total_is_the_published_one(qwen):
    assert count(qwen) == (DENSE_PARAMETERS, DENSE_PARAMETERS)


def test_sixteen_branches_add_one_alpha_each(qwen):
    converted = convert(qwen, ConversionSpec(branches=16))
    assert count(converted) == (CONVERTED_PARAMETERS, CONVERTED_PARAMETERS)


def test_fractal_fade_leaves_the_published_number_of_nonzero_parameters(qwen):
    converted = convert(qwen, ConversionSpec(branches=16, fade=0.9))
    total, nonzero = count(converted)
    assert total == CONVERTED_PARAMETERS
    assert nonzero == pytest.approx(PAPER_NONZERO, rel=5e-4)
    zeros = total - nonzero
    assert PAPER_TIES * 0.95 < zeros - ZEROS_ASKED_FOR < PAPER_TIES * 1.05
    for module in mlp_modules(converted):
        assert module.down_proj.weight.count_nonzero() == D_MODEL * D_FF
        for linear in (module.gate_proj, module.up_proj):
            for b, part in enumerate(linear.weight.split(module.sizes)):
                share = 1 - part.count_nonzero().item() / part.numel()
                assert share == pytest.approx(0.9 * b / 16, abs=0.005)
                assert b or share == 0
