"""The fused module is the sum of branches, for any sizes, with its alphas and their gradients."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlpmoe.core.conversion import convert_mlp
from mlpmoe.core.mlps import MLPWeights
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP, LoopedMLP, branch_sizes, keep_neurons
from mlpmoe.core.static.compensation import COMPENSATIONS

MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def random_mlp(d_model, d_ff, gated=True, biases=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))

    return MLPWeights(
        gate=random(d_ff, d_model) if gated else None,
        up=random(d_ff, d_model),
        down=random(d_model, d_ff),
        gate_bias=random(d_ff) if gated and biases else None,
        up_bias=random(d_ff) if biases else None,
        down_bias=random(d_model) if biases else None,
        activation=F.gelu,
    )


@st.composite
def mlps(draw):
    return random_mlp(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 40)),
        gated=draw(st.booleans()),
        biases=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


@st.composite
def cases(draw):
    """An MLP, B and K that fit it, and one alpha per kept branch."""
    mlp = draw(mlps())
    branches = draw(st.integers(1, mlp.d_ff))
    keep = draw(st.integers(1, branches))
    alpha = draw(st.lists(st.floats(-3, 3), min_size=keep, max_size=keep))
    return mlp, branches, torch.tensor(alpha, dtype=mlp.up.dtype)


def fused_module(mlp, branches, alpha):
    sizes = branch_sizes(mlp.d_ff, branches)[: len(alpha)]
    fused = BranchedMLP(keep_neurons(mlp, sum(sizes)), sizes, branches=branches)
    with torch.no_grad():
        fused.alpha.copy_(alpha)
    return fused


def branch_of_each_neuron(mlp, branches):
    """(d_ff, B): one where the neuron belongs to the branch."""
    parts = torch.arange(mlp.d_ff).tensor_split(branches)
    branch = torch.cat([torch.full((len(part),), b) for b, part in enumerate(parts)])
    return F.one_hot(branch, branches).to(mlp.up.dtype)


def einsum_mlp(mlp, branches, alpha, x):
    """y = sum over branches and neurons, all at once."""
    h = x @ mlp.up.T if mlp.up_bias is None else x @ mlp.up.T + mlp.up_bias
    if mlp.gate is None:
        h = mlp.activation(h)
    else:
        gate = x @ mlp.gate.T if mlp.gate_bias is None else x @ mlp.gate.T + mlp.gate_bias
        h = mlp.activation(gate) * h
    members = branch_of_each_neuron(mlp, branches)[:, : len(alpha)]
    y = torch.einsum("...f,fb,b,mf->...m", h, members, alpha, mlp.down)
    return y if mlp.down_bias is None else y + mlp.down_bias


def inputs(mlp, *shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, mlp.d_model, generator=generator, dtype=mlp.up.dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# Splitting ---------------------------------------------------------------------------------


@given(data=st.data(), d_ff=st.integers(1, 5000))
def test_branch_sizes_are_those_of_tensor_split(data, d_ff):
    branches = data.draw(st.integers(1, d_ff))
    parts = torch.empty(d_ff, device="meta").tensor_split(branches)
    assert branch_sizes(d_ff, branches) == tuple(len(part) for part in parts)


@given(mlp=mlps(), data=st.data())
def test_kept_neurons_are_views(mlp, data):
    count = data.draw(st.integers(1, mlp.d_ff))
    kept = keep_neurons(mlp, count)
    assert kept.d_ff == count
    assert kept.d_model == mlp.d_model
    for name in MATRICES:
        before, after = getattr(mlp, name), getattr(kept, name)
        if before is None:
            assert after is None
            continue
        assert after.data_ptr() == before.data_ptr()
        rows = before[:, :count] if name == "down" else before
        assert torch.equal(after, rows if name.startswith("down") else before[:count])
    assert kept.down_bias is mlp.down_bias


def test_keeping_everything_is_the_very_same_record():
    mlp = random_mlp(3, 7)
    assert keep_neurons(mlp, 7) is mlp


@pytest.mark.parametrize("gated", [True, False])
def test_all_branches_hold_the_very_same_parameters(gated):
    mlp = random_mlp(3, 7, gated=gated)
    fused = BranchedMLP(mlp, branch_sizes(7, 3))
    assert fused.up_proj.weight is mlp.up
    assert fused.up_proj.bias is mlp.up_bias
    assert fused.down_proj.weight is mlp.down
    assert fused.down_proj.bias is mlp.down_bias
    if gated:
        assert fused.gate_proj.weight is mlp.gate
        assert fused.gate_proj.bias is mlp.gate_bias
    looped = LoopedMLP(fused)
    storages = {t.untyped_storage().data_ptr() for t in fused.parameters()}
    assert {t.untyped_storage().data_ptr() for t in looped.parameters()} == storages


# Computing ---------------------------------------------------------------------------------


@given(case=cases(), residual=st.booleans())
def test_fused_equals_looped_equals_einsum(case, residual):
    mlp, branches, alpha = case
    fused = fused_module(*case)
    x = inputs(mlp, 2, 3)
    extra = (inputs(mlp, 2, 3).flip(0),) if residual else ()
    expected = einsum_mlp(mlp, branches, alpha, x) + sum(extra)
    assert_same(fused(x, *extra), expected)
    assert_same(LoopedMLP(fused)(x, *extra), expected)


@given(case=cases())
def test_any_leading_shape(case):
    mlp, _, _ = case
    fused = fused_module(*case)
    x = inputs(mlp, 6)
    assert_same(fused(x.view(1, 2, 3, -1)).view(6, -1), fused(x))
    assert_same(fused(x[0]), fused(x)[0])


@given(case=cases(), data=st.data())
def test_each_alpha_scales_its_own_branch(case, data):
    mlp, branches, alpha = case
    b = data.draw(st.integers(0, len(alpha) - 1))
    neurons = torch.arange(mlp.d_ff).tensor_split(branches)[b]
    x = inputs(mlp, 4)
    one_more = alpha.clone()
    one_more[b] += 1
    difference = fused_module(mlp, branches, one_more)(x) - fused_module(*case)(x)

    def rows(tensor):
        return None if tensor is None else tensor[neurons]

    alone = replace(
        mlp,
        gate=rows(mlp.gate),
        up=mlp.up[neurons],
        down=mlp.down[:, neurons],
        gate_bias=rows(mlp.gate_bias),
        up_bias=rows(mlp.up_bias),
        down_bias=None,
    )
    torch.testing.assert_close(
        difference, einsum_mlp(alone, 1, torch.ones(1).double(), x), rtol=1e-9, atol=1e-9
    )


@given(case=cases())
def test_gradients_of_alpha_are_those_of_the_loop(case):
    mlp, branches, alpha = case
    x = inputs(mlp, 5)
    weight = inputs(mlp, 5).flip(0)  # of each output number, so that none cancels another
    fused = fused_module(*case)
    (fused(x) * weight).sum().backward()
    found = fused.alpha.grad
    again = fused_module(*case)
    looped = LoopedMLP(again)
    (looped(x) * weight).sum().backward()
    assert_same(found, looped.alpha.grad)
    reference = alpha.clone().requires_grad_()
    (einsum_mlp(mlp, branches, reference, x) * weight).sum().backward()
    assert_same(found, reference.grad)


def test_learned_alphas_change_the_output():
    """One step of gradient descent on alpha alone lowers the loss."""
    mlp = random_mlp(5, 12)
    fused = BranchedMLP(mlp, branch_sizes(12, 4))
    x, target = inputs(mlp, 20), inputs(mlp, 20).flip(0)
    optimiser = torch.optim.SGD([fused.alpha], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(fused(x), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]
    assert "alpha" in dict(fused.named_parameters())
    assert "alpha" in fused.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_branch_by_branch(dtype):
    """Half precision: the fused sum is closer to the exact one than the paper's loop is."""
    mlp = random_mlp(64, 256, biases=False, dtype=torch.float64)
    mlp = replace(mlp, **{n: nn.Parameter(getattr(mlp, n).to(dtype)) for n in ("gate", "up")})
    mlp = replace(mlp, down=nn.Parameter((mlp.down / 64).to(dtype)))
    exact = replace(mlp, **{n: getattr(mlp, n).double() for n in ("gate", "up", "down")})
    fused = BranchedMLP(mlp, branch_sizes(256, 32))
    x = inputs(exact, 16).to(dtype)
    expected = einsum_mlp(exact, 1, torch.ones(1).double(), x.double())

    def error(module):
        return (module(x).double() - expected).norm() / expected.norm()

    assert error(fused) < error(LoopedMLP(fused))


