"""The paper's tables against what else is known of them, and what their rows are made of."""

from contextlib import contextmanager

import pytest
import torch

from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.static.branched import LoopedMLP
from mlpmoe.measure.cost import speed
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.cost.speed import LEAST_ROUNDS
from mlpmoe.measure.runs import paper
from mlpmoe.measure.runs.paper import (
    ASKED,
    DENSE,
    FADED,
    TABLES,
    VARIANTS,
    WRITTEN,
    generation_rounds,
    published_table,
)
from mlpmoe.models import find_entry
from tests.tiny import tiny_model

SMALL, LARGE = TABLES
# What follows from the printed figures and the models' shapes, worked out by hand elsewhere:
# layers, zeros, zeros without the weights that equal a threshold, percent of MLPs and of all,
# times of all 16 and of fade to dense, and perplexity of fade to dense in percent.
FACTS = {
    SMALL.key: (24, 88_429_132, 88_252_416, 28.18, 17.9, 1.26, 1.25, 13),
    LARGE.key: (32, 1_588_852_420, 1_585_446_912, 28.19, 19.8, 1.27, 1.44, 2.3),
}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_the_published_figures_fit_each_other(table):
    layers, zeros, asked, of_mlps, of_all, all_time, fade_time, worse = FACTS[table.key]
    dense, whole, faded = table.rows
    assert [row.variant for row in table.rows] == [DENSE, *VARIANTS]
    assert dense.total == dense.nonzero == find_entry(table.key).parameters
    assert whole.total - dense.total == faded.total - dense.total == 16 * layers
    assert whole.nonzero == whole.total
    assert faded.total - faded.nonzero == zeros
    assert ASKED * table.mlp_weights * 2 / 3 == pytest.approx(asked, abs=0.5)
    assert 100 * table.zeros.mlps == pytest.approx(of_mlps, abs=0.005)
    assert 100 * table.zeros.whole == pytest.approx(of_all, abs=0.05)
    assert table.zeros.faded == pytest.approx(zeros / asked * ASKED)
    assert whole.seconds / dense.seconds == pytest.approx(all_time, abs=0.005)
    assert faded.seconds / dense.seconds == pytest.approx(fade_time, abs=0.005)
    assert abs(whole.perplexity / dense.perplexity - 1) < 0.0005  # as the abstract has it
    assert 100 * (faded.perplexity / dense.perplexity - 1) == pytest.approx(worse, abs=0.1)


def test_only_the_paper_s_models_have_a_table():
    assert published_table(LARGE.key) is LARGE
    assert published_table("smollm2-135m") is None


def printed_zeros(model, branches=16, strength=0.9):
    """Zeros that the code in the paper makes, counted in copies of gate and up."""
    zeros = 0
    for layer in model.model.layers:
        for matrix in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            for i, branch in enumerate(matrix.detach().clone().tensor_split(branches)):
                size = branch.abs().float()
                if i:
                    branch.mul_(size > torch.quantile(size, strength * i / branches))
                zeros += int((branch == 0).sum())
    return zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_variants_have_the_parameters_that_the_paper_s_code_leaves(dtype):
    dense = tiny_model().to(dtype)
    assert all((p != 0).all() for p in dense.parameters())
    total = sum(p.numel() for p in dense.parameters())
    alphas = 16 * len(dense.model.layers)
    whole, faded = (parameter_report(convert(dense, spec)) for spec in VARIANTS.values())
    assert (whole.total, whole.nonzero) == (total + alphas, total + alphas)
    assert (faded.total, faded.nonzero) == (total + alphas, total + alphas - printed_zeros(dense))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until something is decoded: two seconds a token by a loop over
    16 branches, one by anything else."""

    class Clock:
        now = 0.0
        looped = 0

    def decode(model, tokens, compiled):
        assert tokens == WRITTEN
        mlp = mlp_modules(model)[0]
        loops = isinstance(mlp, LoopedMLP) and len(mlp.downs) == 16
        Clock.looped += loops
        Clock.now += tokens * (2.0 if loops else 1.0)

    monkeypatch.setattr(speed, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(paper, "decode", decode)
    return Clock


def test_the_loop_and_the_fused_form_are_timed_against_dense_in_the_same_rounds(clock):
    dense = tiny_model()

    @contextmanager
    def turn():
        clock.now += 100  # others are computing
        yield

    steps = list(generation_rounds(dense, convert(dense, VARIANTS[FADED]), 5, turn))
    assert steps[: LEAST_ROUNDS - 1] == [None] * (LEAST_ROUNDS - 1)
    assert [step.rounds for step in steps[LEAST_ROUNDS - 1 :]] == [3, 4, 5]
    assert clock.looped == 6  # once to warm up
    last = steps[-1]
    assert last.dense == WRITTEN
    assert last.loop.low == last.loop.median == last.loop.high == 2.0
    assert last.fused.median == 1.0
