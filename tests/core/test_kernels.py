"""Compiled kernels compute what the modules define, in float64 and without any kernel."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_array
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from mlpmoe.core.conversion import convert, convert_mlp
from mlpmoe.core.kernels import arrays, choice
from mlpmoe.core.kernels.decoder import CompiledDecoder, decodes
from mlpmoe.core.kernels.one_token import dense as bind_dense
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.text.decoding import Reader
from tests.core.layers import KINDS, layer_of, random_mlp

if os.environ.get("CI"):
    import numba  # noqa: F401
else:
    pytest.importorskip("numba", reason="compiled kernels need the extra `fast`")

SHAPES = {"even": (24, 12), "odd": (39, 19), "76 neurons": (76, 33)}
MLPS = {
    "split": {"branches": 3},
    "kept, with a factor": {"branches": 4, "keep": 3},
    "kept, refitted": {"branches": 4, "keep": 2, "order": "norm", "compensation": "mean"},
    "experts": {"method": "contiguous", "experts": 4, "active": 0.5},
    "experts, some shared": {"method": "random", "experts": 6, "shared": 0.34, "active": 0.6},
    "a single expert": {"method": "contiguous", "experts": 4, "active": 0.25},
    "all experts": {"method": "contiguous", "experts": 4, "active": 1.0},
    "experts above a threshold": {
        "method": "coactivation", "experts": 4, "active": 0.5, "selection": "threshold",
        "compensation": "mean",
    },
    "experts for x of length 1": {"method": "moefication", "experts": 4, "active": 0.5},
    "a router of another kind": {"method": "cmoe", "experts": 6, "active": 0.6},
    "token clusters": {"method": "tokenclusters", "experts": 3, "active": 0.5},
    "token clusters, refitted": {
        "method": "tokenclusters", "experts": 3, "active": 0.5, "router": "regression",
        "compensation": "refit",
    },
    "low rank": {"method": "lowrank", "active": 0.8, "compensation": "mean"},
    "low rank, for each token": {
        "method": "lowrank", "active": 0.8, "router": "directions-token", "compensation": "mean",
    },
    "neurons": {"method": "neurons", "active": 0.4},
    "neurons above a threshold": {
        "method": "neurons", "active": 0.4, "router": "gate-norm", "selection": "threshold",
        "compensation": "mean",
    },
    "inputs": {"method": "inputs", "active": 0.5, "router": "inputs"},
    "inputs above thresholds": {
        "method": "inputs", "active": 0.5, "router": "inputs-norm", "selection": "threshold",
        "compensation": "mean",
    },
    "inputs and open gates": {"method": "inputs", "active": 0.5, "router": "inputs-gate"},
}  # fmt: skip


@pytest.fixture
def each_number_of_threads(monkeypatch):
    """A list, with torch set to each of its numbers as it is reached, however small the work is."""

    def numbers():
        for number in (2, 1):
            torch.set_num_threads(number)
            yield number

    monkeypatch.setattr(arrays, "WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    yield numbers()
    torch.set_num_threads(before)


def exactly(module, x):
    """(tokens, d_model) float64, by matrix products."""
    return copy.deepcopy(module).double().many(x.double())


def singly(run, x):
    """Each token through a kernel, on top of what is there before."""
    out = np.ones(tuple(x.shape), np.float32)
    for token, row in zip(x.float().numpy(), out, strict=True):
        run(token, row)
    return torch.from_numpy(out).double() - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:])
@pytest.mark.parametrize("made", MLPS)
def test_a_kernel_computes_what_the_module_does(made, kind, shape, dtype, each_number_of_threads):
    if not kind.startswith("gated") and MLPS[made].get("router") == "inputs-gate":
        pytest.skip("there is no gate to open neurons")
    d_ff, d_model = SHAPES[shape]
    layer = layer_of(random_mlp(kind, d_ff, d_model, dtype))
    with torch.no_grad():
        module = convert_mlp(layer.weights, ConversionSpec(**MLPS[made]), layer)
        x = torch.randn(20, d_model, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = exactly(module, x)
        assert expected.norm() > 1
        for _ in each_number_of_threads:
            error = (singly(module.one_token(), x) - expected).norm(dim=1) / expected.norm(dim=1)
            assert error.median() < 2e-6
            assert (error < 1e-5).sum() > 16  # the others chose otherwise, by a hair


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations_are_known_by_what_they_compute(name):
    activation = ACT2FN[name]
    mlp = replace(random_mlp(), activation=activation)
    x = 3 * torch.randn(10, mlp.d_model, generator=torch.Generator().manual_seed(3))
    up, gate, down = (w.double() for w in (mlp.up, mlp.gate, mlp.down))
    expected = (activation(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    found = singly(bind_dense(mlp), x)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("activation", [torch.tanh, F.elu, ACT2FN["quick_gelu"]])
def test_other_activations_have_no_kernel(activation):
    assert bind_dense(replace(random_mlp(), activation=activation)) is None


def test_other_numbers_have_no_kernel():
    for dtype in (torch.float16, torch.float64):
        assert bind_dense(random_mlp(dtype=dtype)) is None


@given(
    any_array(
        np.float32,
        st.integers(1, 60),
        elements=st.floats(-4, 4, width=32).map(lambda v: np.float32(round(v, 1))) | st.just(-0.0),
    ),
    st.integers(0, 60),
)
def test_the_highest_are_chosen(scores, count):
    """As a stable sort of all does. -0 is below 0 here, which no score that counts can be."""
    from mlpmoe.core.kernels.compiled import highest

    scores = scores + np.float32(0)  # -0 is 0
    best = np.argsort(-scores, kind="stable")[: min(count, len(scores))]
    assert highest(scores, count).tolist() == sorted(best.tolist())


def test_a_module_takes_the_faster_form(monkeypatch):
    """And gives the same; with gradients, or where it is turned off, it is torch."""
    mlp = random_mlp("gated", 48, 16)
    module = convert_mlp(mlp, ConversionSpec(method="neurons", active=0.5))
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    ran = []
    monkeypatch.setattr(module, "one_token", lambda: lambda x, out: ran.append(x))
    monkeypatch.setattr(choice, "is_faster", lambda quick, plain: True)
    monkeypatch.setattr(choice, "_faster", {})
    with torch.no_grad():
        module(x)
        assert len(ran) == 1
        monkeypatch.setattr(choice, "is_faster", lambda quick, plain: False)
        monkeypatch.setattr(choice, "_faster", {})
        assert torch.allclose(module(x), module.many(x), atol=1e-6)
        monkeypatch.setattr(choice, "is_faster", lambda quick, plain: True)
        monkeypatch.setattr(choice, "_faster", {})
        monkeypatch.setenv(arrays.SWITCH, "plain")
        assert torch.allclose(module(x), module.many(x), atol=1e-6)
        monkeypatch.delenv(arrays.SWITCH)
    module(x).sum().backward()
    assert len(ran) == 1


def test_weights_that_change_are_seen(monkeypatch):
    monkeypatch.setattr(choice, "is_faster", lambda quick, plain: True)
    monkeypatch.setattr(choice, "_faster", {})
    for spec in (ConversionSpec(branches=4, keep=3), ConversionSpec(method="neurons", active=0.5)):
        module = convert_mlp(random_mlp("gated with biases", dtype=torch.bfloat16), spec)
        x = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)).bfloat16()
        for change in (
            lambda m: None,
            lambda m: [p.mul_(1.5) for p in m.parameters()],
            lambda m: m.float(),
            lambda m: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
        ):
            with torch.no_grad():
                change(module)
                given = x.to(next(module.parameters()).dtype)
                expected = exactly(module, given)
                assert (module(given) - expected).norm() < 0.01 * expected.norm()


# decoding

SMALL = {
    "vocab_size": 91, "hidden_size": 32, "intermediate_size": 76, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
DECODED = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "a width of its own": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}
TEXT = torch.randint(0, 91, (1, 24), generator=torch.Generator().manual_seed(5))


def build(kind, config, fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**SMALL, **fields})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@torch.no_grad()
def decoded(model, prompt):
    """Logits after each token behind a prompt, which the model itself has read."""
    decoder = CompiledDecoder(model, TEXT.shape[1])
    if prompt:
        cache = model(TEXT[:, :prompt], use_cache=True)["cache"]
        decoder.take([(layer.keys, layer.values) for layer in cache.layers])
    return torch.cat([decoder.step(int(token)) for token in TEXT[0, prompt:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_decoding_gives_the_model_s_logits(name, dtype, each_number_of_threads):
    model = build(*DECODED[name]).to(dtype)
    expected = copy.deepcopy(model).double()(TEXT).logits[0]
    assert expected.std() > 0.1
    for _ in each_number_of_threads:
        assert (decoded(model, 0) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("made", MLPS)
def test_converted_models_are_decoded(made):
    model = build(*DECODED["qwen2"])
    spec = ConversionSpec(**MLPS[made])
    from mlpmoe.core.calibration import Calibration

    text = Calibration(torch.randint(0, 91, (16, 16)))
    converted = convert(model, spec, text if spec.needs_calibration else None)
    expected = copy.deepcopy(converted).double()(TEXT).logits[0, 9:]
    found = decoded(converted, 9)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 1e-5


@torch.inference_mode()
def test_a_reader_goes_on_by_one_token_or_several(monkeypatch):
    monkeypatch.setattr("mlpmoe.core.kernels.decoder.is_faster", lambda quick, plain: True)
    model = build(*DECODED["llama"])
    expected = model(TEXT).logits[0]
    reader = Reader(model, TEXT.shape[1])
    for start, stop in ((0, 9), (9, 10), (10, 15), (15, 24)):
        found = reader.read(TEXT[:, start:stop])[0]
        assert torch.allclose(found, expected[stop - 1], rtol=1e-4, atol=1e-4)


def test_what_is_decoded(monkeypatch):
    model = build(*DECODED["llama"])
    monkeypatch.setattr("mlpmoe.core.kernels.decoder.is_faster", lambda quick, plain: True)
    assert decodes(model)
    assert decodes(convert(model, ConversionSpec(branches=4)))
    assert not decodes(copy.deepcopy(model).half())
    monkeypatch.setenv(arrays.SWITCH, "plain")
    assert not decodes(model)
    monkeypatch.delenv(arrays.SWITCH)
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not decodes(model)
    hook.remove()
    assert decodes(model)
    assert not decodes(model.train())


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
        # of the same parts, but these are scaled
        (GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.5}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.0}),
        (GraniteForCausalLM, GraniteConfig, {"embedding_multiplier": 3.0}),
    ],
)
def test_what_computes_otherwise_is_not_decoded(monkeypatch, kind, config, fields):
    monkeypatch.setattr("mlpmoe.core.kernels.decoder.is_faster", lambda quick, plain: True)
    assert not decodes(build(kind, config, fields))