# Compensation ------------------------------------------------------------------------------


@given(branches=st.integers(1, 10_000), data=st.data())
def test_square_root_of_b_over_k(branches, data):
    keep = data.draw(st.integers(1, branches))
    factors = {"sqrt": sqrt(branches / keep), "ratio": branches / keep}
    for name in COMPENSATIONS:
        spec = ConversionSpec(branches=branches, keep=keep, compensation=name)
        assert spec.alpha == factors.get(name, 1)
        assert ConversionSpec(branches=branches, compensation=name).alpha == 1


@given(mlp=mlps(), data=st.data(), name=st.sampled_from(["none", "sqrt", "ratio"]))
def test_conversion_of_one_mlp_keeps_and_compensates(mlp, data, name):
    branches = data.draw(st.integers(1, mlp.d_ff))
    keep = data.draw(st.integers(1, branches))
    module = convert_mlp(mlp, ConversionSpec(branches=branches, keep=keep, compensation=name))
    factor = {"none": 1.0, "sqrt": sqrt(branches / keep), "ratio": branches / keep}[name]
    alpha = torch.full((keep,), factor, dtype=mlp.up.dtype)
    assert torch.equal(module.alpha.detach(), alpha)
    assert module.branches == branches
    assert module.sizes == branch_sizes(mlp.d_ff, branches)[:keep]
    x = inputs(mlp, 3)
    assert_same(module(x), einsum_mlp(mlp, branches, alpha, x))
