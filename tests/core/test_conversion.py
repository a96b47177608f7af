"""A conversion is a new model that shares the dense model's tensors and leaves it alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from mlpmoe.core.conversion import convert, loop_over_branches, mlp_modules
from mlpmoe.core.errors import SpecError, UnsupportedModelError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from tests.families import FAMILIES, LAYERS, build

TOKENS = torch.arange(1, 13).view(1, 12)
SIZE = {"hidden_size": 64, "intermediate_size": 172}
GPT2_SIZE = {"hidden_size": 64, "n_inner": 172}


@pytest.fixture
def dense():
    return build("llama", **SIZE)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def tensors(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def storages(model):
    """Bytes of each storage, by address."""
    found = (tensor.untyped_storage() for tensor in tensors(model).values())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def snapshot(model):
    """Everything about a model that a conversion must not change."""
    state = {name: (tensor, tensor.clone()) for name, tensor in tensors(model).items()}
    modules = {name: (module, module.training) for name, module in model.named_modules()}
    return state, modules, copy.deepcopy(model.config.to_dict())


def assert_untouched(model, before):
    state, modules, config = before
    now = tensors(model)
    assert now.keys() == state.keys()
    for name, (tensor, values) in state.items():
        assert now[name] is tensor
        assert torch.equal(tensor, values)
        assert tensor.grad is None
    assert {name: (module, module.training) for name, module in model.named_modules()} == modules
    assert model.config.to_dict() == config


def assert_same_tensors(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# Sharing -----------------------------------------------------------------------------------


def test_without_fade_every_tensor_is_the_dense_model_s(dense):
    converted = convert(dense, ConversionSpec(branches=16))
    ours, theirs = tensors(converted), tensors(dense)
    for name, tensor in theirs.items():
        assert ours[name] is tensor
    added = set(ours) - set(theirs)
    assert {name.rpartition(".")[2] for name in added} == {"alpha", "branch_of_neuron"}
    saved = set(converted.state_dict()) - set(dense.state_dict())
    assert saved == {f"model.layers.{layer}.mlp.alpha" for layer in range(LAYERS)}


@pytest.mark.parametrize("keep", [None, 16, 7, 1])
@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", SIZE), ("llama-bias", SIZE), ("phi3", SIZE), ("gpt2", GPT2_SIZE), ("bloom", {})],
)
def test_without_fade_next_to_nothing_is_allocated(name, size, keep):
    dense = build(name, **size)
    converted = convert(dense, ConversionSpec(branches=16, keep=keep))
    ours, theirs = storages(converted), storages(dense)
    new = sum(size for address, size in ours.items() if address not in theirs)
    d_ff = read_mlps(dense)[0].weights.d_ff
    neurons = sum(len(part) for part in torch.arange(d_ff).tensor_split(16)[: keep or 16])
    # alphas, and the branch of each neuron once for all layers; float32 and int32
    assert new == 4 * (LAYERS * (keep or 16) + neurons)
    assert all(theirs[address] == size for address, size in ours.items() if address in theirs)
    if size:
        mlps = read_mlps(dense)
        assert new < 0.01 * sum(p.nbytes for mlp in mlps for p in mlp.module.parameters())


@pytest.mark.parametrize(("keep", "neurons"), [(None, 172), (7, 77), (13, 142)])
def test_fade_allocates_gate_and_up_of_what_is_kept(dense, keep, neurons):
    converted = convert(dense, ConversionSpec(branches=16, fade=0.9, keep=keep))
    ours, theirs = tensors(converted), tensors(dense)
    shared = storages(dense)
    for name, tensor in ours.items():
        new = name.endswith(("gate_proj.weight", "up_proj.weight", "alpha", "branch_of_neuron"))
        assert (tensor.untyped_storage().data_ptr() not in shared) == new, name
        if not new:
            assert tensor.data_ptr() == theirs[name].data_ptr()
    new_bytes = sum(size for address, size in storages(converted).items() if address not in shared)
    matrices = 2 * LAYERS * neurons * 64 * 4
    assert new_bytes == matrices + 4 * (LAYERS * (keep or 16) + neurons)


def test_the_loop_shares_with_the_fused_model(dense):
    converted = convert(dense, ConversionSpec(branches=16, fade=0.9, keep=7))
    looped = loop_over_branches(converted)
    assert storages(looped).items() <= storages(converted).items()


def test_tied_embeddings_stay_tied():
    dense = build("qwen2", **SIZE)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    converted = convert(dense, ConversionSpec(branches=16, fade=0.9, keep=12))
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert converted.lm_head.weight is dense.lm_head.weight


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "phi3", "gpt2", "bloom", "gptj"])
@pytest.mark.parametrize("branches", [1, 5, 16])
def test_parameters_are_the_dense_ones_and_the_alphas(name, branches):
    dense = build(name)
    converted = convert(dense, ConversionSpec(branches=branches, fade=0.5))
    assert converted.num_parameters() == dense.num_parameters() + LAYERS * branches


def test_keeping_branches_drops_their_parameters(dense):
    converted = convert(dense, ConversionSpec(branches=16, keep=12))
    dropped = 4 * 10 * 3 * 64  # the last four branches have ten neurons each
    expected = dense.num_parameters() + LAYERS * (12 - dropped)
    assert converted.num_parameters() == expected


# The new model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_class_and_config_are_kept(name):
    dense = build(name)
    converted = convert(dense, ConversionSpec(branches=4, keep=3))
    assert type(converted) is type(dense)
    assert converted is not dense
    assert converted.config.to_dict() == dense.config.to_dict()
    assert converted.generation_config.to_dict() == dense.generation_config.to_dict()
    assert [type(module) for module in mlp_modules(converted)] == [BranchedMLP] * LAYERS
    places = [name for name, module in converted.named_modules() if isinstance(module, BranchedMLP)]
    assert places == [mlp.name for mlp in read_mlps(dense)]


def test_config_of_the_conversion_is_its_own(dense):
    converted = convert(dense, ConversionSpec(branches=4))
    converted.config.use_cache = False
    converted.generation_config.max_new_tokens = 3
    converted.eval().train()
    assert dense.config.use_cache
    assert dense.generation_config.max_new_tokens is None
    assert not any(module.training for module in dense.modules())


def test_converting_twice_gives_equal_models(dense):
    spec = ConversionSpec(branches=16, fade=0.9, keep=12)
    first, second = convert(dense, spec), convert(dense, spec)
    assert first is not second
    assert_same_tensors(first, second)
    assert torch.equal(logits(first), logits(second))


def test_an_equal_dense_model_gives_an_equal_conversion(dense):
    spec = ConversionSpec(branches=16, fade=0.9, keep=12)
    assert_same_tensors(convert(dense, spec), convert(build("llama", **SIZE), spec))


def test_conversions_do_not_disturb_each_other(dense):
    one = convert(dense, ConversionSpec(branches=16, keep=12))
    before = logits(one)
    other = convert(dense, ConversionSpec(branches=16, keep=12, fade=0.9))
    with torch.no_grad():
        for module in mlp_modules(other):
            module.alpha.zero_()
            module.up_proj.weight.zero_()
    assert torch.equal(logits(one), before)


def test_a_converted_model_is_refused(dense):
    converted = convert(dense, ConversionSpec(branches=4))
    before = snapshot(converted)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(converted, ConversionSpec(branches=4))
    assert_untouched(converted, before)


# The dense model ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "seed_oss"])
@pytest.mark.parametrize("training", [True, False])
def test_dense_is_left_alone(name, training):
    dense = build(name).train(training)
    before = snapshot(dense)
    random_state = torch.get_rng_state()
    converted = convert(dense, ConversionSpec(branches=5, fade=0.9, keep=3))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert converted.training == training
    assert all(module.training == training for module in mlp_modules(converted))
    assert_untouched(dense, before)


def test_a_model_in_training_with_dropout_converts():
    """Dropout may not hide that the reading is right, nor the modes of single modules be lost."""
    dense = build("gpt2", resid_pdrop=0.5).train()
    dense.transformer.h[0].mlp.dropout.eval()
    before = snapshot(dense)
    converted = convert(dense, ConversionSpec(branches=5))
    assert_untouched(dense, before)
    torch.testing.assert_close(logits(converted.eval()), logits(dense.eval()))


def test_modes_of_the_dense_model_are_not_switched_even_for_a_moment(monkeypatch):
    """Another thread may be generating with it."""
    dense = build("gpt2").train()
    switched = []
    train = nn.Module.train

    def spy(module, mode=True):
        switched.append(module)
        return train(module, mode)

    monkeypatch.setattr(nn.Module, "train", spy)
    convert(dense, ConversionSpec(branches=5))
    assert switched
    ours = {id(module) for module in dense.modules()}
    assert not [module for module in switched if id(module) in ours]


@pytest.mark.parametrize("branches", [173, 10**9, 10**30])
def test_more_branches_than_neurons(dense, branches):
    before = snapshot(dense)
    with pytest.raises(SpecError, match="between 1 and 172"):
        convert(dense, ConversionSpec(branches=branches))
    assert_untouched(dense, before)


def test_as_many_branches_as_neurons(dense):
    converted = convert(dense, ConversionSpec(branches=172))
    assert [module.sizes for module in mlp_modules(converted)] == [(1,) * 172] * LAYERS
    torch.testing.assert_close(logits(converted), logits(dense))


def test_training_alpha_alone_works(dense):
    converted = convert(dense, ConversionSpec(branches=4, keep=3)).requires_grad_(False)
    alphas = [module.alpha.requires_grad_() for module in mlp_modules(converted)]
    converted(TOKENS, labels=TOKENS).loss.backward()
    assert all(alpha.grad.abs().min() > 0 for alpha in alphas)


# At once -----------------------------------------------------------------------------------


def test_conversions_of_one_model_at_the_same_time():
    """Each thread gets its own right model, and the dense model is what it was."""
    specs = [
        ConversionSpec(branches=16, fade=0.9),
        ConversionSpec(branches=16, keep=12),
        ConversionSpec(branches=5, fade=0.5, keep=3),
        ConversionSpec(branches=172),
    ]
    expected = [convert(build("gpt2", **GPT2_SIZE), spec) for spec in specs]
    for _ in range(5):
        dense = build("gpt2", **GPT2_SIZE, resid_pdrop=0.5).train()
        before = snapshot(dense)
        barrier = Barrier(len(specs))

        def work(spec, dense=dense, barrier=barrier):
            barrier.wait(timeout=60)
            return convert(dense, spec)

        with ThreadPoolExecutor(len(specs)) as pool:
            found = list(pool.map(work, specs))
        assert_untouched(dense, before)
        for model, right in zip(found, expected, strict=True):
            assert all(module.training for module in model.modules())
            assert_same_tensors(model, right)
            assert torch.equal(logits(model.eval()), logits(right))
