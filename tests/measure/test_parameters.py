"""Parameter counts, recounted tensor by tensor."""

from math import prod

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.parameters import parameter_report
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


# Routed ------------------------------------------------------------------------------------

ROW = D_MODEL  # weights of one neuron in one matrix
ATTENTION = 3 * D_MODEL * D_MODEL  # q, o; k, v of half the heads
HEAD = VOCABULARY * D_MODEL


def calibration():
    """1,024 tokens drawn at random."""
    generator = torch.Generator().manual_seed(1)
    return Calibration(torch.randint(1, VOCABULARY, (8, 128), generator=generator))


# spec -> per layer: weights of the router, biases that are new, neurons that run for a token
EXPERTS = [
    (ConversionSpec(method="contiguous", active=0.5), 16 * D_MODEL, 0, 24),  # 8 of 16 experts
    (ConversionSpec(method="contiguous", experts=64, active=0.25), 48 * D_MODEL, 0, 12),
    # 8 experts of 6 neurons, 2 shared and 2 of 6 routed; gate and up of one neuron for each
    (ConversionSpec(method="cmoe", active=0.5), 2 * 6 * D_MODEL, 0, 24),
    # 6 experts of 8 neurons, 1 shared and 2 of 5 routed; the router has a bias
    (
        ConversionSpec(
            method="moefication", experts=6, active=0.5, shared=0.2, compensation="mean"
        ),
        5 * D_MODEL + 5,
        D_MODEL,
        24,
    ),
]


@pytest.mark.parametrize(
    ("spec", "router", "bias", "running"),
    EXPERTS,
    ids=[spec.to_flags() for spec, *_ in EXPERTS],
)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_of_routed_experts(spec, router, bias, running, tied):
    model = tiny_model(tie_word_embeddings=tied)
    dense = parameter_report(model)
    converted = convert(model, spec, calibration())
    report = parameter_report(converted)
    assert report.total == dense.total + LAYERS * (router + bias)
    assert report.mlp_total == LAYERS * (3 * ROW * D_FF + router + bias)
    tensors = [tensor for mlp in mlp_modules(converted) for tensor in mlp.parameters()]
    assert report.mlp_total == sum(prod(tensor.shape) for tensor in tensors)
    assert report.mlp_nonzero == sum(int((tensor != 0).sum()) for tensor in tensors)
    assert report.nonzero - report.mlp_nonzero == dense.nonzero - dense.mlp_nonzero
    assert report.active_per_token == report.total - LAYERS * (D_FF - running) * 3 * ROW
    products = router // D_MODEL * D_MODEL  # a bias is no multiply-add
    assert report.mlp_macs_per_token == LAYERS * (running * 3 * ROW + products)
    assert report.macs_per_token == report.mlp_macs_per_token + LAYERS * ATTENTION + HEAD


def test_all_experts_need_no_router():
    model = tiny_model()
    report = parameter_report(convert(model, ConversionSpec(method="contiguous", active=1.0)))
    dense = parameter_report(model)
    assert report.active_per_token == report.total == dense.total + LAYERS * 16 * D_MODEL
    assert report.macs_per_token == dense.macs_per_token


@pytest.mark.parametrize("router", ["gate", "gate-norm"])
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_counts_of_chosen_neurons(router, selection):
    """The gate runs in full, up and down for 12 of 48 neurons: a threshold gives that on average,
    on the text it is found on."""
    model = tiny_model()
    dense = parameter_report(model)
    spec = ConversionSpec(method="neurons", active=0.25, router=router, selection=selection)
    report = parameter_report(convert(model, spec, calibration()))
    assert report.total == dense.total
    assert report.mlp_total == dense.mlp_total
    assert (report.nonzero, report.mlp_nonzero) == (dense.nonzero, dense.mlp_nonzero)
    assert report.active_per_token == report.total - LAYERS * 36 * 2 * ROW
    assert report.mlp_macs_per_token == LAYERS * (D_FF + 12 * 2) * ROW
    assert report.macs_per_token == report.mlp_macs_per_token + LAYERS * ATTENTION + HEAD


def test_a_threshold_counts_what_runs_on_average():
    """Experts that run are counted again, token by token, on the calibration text."""
    model, text = tiny_model(), calibration()
    spec = ConversionSpec(method="contiguous", active=0.5, selection="threshold")
    converted = convert(model, spec, text)
    chosen = []
    for dense, mlp in zip(mlp_modules(model), mlp_modules(converted), strict=True):
        dense.register_forward_pre_hook(
            lambda _, inputs, mlp=mlp: chosen.append(mlp.select(inputs[0].flatten(0, 1)))
        )
    with torch.no_grad():
        model(text.samples)
    assert len(chosen) == LAYERS
    assert any(len(set(some.sum(1).tolist())) > 1 for some in chosen)  # more for some tokens
    running = sum(3 * float(some.sum(1).double().mean()) for some in chosen)  # neurons
    report = parameter_report(converted)
    idle = (LAYERS * D_FF - running) * 3 * ROW
    assert report.active_per_token == pytest.approx(report.total - idle, abs=100)
    macs = running * 3 * ROW + LAYERS * 16 * D_MODEL
    assert report.mlp_macs_per_token == pytest.approx(macs, abs=100)


@pytest.mark.parametrize(
    ("spec", "macs"),
    [  # of 44 neurons in each of 2 layers; 11 experts of 4 neurons, 5 or 6 of them run
        (ConversionSpec(method="contiguous", active=0.5), 2 * (24 * 2 * ROW + 11 * D_MODEL)),
        (ConversionSpec(method="neurons", active=0.5), 2 * (44 + 22) * ROW),
        (ConversionSpec(method="inputs", active=0.5), 2 * (22 + 22) * ROW),
    ],
    ids=lambda value: value.method if isinstance(value, ConversionSpec) else None,
)
def test_routed_multiply_adds_without_a_gate(spec, macs):
    """What has no gate has two matrices per neuron; the first one chooses neurons."""
    assert parameter_report(convert(build("gpt2"), spec)).mlp_macs_per_token == macs


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
