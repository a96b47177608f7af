"""Copies of branches, as dense models and as experts, against weights put together by hand."""

import copy

import pytest
import torch
from torch import nn

from mlpmoe.core.errors import SpecError
from mlpmoe.core.mlps import read_mlps
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.studies.copies import Copies, average
from mlpmoe.studies.routing import Told
from tests.families import build
from tests.tiny import D_FF, LAYERS, tiny_model

FIRST = D_FF // 2  # of 4 branches, 2 are shared
IDS = torch.arange(24).view(2, 12)
FAMILIES = ("llama-bias", "gpt2", "phi3", "bloom")  # biases, no gate, both in one, with residual


@pytest.fixture
def dense():
    return tiny_model().double()


def changed(rows, seed):
    """Rows that differ from the given ones, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t + torch.randn(t.shape, generator=generator).to(t) / 10).detach()
        for name, t in rows.items()
    }


def by_hand(dense, rows):
    """The dense model with its last neurons replaced, one tensor at a time."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            path = f"model.layers.{layer}.mlp"
            block.mlp.gate_proj.weight[FIRST:] = rows[f"{path}.gate_proj.weight"]
            block.mlp.up_proj.weight[FIRST:] = rows[f"{path}.up_proj.weight"]
            block.mlp.down_proj.weight[:, FIRST:] = rows[f"{path}.down_proj.weight"]
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_experts_with_the_right_copy_told_are_that_copy(dense):
    copies = Copies(dense, branches=4, shared=2)
    made = [changed(copies.start(), seed) for seed in range(3)]
    told = Told(3)
    merged = copies.experts(made, lambda path: told)
    for expert, rows in enumerate(made):
        told.expert = expert
        expected = logits(by_hand(dense, rows))
        for found in (logits(copies.dense(rows)), copies.logits(rows, IDS), logits(merged)):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, logits(dense), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_mlp(name):
    dense = build(name).double()
    ids = IDS % dense.config.get_text_config().vocab_size
    copies = Copies(dense, branches=4, shared=2)
    made = [changed(copies.start(), seed) for seed in range(2)]
    told = Told(2)
    merged = copies.experts([*made, copies.start()], lambda path: told)
    told.experts = 3
    with torch.no_grad():
        for told.expert, model in enumerate([*map(copies.dense, made), dense]):
            torch.testing.assert_close(
                merged(ids, use_cache=False).logits, model(ids, use_cache=False).logits,
                rtol=1e-9, atol=1e-9,
            )  # fmt: skip


def test_only_the_chosen_branches_get_gradients(dense):
    copies = Copies(dense, branches=4, shared=2)
    rows = copies.start()
    before = {name: p.clone() for name, p in dense.named_parameters()}
    copies.logits(rows, IDS).square().mean().backward()
    assert all(p.grad is None for p in copies.seed.parameters())  # the dense model's, too
    # the same by the dense model's own gradient
    logits = dense(IDS, use_cache=False).logits
    logits.square().mean().backward()
    assert len(rows) == 3 * LAYERS
    for name, part in rows.items():
        full = dense.get_parameter(name).grad
        own = full[:, FIRST:] if "down" in name else full[FIRST:]
        assert own.abs().max() > 0
        torch.testing.assert_close(part.grad, own, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[name], p) for name, p in dense.named_parameters())


def test_the_average_is_the_average(dense):
    copies = Copies(dense, branches=4, shared=2)
    made = [changed(copies.start(), seed) for seed in range(3)]
    mean = average(made)
    for name in made[0]:
        expected = sum(rows[name] for rows in made) / 3
        torch.testing.assert_close(mean[name], expected)
    torch.testing.assert_close(
        logits(copies.dense(mean)), logits(by_hand(dense, mean)), rtol=1e-10, atol=1e-10
    )


def test_a_token_meets_the_shared_neurons_and_one_copy(dense):
    copies = Copies(dense, branches=4, shared=2)
    merged = copies.experts([copies.start()] * 3, lambda path: Told(3))
    mlp = sum(sum(p.numel() for p in m.module.parameters()) for m in read_mlps(dense))
    counted = parameter_report(merged)
    assert counted.mlp_total == 2 * mlp  # half of it three times, the other half once
    assert counted.active_per_token == sum(p.numel() for p in dense.parameters())


def test_the_model_stays_as_it_is(dense):
    before = logits(dense)
    copies = Copies(dense, branches=4, shared=2)
    rows = copies.start()
    with torch.no_grad():
        for tensor in rows.values():
            tensor.zero_()
    merged = copies.experts([rows, rows], lambda path: Told(2))
    nn.init.zeros_(merged.model.layers[0].mlp.up)
    assert torch.equal(logits(dense), before) and torch.equal(logits(copies.seed), before)


def test_more_branches_than_neurons(dense):
    with pytest.raises(SpecError, match="branches"):
        Copies(dense, branches=D_FF + 1, shared=2)
