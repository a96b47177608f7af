"""Drift of the hidden states, against what transformers itself puts out."""

from __future__ import annotations

import pytest
import torch

from mlpmoe import ConversionSpec, convert
from mlpmoe.core.mlps import decoder_layers
from mlpmoe.measure.drift import drift
from tests.families import FAMILIES, LAYERS, VOCABULARY, build
from tests.tiny import tiny_model

IDS = torch.randint(2, VOCABULARY, (24,), generator=torch.Generator().manual_seed(0))
HALF = ConversionSpec(branches=4, keep=2)


def hidden(model, ids):
    """States after all layers but the last, whose entry has the final norm applied."""
    with torch.inference_mode():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    return [state[0].double() for state in states[1:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_that_of_the_hidden_states(family):
    dense = build(family)
    converted = convert(dense, HALF)
    found = drift(dense, converted, IDS)
    assert [one.layer for one in found] == list(range(LAYERS))
    for one, before, after in zip(found, hidden(dense, IDS), hidden(converted, IDS), strict=False):
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
