"""What fades of 16-bit weights leave, counted without making them, is what the made ones hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmoe import ConversionSpec, convert, magnitudes, parameter_report
from mlpmoe.core.mlps import read_mlps
from mlpmoe.explorer.server.structure import Structure
from mlpmoe.measure.cost.magnitudes import branch_weights, branched_mlps
from tests.tiny import tiny_model

SPECS = [
    ConversionSpec(branches=6, fade=0.9),
    ConversionSpec(branches=5, fade=2.0, keep=3, fade_projections="gate-up-down"),
    ConversionSpec(
        branches=7, fade=0.6, order="norm", fade_schedule="uniform", fade_projections="up-down",
        keep=6, compensation="none",
    ),
    ConversionSpec(branches=48, fade=0.3, order="random", seed=3),
    ConversionSpec(branches=6, fade=0.9, order="norm", keep=4, spared="1"),
]  # fmt: skip


def model(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    if kind == "llama":
        return tiny_model().to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_inner=48)
        return GPT2LMHeadModel(config).to(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_counted_is_made(kind, dtype, spec):
    dense, made = model(kind, dtype), []

    def converted(asked: ConversionSpec) -> torch.nn.Module:
        made.append(asked)
        return convert(dense, asked)

    structure, faded = Structure(dense, read_mlps(dense), converted), convert(dense, spec)
    assert structure.report(spec) == parameter_report(faded)
    sums = []
    whole = convert(dense, replace(spec, fade=0, fade_schedule="linear", keep=None))
    names = branched_mlps(faded)[0].projections
    for some, all_ in zip(branched_mlps(faded), branched_mlps(whole), strict=True):
        sums.append([
            sum(
                float((w != 0).sum())
                for name in names
                for w in branch_weights(mlp, name)[branch : branch + 1]
            )
            for mlp in (some, all_)
            for branch in range(spec.branches)
        ])  # fmt: skip
    stays, were = torch.tensor(sums, dtype=torch.float64).chunk(2, dim=1)
    torch.testing.assert_close(structure.left(spec), stays / were)
    for name in names:
        found = structure.histogram(spec, 1, name, 20, 0.5)
        wanted = magnitudes(faded, 1, name, 20, 0.5)
        assert torch.equal(found.counts, wanted.counts)
        assert found.zeros.tolist() == wanted.zeros.tolist()
        assert torch.equal(found.edges, wanted.edges)
        assert found.thresholds == wanted.thresholds
    assert made and not any(asked.fades for asked in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_no_magnitude_decides_is_made(dtype):
    """Without a calibration text as with one."""
    dense = tiny_model().to(dtype)
    spec = ConversionSpec(branches=6, fade=0.9, fade_score="relative", keep=5)
    structure = Structure(dense, read_mlps(dense), lambda asked: convert(dense, asked))
    faded = convert(dense, spec)
    assert structure.unfaded(spec) == spec
    assert structure.report(spec) == parameter_report(faded)
    found, wanted = (
        structure.histogram(spec, 1, "gate", 20, 0.5), magnitudes(faded, 1, "gate", 20, 0.5)
    )  # fmt: skip
    assert torch.equal(found.counts, wanted.counts)
    assert found.zeros.tolist() == wanted.zeros.tolist()
    assert found.thresholds == wanted.thresholds and not any(found.thresholds)
    weights = [m.projections[n].weight for m in branched_mlps(faded) for n in ("gate", "up")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert structure.zeros(spec).realised == pytest.approx(zeros)
