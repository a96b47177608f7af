"""Drift of the hidden states, against what transformers itself puts out."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from torch import nn

from mlpmoe import ConversionSpec, convert
from mlpmoe.core.mlps import decoder_layers
from mlpmoe.core.static.branched import BranchedMLP
from mlpmoe.measure.quality.drift import drift
from tests.families import FAMILIES, LAYERS, VOCABULARY, build
from tests.tiny import tiny_model

IDS = torch.randint(2, VOCABULARY, (24,), generator=torch.Generator().manual_seed(0))
HALF = ConversionSpec(branches=4, keep=2)
ROUTED = ConversionSpec(method="contiguous", experts=4, active=0.5)


def hidden(model, ids):
    """States after all layers: from transformers, but for the last, whose entry has the final
    norm applied; that one is what goes into the norm, the last of the decoder's own modules."""
    inputs = []
    for module in model.get_decoder().children():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    assert inputs[-1].shape == states[-1].shape
    return [state[0].double() for state in (*states[1:-1], inputs[-1])]


@pytest.mark.parametrize("spec", [HALF, ROUTED], ids=["static", "routed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_that_of_the_hidden_states(family, spec):
    dense = build(family)
    converted = convert(dense, spec)
    found = drift(dense, converted, IDS)
    assert [one.layer for one in found] == list(range(LAYERS))
    for one, before, after in zip(found, hidden(dense, IDS), hidden(converted, IDS), strict=True):
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        ratios = [float(b.norm() / a.norm()) for a, b in zip(before, after, strict=True)]
        error = float((after - before).norm() / before.norm())
        assert one.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert one.norm == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
        assert one.error == pytest.approx(error, rel=1e-4)
    assert found[-1].error > 0.01


@pytest.mark.parametrize("spec", [ConversionSpec(branches=7), ConversionSpec(
    method="contiguous", experts=4, active=1.0)], ids=ConversionSpec.to_query)  # fmt: skip
def test_what_removes_nothing_does_not_drift(spec):
    model = tiny_model()
    for one in drift(model, convert(model, spec), IDS):
        assert one.cosine == pytest.approx(1, abs=1e-6)
        assert one.norm == pytest.approx(1, abs=1e-5)
        assert one.error < 1e-4


def test_no_hook_stays_behind():
    model = tiny_model()
    other = convert(model, HALF)
    drift(model, other, IDS)
    with pytest.raises(IndexError):
        drift(model, other, torch.tensor([10**6]))  # no such token
    for one in (model, other):
        assert not any(layer._forward_hooks for layer in decoder_layers(one)[1])


def test_models_that_run_elsewhere_do_not_disturb():
    model = tiny_model()
    other = convert(model, HALF)
    expected = drift(model, other, IDS)
    runs = []

    def elsewhere(*_):  # as another thread might, while drift has its hooks on
        if len(runs) < 2:
            runs.append(len(runs))
            model(IDS[None] + 1)
            other(IDS[None] + 1)

    handle = model.model.embed_tokens.register_forward_hook(elsewhere)
    found = drift(model, other, IDS)
    handle.remove()
    assert runs == [0, 1]
    assert found == expected


def test_a_broken_model_drifts_undefined():
    model = tiny_model()
    other = convert(model, HALF)
    with torch.no_grad():  # the new factors are its own, the weights are shared
        for module in other.modules():
            if isinstance(module, BranchedMLP):
                module.alpha.fill_(float("nan"))
    for one in drift(model, other, IDS):
        assert isnan(one.cosine)
        assert isnan(one.norm)
        assert isnan(one.error)
