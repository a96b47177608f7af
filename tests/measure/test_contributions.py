"""What branches add up to, against the sums written out."""

import pytest
import torch

from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.contributions import contributions
from tests.families import build
from tests.tiny import LAYERS, tiny_model

IDS = torch.arange(5, 45)


@torch.no_grad()
def mlp_input(mlp, model, ids):
    """(tokens, d_model), float64"""
    caught = []
    hook = mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(ids[None])
    hook.remove()
    return caught[0][0].double()


def branch_outputs(h, down, branches):
    """(branches, tokens, d_model) from h (tokens, d_ff) and down (d_model, d_ff)."""
    return torch.stack(
        [
            torch.einsum("tf,df->td", part, columns)
            for part, columns in zip(
                h.tensor_split(branches, dim=1), down.tensor_split(branches, dim=1), strict=True
            )
        ]
    )


def assert_agrees(found, outputs, keep):
    whole, kept = outputs.sum(0), outputs[:keep].sum(0)
    energy = outputs.square().sum((1, 2))
    assert found.tokens == outputs.shape[1]
    assert 0 <= found.split_error < 2e-6
    assert found.kept_norm == pytest.approx(float(kept.norm() / whole.norm()), rel=1e-4)
    cosine = float((kept * whole).sum() / kept.norm() / whole.norm())
    assert found.cosine == pytest.approx(cosine, rel=1e-4)
    dropped = float(energy[keep:].sum() / energy.sum())
    assert found.dropped_share == pytest.approx(dropped, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("branches", "keep"), [(5, 3), (16, 1), (4, 4)])
def test_a_gated_mlp(layer, branches, keep):
    model = tiny_model()
    mlp = model.model.layers[layer].mlp
    gate, up, down = (
        getattr(mlp, name).weight.detach().double()
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    x = mlp_input(mlp, model, IDS)
    h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    spec = ConversionSpec(branches=branches, keep=keep, fade=0.9)
    found = contributions(model, layer, spec, IDS)
    assert_agrees(found, branch_outputs(h, down, branches), keep)
    assert found.alpha == pytest.approx((branches / keep) ** 0.5)


def test_a_plain_mlp_whose_bias_belongs_to_no_branch():
    model = build("gpt2")
    mlp = model.transformer.h[1].mlp
    x = mlp_input(mlp, model, IDS)
    h = mlp.act(x @ mlp.c_fc.weight.detach().double() + mlp.c_fc.bias.detach().double())
    outputs = branch_outputs(h, mlp.c_proj.weight.detach().double().T, 6)
    spec = ConversionSpec(branches=6, keep=2, compensation="none")
    found = contributions(model, 1, spec, IDS)
    assert_agrees(found, outputs, 2)
    assert found.alpha == 1.0


def test_an_mlp_that_adds_the_residual():
    found = contributions(build("bloom"), 0, ConversionSpec(branches=4), IDS)
    assert found.kept_norm == pytest.approx(1.0, abs=1e-5)
    assert found.split_error < 2e-6


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    contributions(model, 0, ConversionSpec(branches=4), IDS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_and_branches_out_of_range_are_refused():
    model = tiny_model()
    for layer in (-1, LAYERS):
        with pytest.raises(UserError, match=f"between 0 and {LAYERS - 1}"):
            contributions(model, layer, ConversionSpec(), IDS)
    with pytest.raises(UserError, match="neurons"):
        contributions(model, 0, ConversionSpec(branches=49), IDS)
