"""Every family converts to what the paper says, and what cannot be split is refused by name.

The paper's algorithm is written here once more, plainly, on the original modules: a loop over
branches, `torch.quantile`, one product per branch and projection. Nothing of `mlpmoe` is in it.
"""

import hashlib
import re
from functools import cache, partial
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mlpmoe.core.conversion import convert, loop_over_branches
from mlpmoe.core.errors import UnsupportedModelError
from mlpmoe.core.mlps import check_structure, read_mlps
from mlpmoe.core.spec import ConversionSpec
from tests.families import COMMON, FAMILIES, LAYERS, REFUSED_FAMILIES, VOCABULARY, build

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest logit
TOKENS = (1 + torch.arange(24) * 7 % (VOCABULARY - 1)).reshape(2, 12)
NEW_TOKENS = 3

each_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def dense_model(name, dtype=torch.float32):
    return build(name, dtype)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, attention_mask=torch.ones_like(tokens)).logits


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def mlp_outputs(name, model, dtype):
    """Each MLP on its own, all outputs in one tensor. Logits cannot show errors below float32's:
    most norms compute in float32 whatever the model's dtype."""
    family, outputs = FAMILIES[name], []
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        x = torch.randn(1, 6, model.config.hidden_size, generator=generator).to(dtype)
        extra = (x.flip(1),) if family.adds_residual else ()
        with torch.no_grad():
            outputs.append(model.get_submodule(family.mlp.format(layer))(x, *extra))
    return torch.cat(outputs)


def assert_same(name, dtype, model, expected):
    assert relative_error(logits(model), logits(expected)) <= TOLERANCE[dtype]
    found = mlp_outputs(name, model, dtype)
    assert found.dtype == dtype
    assert relative_error(found, mlp_outputs(name, expected, dtype)) <= TOLERANCE[dtype]


