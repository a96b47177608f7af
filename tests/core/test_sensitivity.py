"""How the loss depends on what an MLP says, against differences of the model's own answers."""

from __future__ import annotations

import pytest
import torch

from mlpmoe.core import sensitivity
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.sensitivity import sensitivities
from tests.families import VOCABULARY, build

SAMPLES, LENGTH = 3, 5
STEP = 1e-3


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(3)
    return Calibration(torch.randint(2, VOCABULARY, (SAMPLES, LENGTH), generator=generator))


@torch.no_grad()
def log_probabilities(model, ids):
    """(samples, tokens, vocabulary): of the next token."""
    return model(ids).logits.double().log_softmax(-1)


def information(model, module, ids, direction):
    """Fisher information of the next tokens about a push of the module's output that way, in the
    mean over the tokens that are pushed: Σ p (∂ log p)² over all next tokens, by differences."""
    probabilities, found = log_probabilities(model, ids).exp(), []
    for token in range(LENGTH):
        ends = []
        for sign in (STEP, -STEP):

            def push(_, __, said, token=token, sign=sign):
                said = said.clone()
                said.view(SAMPLES, LENGTH, -1)[:, token] += sign * direction
                return said

            hook = module.register_forward_hook(push)
            ends.append(log_probabilities(model, ids))
            hook.remove()
        slopes = (ends[0] - ends[1]) / (2 * STEP)
        found.append((probabilities * slopes.square()).sum((1, 2)).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_it_is_the_fisher_information(name, text):
    """In the mean over what is drawn: the same samples many times."""
    model = build(name).double()
    mlps = read_mlps(model)
    found = sensitivities(model, mlps, Calibration(text.samples.repeat(400, 1)))
    assert len(found) == len(mlps)
    generator = torch.Generator().manual_seed(0)
    for mlp, matrix in zip(mlps, found, strict=True):
        assert matrix.dtype == torch.float64
        assert torch.equal(matrix, matrix.T)
        for _ in range(3):
            direction = torch.randn(mlp.weights.d_model, generator=generator).double()
            expected = information(model, mlp.module, text.samples, direction)
            assert float(direction @ matrix @ direction) == pytest.approx(expected, rel=0.1)


def test_the_model_is_left_as_it_was(text):
    model = build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        sensitivities(model, read_mlps(model), text)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_change_nothing_and_only_the_beginning_is_read(text, monkeypatch):
    model = build("llama")
    mlps = read_mlps(model)
    whole = sensitivities(model, mlps, text)
    monkeypatch.setattr(sensitivity, "BATCH", 1)
    for one, other in zip(whole, sensitivities(model, mlps, text), strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(sensitivity, "TOKENS", 2 * LENGTH)
    beginning = sensitivities(model, mlps, Calibration(text.samples[:2]))
    for one, other in zip(sensitivities(model, mlps, text), beginning, strict=True):
        torch.testing.assert_close(one, other)
