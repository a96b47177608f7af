"""Parameter counts, recounted tensor by tensor."""

from math import prod

import pytest
import torch

from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.parameters import parameter_report
from tests.families import build
from tests.tiny import D_FF, D_MODEL, LAYERS, VOCABULARY, tiny_model


def recount(model, part=""):
    """(all, not zero) of the tensors in the state dict whose name holds `part`; each memory
    once."""
    tensors = {
        (tensor.data_ptr(), tensor.shape): tensor
        for name, tensor in model.state_dict().items()
        if part in name
    }
    return (
        sum(prod(tensor.shape) for tensor in tensors.values()),
        sum(int((tensor != 0).sum()) for tensor in tensors.values()),
    )


def assert_counts(model, mlp=".mlp."):
    report = parameter_report(model)
    assert (report.total, report.nonzero) == recount(model)
    assert (report.mlp_total, report.mlp_nonzero) == recount(model, mlp)
    assert report.active_per_token == report.total
    return report


SPECS = [
    ConversionSpec(branches=1),
    ConversionSpec(branches=16),
    ConversionSpec(branches=5, keep=3),
    ConversionSpec(branches=5, fade=0.9),
    ConversionSpec(branches=7, fade=2.0, keep=4),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_flags)
def test_counts_equal_a_recount(spec, tied):
    dense = tiny_model(tie_word_embeddings=tied)
    assert_counts(dense)
    assert_counts(convert(dense, spec))


@pytest.mark.parametrize("family", ["gpt2", "llama-bias", "phi3", "falcon", "bloom"])
def test_counts_of_other_layouts(family):
    dense = build(family)
    assert_counts(dense)
    assert_counts(convert(dense, ConversionSpec(branches=5, fade=0.5, keep=3)))


def test_tied_embeddings_count_once():
    tied, untied = (
        parameter_report(tiny_model(tie_word_embeddings=tied)) for tied in (True, False)
    )
    assert untied.total - tied.total == VOCABULARY * D_MODEL
    assert untied.macs_per_token == tied.macs_per_token  # the head runs in both


def test_alphas_are_all_that_a_split_adds():
    dense = parameter_report(tiny_model())
    for branches in (1, 7, 16):
        split = parameter_report(convert(tiny_model(), ConversionSpec(branches=branches)))
        assert split.total - dense.total == LAYERS * branches
        assert split.nonzero - dense.nonzero == LAYERS * branches
        assert split.mlp_total - dense.mlp_total == LAYERS * branches
        assert split.macs_per_token == dense.macs_per_token


def test_kept_branches_only():
    report = parameter_report(convert(tiny_model(), ConversionSpec(branches=5, keep=3)))
    neurons = 10 + 10 + 10  # 48 neurons in 5 branches: 10, 10, 10, 9, 9
    assert report.mlp_total == LAYERS * (3 * D_MODEL * neurons + 3)
    assert report.mlp_macs_per_token == LAYERS * 3 * D_MODEL * neurons


def test_faded_weights_are_zeros_that_still_run():
    model, spec = tiny_model(), ConversionSpec(branches=4, fade=0.9)
    dense, faded = parameter_report(model), parameter_report(convert(model, spec))
    gone = 0
    for layer in model.model.layers:
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            for i, piece in enumerate(weight.detach().abs().tensor_split(4)):
                gone += int((piece <= piece.quantile(0.9 * i / 4)).sum()) if i else 0
    assert gone > 0
    assert faded.mlp_nonzero == dense.mlp_nonzero + LAYERS * 4 - gone
    assert faded.nonzero == dense.nonzero + LAYERS * 4 - gone
    assert faded.mlp_total == dense.mlp_total + LAYERS * 4
    assert faded.macs_per_token == dense.macs_per_token


def test_multiply_adds_of_a_llama():
    report = parameter_report(tiny_model())
    attention = 2 * D_MODEL * D_MODEL + 2 * D_MODEL * D_MODEL // 2  # q, o; k, v of half the heads
    mlp = 3 * D_MODEL * D_FF
    assert report.mlp_macs_per_token == LAYERS * mlp
    assert report.macs_per_token == LAYERS * (attention + mlp) + VOCABULARY * D_MODEL


def test_multiply_adds_of_gpt2_whose_weights_are_transposed():
    model = build("gpt2")
    config = model.config
    d_model, d_ff = config.n_embd, config.n_inner
    report = parameter_report(model)
    assert report.mlp_macs_per_token == config.n_layer * 2 * d_model * d_ff
    layer = 4 * d_model * d_model + 2 * d_model * d_ff
    assert report.macs_per_token == config.n_layer * layer + config.vocab_size * d_model
    converted = parameter_report(convert(model, ConversionSpec(branches=4)))
    assert converted.macs_per_token == report.macs_per_token


def test_a_caller_may_bring_its_own_counts():
    model = tiny_model()
    seen = []
    parameter_report(model, lambda tensor: seen.append(tensor.numel()) or 0)
    assert sum(seen) == sum(parameter.numel() for parameter in model.parameters())


def test_counting_changes_nothing():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameter_report(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