def fingerprint(model):
    """A hash over the names, places and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.data_ptr()}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The paper, plainly ------------------------------------------------------------------------


def paper_mlp(family, module, branches, keep, strength, x, residual=None):
    """Sections 3.1 to 3.3 on the original MLP module."""

    def read(name):  # weight as (out, in)
        linear = getattr(module, name)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        return weight, linear.bias

    def piece(tensor, neurons):
        return None if tensor is None else tensor[neurons]

    def faded(weight, sparsity):
        if sparsity == 0:
            return weight
        threshold = torch.quantile(weight.abs().float(), min(1.0, sparsity))
        return weight * (weight.abs().float() > threshold)

    up, up_bias = read(family.up)
    down, down_bias = read(family.down)
    gate = gate_bias = None
    if family.fused:
        gate, up = up[: family.d_ff], up[family.d_ff :]
    elif family.gate:
        gate, gate_bias = read(family.gate)
    act = F.silu if family.activation is None else getattr(module, family.activation)

    y = torch.zeros_like(x)
    for b, neurons in enumerate(torch.arange(family.d_ff).tensor_split(branches)[:keep]):
        sparsity = strength * b / branches
        h = F.linear(x, faded(up[neurons], sparsity), piece(up_bias, neurons))
        if gate is None:
            h = act(h)
        else:
            h = h * act(F.linear(x, faded(gate[neurons], sparsity), piece(gate_bias, neurons)))
        y = y + sqrt(branches / keep) * F.linear(h, down[:, neurons])
    if down_bias is not None:
        y = y + down_bias
    return y if residual is None else y + residual


def paper_model(name, dtype, branches, keep, strength):
    model, family = build(name, dtype), FAMILIES[name]
    for layer in range(LAYERS):
        module = model.get_submodule(family.mlp.format(layer))
        module.forward = partial(paper_mlp, family, module, branches, keep, strength)
    return model


# Conversion --------------------------------------------------------------------------------


@each_family
def test_reading_is_the_module_s_own_tensors(name):
    model, family = dense_model(name), FAMILIES[name]
    mlps = read_mlps(model)
    assert [mlp.name for mlp in mlps] == [family.mlp.format(layer) for layer in range(LAYERS)]
    for mlp in mlps:
        weights = mlp.weights
        assert mlp.module is model.get_submodule(mlp.name)
        assert weights.d_ff == family.d_ff
        assert weights.d_model == model.config.hidden_size
        assert (weights.gate is not None) == (family.fused or family.gate is not None)
        assert (weights.up_bias is not None) == family.biases
        assert (weights.down_bias is not None) == family.biases
        assert weights.adds_residual == family.adds_residual
        up, down = getattr(mlp.module, family.up), getattr(mlp.module, family.down)
        storages = {t.weight.untyped_storage().data_ptr() for t in (up, down)}
        read = {t.untyped_storage().data_ptr() for t in (weights.up, weights.down)}
        assert read == storages


@each_family
@pytest.mark.parametrize(("dtype", "branches"), [(torch.float32, 16), (torch.float64, 5)])
def test_all_branches_without_fade_equal_dense(name, dtype, branches):
    dense = dense_model(name, dtype)
    converted = convert(dense, ConversionSpec(branches=branches))
    assert logits(converted).dtype == dtype
    assert_same(name, dtype, converted, dense)
    assert_same(name, dtype, loop_over_branches(converted), dense)


@each_family
@pytest.mark.parametrize(
    ("dtype", "branches", "keep"), [(torch.float32, 5, 3), (torch.float64, 16, 11)]
)
def test_fade_and_keep_equal_the_paper(name, dtype, branches, keep):
    dense = dense_model(name, dtype)
    converted = convert(dense, ConversionSpec(branches=branches, fade=0.9, keep=keep))
    paper = paper_model(name, dtype, branches, keep, 0.9)
    assert_same(name, dtype, converted, paper)
    assert_same(name, dtype, loop_over_branches(converted), paper)
    # The comparison means something only if it matters what the MLPs do.
    assert relative_error(logits(paper), logits(dense)) > 0.2


@each_family
def test_generation_with_the_cache_equals_generation_without(name):
    spec = ConversionSpec(branches=5, fade=0.9, keep=3)
    converted = convert(dense_model(name), spec)
    prompt = TOKENS[:1, :4]
    with torch.no_grad():
        generated = converted.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )
    tokens = prompt
    for _ in range(NEW_TOKENS):
        tokens = torch.cat([tokens, logits(converted, tokens)[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == tokens.tolist()


@each_family
def test_dense_model_is_bit_identical_after_conversion(name):
    dense = build(name)
    before = fingerprint(dense), logits(dense)
    converted = convert(dense, ConversionSpec(branches=5, fade=0.9, keep=3))
    logits(converted)
    logits(loop_over_branches(converted))
    assert fingerprint(dense) == before[0]
    assert torch.equal(logits(dense), before[1])


def test_half_precision_converts_within_its_own_rounding():
    for dtype in (torch.float16, torch.bfloat16):
        dense = build("llama-bias", dtype)
        converted = convert(dense, ConversionSpec(branches=16))
        error = relative_error(logits(converted).float(), logits(dense).float())
        assert error <= 8 * torch.finfo(dtype).eps


# Refusals ----------------------------------------------------------------------------------

SPEC = ConversionSpec(branches=4)


def refusal(model, action=None):
    with pytest.raises(UnsupportedModelError) as caught:
        action(model) if action else convert(model, SPEC)
    return str(caught.value)


def meta_model(family, **config):
    values = AutoConfig.for_model(family.model_type, **COMMON, **family.config, **config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(values)


@pytest.mark.parametrize("name", REFUSED_FAMILIES)
def test_families_that_do_not_split_are_refused_by_name(name):
    refused = REFUSED_FAMILIES[name]
    model = build(refused.family)
    before = fingerprint(model)
    message = refusal(model)
    assert message.startswith(refused.module)
    assert refused.reason in message
    assert fingerprint(model) == before
    assert refusal(meta_model(refused.family), check_structure) == message


def test_structure_is_checked_without_weights_but_conversion_needs_them():
    model = meta_model(FAMILIES["qwen2"])
    check_structure(model)
    message = refusal(model)
    assert "model.layers.0.mlp.up_proj" in message
    assert "not in memory" in message


def test_offloaded_weights_are_refused():
    message = refusal(cpu_offload(build("qwen2"), execution_device=torch.device("cpu")))
    assert "model.layers.0.mlp.up_proj" in message
    assert "offloaded" in message


class QuantisedLinear(nn.Linear):
    """A subclass computes as it likes."""


def replace_child(model, path, child):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, child)


def test_subclasses_of_linear_are_refused():
    model = build("llama")
    replace_child(model, "model.layers.1.mlp.down_proj", QuantisedLinear(44, 32, bias=False))
    message = refusal(model)
    assert message.startswith("model.layers.1.mlp.down_proj is a QuantisedLinear")
    assert "Quantised or adapted" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats_are_refused(dtype):
    model = build("llama")
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    message = refusal(model)
    assert message.startswith("model.layers.1.mlp.up_proj")
    assert str(dtype) in message
    assert "bfloat16" in message  # what is allowed


def test_tensor_subclasses_are_refused():
    class PackedWeight(nn.Parameter):
        """Quantisation libraries keep their numbers in such a class."""

    model = build("llama")
    linear = model.get_submodule("model.layers.0.mlp.gate_proj")
    linear.weight = PackedWeight(linear.weight.detach())
    message = refusal(model)
    assert message.startswith("model.layers.0.mlp.gate_proj stores PackedWeight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_damaged_weights_are_refused(child, value):
    model = build("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.mlp.{child}").weight[3, 5] = value
    message = refusal(model)
    assert message.startswith("model.layers.1.mlp ")
    assert "damaged" in message


@pytest.mark.parametrize("redo", [lambda model: model, loop_over_branches])
def test_converted_models_are_refused(redo):
    message = refusal(redo(convert(build("llama"), SPEC)))
    assert message.startswith("model.layers.0.mlp is converted already")
    assert "dense" in message


class ScaledMLP(nn.Module):
    """Children as in Llama, but another function of them."""

    def __init__(self, mlp, compute):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.compute = mlp.act_fn, compute

    def forward(self, x):
        return self.compute(self, x)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: 1.01 * m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
        lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
        lambda m, x: m.down_proj(F.rms_norm(m.act_fn(m.gate_proj(x)) * m.up_proj(x), (44,))),
        lambda m, x: x + m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    ],
    ids=["scaled", "gate and up swapped", "norm without weights", "residual inside"],
)
def test_modules_that_compute_something_else_are_refused(compute):
    model = build("llama")
    replace_child(model, "model.layers.1.mlp", ScaledMLP(model.model.layers[1].mlp, compute))
    message = refusal(model)
    assert message.startswith("model.layers.1.mlp (ScaledMLP)")
    assert "something else" in message


def test_parts_that_do_not_fit_together_are_refused():
    """Moshi's fc1 makes gate and up, its fc2 takes half as many: not the plain layout."""
    model = build("phi")
    replace_child(model, "model.layers.0.mlp.fc2", nn.Linear(22, 32))
    message = refusal(model)
    assert message.startswith("model.layers.0.mlp")
    assert "22" in message


