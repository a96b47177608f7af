"""The benchmark measures what it says; how fast that is depends on the machine."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.mlps import read_mlps
from mlpmoe.core.routed import InputMLP, NeuronMLP, RoutedMLP
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from mlpmoe.measure.cost import bench
from mlpmoe.measure.cost.bench import BenchLine, bench_model, machine, new_bytes, published_fade
from mlpmoe.measure.cost.speed import Ratio
from tests.tiny import D_FF, D_MODEL, LAYERS, tiny_model


def test_the_shape_is_that_of_the_papers_model():
    with torch.device("meta"):
        model = bench.random_model(torch.bfloat16, bench.SHAPES["0.5b"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 494_032_768
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    mlps = [parameter for name, parameter in model.named_parameters() if ".mlp." in name]
    assert sum(parameter.numel() for parameter in mlps) == 24 * 3 * 896 * 4864


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_loop_and_the_conversion_zero_the_same_weights(dtype):
    model = tiny_model().to(dtype)
    converted = convert(model, ConversionSpec(branches=5, fade=0.9))
    published = published_fade([mlp.weights for mlp in read_mlps(model)], 5, 0.9)
    ours = [
        weight
        for mlp in mlp_modules(converted)
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight)
    ]
    assert len(published) == 2 * LAYERS
    for theirs, mine in zip(published, ours, strict=True):
        assert torch.equal(theirs, mine)


def test_new_bytes():
    dense = tiny_model()
    assert new_bytes(dense, dense) == 0
    split = new_bytes(dense, convert(dense, ConversionSpec(branches=6)))
    alphas, indices = LAYERS * 6 * 4, D_FF * 8
    assert alphas <= split <= alphas + LAYERS * indices
    faded = new_bytes(dense, convert(dense, ConversionSpec(branches=6, fade=0.5)))
    assert faded == split + LAYERS * 2 * D_MODEL * D_FF * 4


@pytest.mark.parametrize(
    ("median", "target", "at_least", "met"),
    [
        (1.04, 1.05, False, True),
        (1.06, 1.05, False, False),
        (51, 50, True, True),
        (49, 50, True, False),
        (49, None, False, None),
    ],
)
def test_targets(median, target, at_least, met):
    line = BenchLine("float32", "x", Ratio(median, 0, 99), target=target, at_least=at_least)
    assert line.met is met


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench, "READ", 8)


def test_all_lines_on_a_tiny_model(short):
    doing = []
    lines = list(bench_model(tiny_model(), rounds=3, written=2, report=doing.append))
    assert doing
    whats = [line.what for line in lines]
    assert len(set(whats)) == len(whats) == 25
    for words in (
        "new memory",
        "fade 0.9",
        "16 branches fused",
        "in a loop",
        "first 8 of 16",
        "half of 64 experts, routed",
        "a quarter of 64 experts, routed",
        "a quarter of the neurons by their gate",
        "a quarter of all inputs",
    ):
        assert any(words in what for what in whats)
    for line in lines:
        low, median, high = (getattr(line.measured, name) for name in ("low", "median", "high"))
        assert -math.inf < low <= median <= high < math.inf
        assert low > 0 or "ideal gain" in line.what  # a tiny model may lose where it should gain
        assert line.dtype == "float32"
    json.dumps([asdict(line) for line in lines], allow_nan=False)


def test_routed_lines_compare_with_dense_and_the_static_conversion(short, monkeypatch):
    """Seconds are made up; what is timed is looked at."""
    seconds = {  # by what a model is: three rounds
        "dense": [10.0, 10.0, 20.0],
        "first 8": [6.0, 8.0, 12.0],
        "first 4": [5.0, 5.0, 10.0],
        "half": [8.0, 8.0, 14.0],  # of the ideal gain: 1/2, 1, 3/4
        "quarter": [6.0, 5.0, 12.0],  # 4/5, 1, 4/5
        "neurons": [7.0, 9.0, 14.0],
        "inputs": [6.0, 4.0, 12.0],
        "of fewer": [7.0, 9.0, 14.0],
        "of few": [6.0, 5.0, 12.0],
    }
    timed = []

    def name_of(model):
        mlp = mlp_modules(model)[0]
        if isinstance(mlp, NeuronMLP):
            assert mlp.active == D_FF // 4
            return "neurons"
        if isinstance(mlp, InputMLP):
            assert mlp.active == (D_MODEL // 4, D_FF // 4, D_FF // 4)
            return "inputs"
        if isinstance(mlp, RoutedMLP):
            assert (mlp.shared, mlp.experts * mlp.size) == (0, D_FF)
            if mlp.experts < 48:  # 64 do not divide 48, and 32 do not
                return {24: "of fewer", 16: "of few"}[mlp.experts]
            return {24: "half", 12: "quarter"}[mlp.active]
        if isinstance(mlp, BranchedMLP):
            return f"first {len(mlp.alpha)}"
        return "dense"

    def time_in_turn(actions, rounds):
        assert rounds == 3
        names = [(action.func.__name__, name_of(action.args[0])) for action in actions]
        timed.append(names)
        return [seconds[name] for _, name in names]

    monkeypatch.setattr(bench, "time_in_turn", time_in_turn)
    model = tiny_model()
    groups = [bench._routed(model, k, s, "float32", 3, 2) for k, s in bench.ROUTED.items()]
    lines = {line.what: line for group in groups for line in group}
    assert timed == [
        [("decode", "dense"), ("decode", "first 8"), ("decode", "half")],
        [("read", name) for name in ("dense", "half", "of fewer", "of few")],
        [("run_mlps", name) for name in ("dense", "half", "of fewer", "of few")],
        [("decode", name) for name in ("dense", "first 4", "quarter", "neurons", "inputs")],
    ]
    medians = {what: (line.measured.median, line.unit) for what, line in lines.items()}
    writing, reading = "generation, 2 tokens: ", "prompt, 8 tokens: "
    mlps = "8 tokens, MLPs: "
    assert medians == {
        f"{writing}half of 64 experts, routed, to dense": (0.8, "×"),
        f"{writing}half of 64 experts, of the ideal gain": (0.75, "%"),
        f"{reading}half of 64 experts, routed, to dense": (0.8, "×"),
        f"{reading}half of 32 experts, routed, to dense": (0.7, "×"),
        f"{reading}half of 16 experts, routed, to dense": (0.6, "×"),
        f"{mlps}half of 64 experts, routed, to dense": (0.8, "×"),
        f"{mlps}half of 32 experts, routed, to dense": (0.7, "×"),
        f"{mlps}half of 16 experts, routed, to dense": (0.6, "×"),
        f"{writing}a quarter of 64 experts, routed, to dense": (0.6, "×"),
        f"{writing}a quarter of 64 experts, of the ideal gain": (0.8, "%"),
        f"{writing}a quarter of the neurons by their gate, to dense": (0.7, "×"),
        f"{writing}a quarter of all inputs, to dense": (0.6, "×"),
    }
    share = lines[f"{writing}half of 64 experts, of the ideal gain"].measured
    assert (share.low, share.high) == (0.5, 1.0)  # quartiles of three values
    assert [line.target for line in lines.values()] == [
        0.8, None, None, 0.7, None, None, 0.7, None, 0.66, None, 0.85, None,
    ]  # fmt: skip


def test_the_machine_is_described():
    described = machine()
    assert described["threads"] == torch.get_num_threads()
    assert described["torch"] == torch.__version__
    json.dumps(described, allow_nan=False)
