"""Experts of rank one that are weighed by task and by token, beside LoRA."""

from __future__ import annotations

import pytest
import torch

from mlpmoe.core.descent import descend
from mlpmoe.core.errors import UserError
from mlpmoe.studies.adapters import (
    PROJECTIONS,
    LoraLinear,
    MooreLinear,
    kinds_of,
    reflected,
)
from tests.families import LAYERS, VOCABULARY, build

TASKS = 2
HELD = {"gpt2": {"up", "down"}, "bloom": {"up", "down"}}  # layers of an MLP; else all three


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def stirred(adapted, size=0.1):
    """The same with random numbers wherever it is trained."""
    drawn = generator(7)
    with torch.no_grad():
        for parameter in adapted.trained:
            noise = torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
            parameter += (size * noise).to(parameter.dtype)
    return adapted


def moore(model, width=3, projections=PROJECTIONS, reflections=4):
    return kinds_of(model, TASKS, 0, projections, reflections, width)["MoORE"]()


def far(found, expected):
    """The largest difference, as a part of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, VOCABULARY, (3, 20), generator=generator())


def test_reflections_are_the_product_of_householder_matrices():
    mirrors, x = random(5, 9, dtype=torch.float64), random(4, 9, seed=2, dtype=torch.float64)
    product = torch.eye(9, dtype=torch.float64)
    for u in mirrors:
        product = product @ (torch.eye(9) - 2 * torch.outer(u, u) / u.dot(u))
    found = reflected(torch.eye(9, dtype=torch.float64), mirrors).T  # its rows are H of the axes
    torch.testing.assert_close(found, product)
    torch.testing.assert_close(reflected(x, mirrors), x @ product.T)
    torch.testing.assert_close(found @ found.T, torch.eye(9, dtype=torch.float64))
    twice = mirrors.repeat_interleave(2, dim=0)
    torch.testing.assert_close(reflected(x, twice), x)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_it_computes_what_the_paper_says(shape):
    """Token by token, from U, S and V of numpy."""
    weight, bias = random(*shape, dtype=torch.float64), random(shape[0], seed=3).double()
    layer = MooreLinear(weight, bias, TASKS, generator(), reflections=4, width=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += random(*parameter.shape, seed=4).double()
    u, s, v = layer.u, layer.s, layer.v
    torch.testing.assert_close(u * s @ v, weight)
    torch.testing.assert_close(u.T @ u, torch.eye(7).double())
    h = reflected(torch.eye(shape[1]).double(), layer.mirrors).T
    x = random(2, 5, shape[1], seed=5).double()
    for task in (None, 0, 1):
        layer.task = task
        for token, found in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
            experts = s + layer.second @ (layer.first @ token)
            if task is not None:
                experts = experts + layer.tasks[task]
            expected = sum(w * (v[i] @ h @ token) * u[:, i] for i, w in enumerate(experts))
            torch.testing.assert_close(found, expected + bias)


@pytest.mark.parametrize("projections", [PROJECTIONS, ("gate",), ("down",)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom", "gemma2"])
def test_before_training_the_model_is_the_dense_one(name, projections, ids):
    model = build(name)
    if name in ("gpt2", "bloom") and projections == ("gate",):
        with pytest.raises(UserError, match="have no gate"):
            moore(model, projections=projections)
        return
    with torch.no_grad():
        expected = model(ids).logits
        for make in kinds_of(model, TASKS, 0, projections, 4, 3).values():
            adapted = make()
            separate = len(set(projections) & HELD.get(name, set(PROJECTIONS)))
            if name == "phi3":  # gate and up are one layer
                separate = 2 if len(projections) > 1 else 1
            assert len(adapted.adapters) == LAYERS * separate
            for task in (None, 0, 1):
                assert far(adapted.on(task)(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("kind", ["MoORE", "one LoRA", "a LoRA per task"])
def test_only_the_adapter_is_trained(kind, ids):
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = kinds_of(model, TASKS, 0, PROJECTIONS, 4, 3)[kind]()
    stirred(adapted, 0.01)  # W_b is 0 at first, so that W_a has no gradient
    own = {id(p) for p in adapted.trained}
    adapted.on(1)(ids).logits.square().mean().backward()
    for name, parameter in adapted.twin.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert id(parameter) in own or parameter.grad is None
    for layer in adapted.adapters.values():
        if isinstance(layer, MooreLinear):
            assert all(p.grad.any() for p in layer.parameters())
            assert layer.tasks.grad[1].all() and not layer.tasks.grad[0].any()
        elif not layer.shared:
            assert layer.forms[0].a.grad is None and layer.forms[1].a.grad.any()
    descend(adapted.trained, lambda step: adapted.on(0)(ids).logits.square().mean(), 2, 1e-2)
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_mirrors_leave_each_other_from_the_first_step():
    layer = MooreLinear(random(6, 5), None, 1, generator(), reflections=2, width=0)
    layer(random(8, 5, seed=2))[:, 0].sum().backward()
    first, second = layer.mirrors.grad
    assert first.norm() > 0
    torch.testing.assert_close(first, -second)  # so their plane turns


def test_numbers_are_counted():
    """By hand, for matrices of 44 × 32 and 32 × 44."""
    adapted = moore(build("llama"), width=3, reflections=4)
    up = 4 * 32 + 2 * 32 + 3 * (32 + 32)
    down = 4 * 44 + 2 * 32 + 3 * (44 + 32)
    assert adapted.parameters == 2 * (2 * up + down)
    assert MooreLinear.count(44, 32, 2, 4, 3) == up and MooreLinear.count(32, 44, 2, 4, 3) == down
    model = build("llama")
    kinds = kinds_of(model, TASKS, 0, PROJECTIONS, 4, 3)
    ranks = [(-(-up // 76), -(-down // 76)), (-(-up // 152), -(-down // 152))]
    for (up_rank, down_rank), name, each in zip(
        ranks, ["one LoRA", "a LoRA per task"], [1, TASKS], strict=True
    ):
        lora = kinds[name]()
        assert lora.parameters == 2 * each * 76 * (2 * up_rank + down_rank) >= adapted.parameters


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_one_task_merges_into_plain_layers(name, ids):
    model = build(name)
    adapted = stirred(moore(model, width=0))
    for task in (None, 0, 1):
        merged = adapted.merged(task)
        assert not any(isinstance(m, MooreLinear) for m in merged.modules())
        with torch.no_grad():
            torch.testing.assert_close(
                merged(ids).logits, adapted.on(task)(ids).logits, rtol=1e-4, atol=1e-4
            )
    with torch.no_grad():
        assert not torch.allclose(adapted.on(0)(ids).logits, adapted.on(1)(ids).logits, atol=1e-2)


def test_what_is_routed_by_token_is_not_merged():
    with pytest.raises(UserError, match="routed by token cannot be merged"):
        moore(build("llama"), width=3).merged(0)


@pytest.mark.parametrize("kind", ["one LoRA", "a LoRA per task"])
def test_lora_merges_too(kind, ids):
    model = build("llama")
    adapted = stirred(kinds_of(model, TASKS, 0, PROJECTIONS, 4, 3)[kind]())
    for task in (None, 0, 1):
        with torch.no_grad():
            found = adapted.on(task)(ids).logits
            torch.testing.assert_close(adapted.merged(task)(ids).logits, found)
            same = torch.allclose(found, model(ids).logits, atol=1e-4)
        assert same == (kind != "one LoRA" and task is None)


def test_other_dtypes_stay():
    model = build("llama").to(torch.bfloat16)
    ids = torch.randint(2, VOCABULARY, (1, 8), generator=generator())
    for make in kinds_of(model, TASKS, 0, PROJECTIONS, 4, 0).values():
        adapted = stirred(make(), 0.02)
        assert all(p.dtype == torch.float32 for p in adapted.trained)
        with torch.no_grad():
            said = adapted.on(0)(ids).logits
            merged = adapted.merged(0)
        assert said.dtype == torch.bfloat16
        assert all(p.dtype == torch.bfloat16 for p in merged.parameters())


def test_reset_undoes_training(ids):
    model = build("llama")
    adapted = stirred(moore(model))
    adapted.reset()
    with torch.no_grad():
        assert far(adapted.on(0)(ids).logits, model(ids).logits) < 1e-5


def test_the_seed_decides():
    model = build("llama")
    one, again, other = (
        kinds_of(model, TASKS, seed, PROJECTIONS, 4, 3)["MoORE"]() for seed in (0, 0, 1)
    )
    pairs = zip(one.trained, again.trained, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    layers = list(one.adapters.values())
    assert not torch.equal(layers[0].first, layers[1].first)  # each layer has draws of its own
    assert not torch.equal(layers[0].first, next(iter(other.adapters.values())).first)


def test_what_is_refused():
    with pytest.raises(UserError, match="an even number, not 3"):
        MooreLinear(random(4, 4), None, 1, generator(), reflections=3)
    with pytest.raises(UserError, match="0 or more, not -1"):
        MooreLinear(random(4, 4), None, 1, generator(), width=-1)
    with pytest.raises(UserError, match="no projection is called 'sideways'"):
        moore(build("llama"), projections=("sideways",))
    assert LoraLinear(random(4, 3), None, None, generator(), 99).forms[0].a.shape == (3, 3)