def test_a_local_variable_called_residual_is_no_argument():
    def compute(module, x):
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    class Remembering(ScaledMLP):
        def forward(self, x):
            residual = self.compute(self, x)
            return residual

    model = build("llama")
    expected = logits(model)
    replace_child(model, "model.layers.0.mlp", Remembering(model.model.layers[0].mlp, compute))
    assert relative_error(logits(convert(model, SPEC)), expected) <= 1e-5


def test_wrapped_forwards_are_read():
    """Hooks of accelerate replace `forward` by a functools.partial."""
    model = build("bloom")
    expected = logits(model)
    for block in model.transformer.h:
        block.mlp.forward = partial(type(block.mlp).forward, block.mlp)
    assert relative_error(logits(convert(model, SPEC)), expected) <= 1e-5


def test_layers_need_exactly_one_mlp():
    model = build("llama")
    model.model.layers[1].second = build("llama").model.layers[0].mlp
    assert re.match(r"model\.layers\.1 .* has 2 MLP modules", refusal(model))
    del model.model.layers[1].second, model.model.layers[1].mlp
    assert re.match(r"model\.layers\.1 .* has no MLP modules", refusal(model))


def test_decoders_without_a_list_of_layers_are_refused():
    model = build("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]])  # the config says two
    message = refusal(model)
    assert "LlamaForCausalLM" in message
    assert "2 decoder layers" in message
