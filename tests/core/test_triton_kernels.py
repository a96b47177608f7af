"""Kernels for a GPU compute what is defined, in float64. Without a GPU triton's interpreter runs
them, and its compiler says whether they could run on one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # by the interpreter, see conftest.py
pytest.importorskip("triton", reason="kernels for a GPU need triton, which comes with torch there")

from mlpmoe.core.conversion import convert_mlp  # noqa: E402
from mlpmoe.core.kernels import gpu, launches  # noqa: E402
from mlpmoe.core.kernels.arrays import ACTIVATIONS  # noqa: E402
from mlpmoe.core.routed import NeuronMLP  # noqa: E402
from mlpmoe.core.spec import ConversionSpec  # noqa: E402
from tests.core.layers import layer_of, random_mlp  # noqa: E402

ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FORMS = ("gated", "gated with biases", "plain", "plain with biases", "gated, filled")
SHAPES = {  # shared neurons, experts, neurons of each, d_model
    "even": (0, 4, 16, 32),
    "odd": (5, 3, 13, 19),
    "76 neurons": (0, 3, 76, 33),
    "wide": (11, 2, 9, 530),
    "one expert": (0, 1, 21, 12),
}


@dataclass
class Neurons:
    """Random ones, as the launches read them."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    idle_mean: Tensor | None
    kind: int

    def h(self, x: Tensor) -> Tensor:
        """(tokens, d_ff) float64, by definition."""
        opened = F.linear(x.double(), self.up.double(), _double(self.up_bias))
        act = ACTIVATIONS[self.kind]
        if self.gate is None:
            opened = act(opened)
        else:
            opened *= act(F.linear(x.double(), self.gate.double(), _double(self.gate_bias)))
        return opened if self.idle_mean is None else opened - self.idle_mean.double()

    def out(self, x: Tensor, runs: Tensor) -> Tensor:
        """(tokens, d_model) float64. runs: (tokens, d_ff) bool."""
        y = torch.where(runs, self.h(x), 0) @ self.down.double()
        return y if self.down_bias is None else y + self.down_bias.double()


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def made(form: str, d_ff: int, d_model: int, dtype: torch.dtype, kind: int = 0) -> Neurons:
    generator = torch.Generator().manual_seed(d_ff + d_model)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 3).to(DEVICE, dtype)

    gated, biases = form.startswith("gated"), form.endswith("biases")
    return Neurons(
        gate=random(d_ff, d_model) if gated else None,
        up=random(d_ff, d_model),
        down=random(d_ff, d_model),
        gate_bias=random(d_ff) if gated and biases else None,
        up_bias=random(d_ff) if biases else None,
        down_bias=random(d_model) if biases else None,
        idle_mean=random(d_ff) if form.endswith("filled") else None,
        kind=kind,
    )


def inputs(tokens: int, d_model: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, d_model, generator=generator).to(DEVICE, dtype)


def choices(tokens: int, experts: int, chosen: int) -> Tensor:
    """(tokens, chosen) int64, in any order."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(chosen))
    return scores.argsort(dim=-1)[:, :chosen].to(DEVICE)


def running(experts: Tensor, shared: int, number: int, size: int, always: bool) -> Tensor:
    """(tokens, d_ff) bool. always: whether shared neurons are among them."""
    runs = torch.zeros(len(experts), number, dtype=torch.bool, device=experts.device)
    runs = runs.scatter(1, experts, True).repeat_interleave(size, 1)
    return F.pad(runs, (shared, 0), value=always)


def off(found: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm())


def one(mlp: Neurons, x: Tensor, experts: Tensor, shared: int, size: int) -> Tensor:
    h = launches.hidden(mlp, mlp.kind, x, experts, shared, size)
    assert h.dtype == torch.float32
    return launches.summed(mlp, h, experts, shared, size, x.dtype)


CASES = [
    *((shape, form, torch.float32) for shape in SHAPES for form in FORMS),
    *((shape, FORMS[1], torch.bfloat16) for shape in SHAPES),
    ("odd", FORMS[1], torch.float16),
]


@pytest.mark.parametrize(("shape", "form", "dtype"), CASES, ids=str)
def test_one_token(shape, form, dtype):
    shared, number, size, d_model = SHAPES[shape]
    mlp = made(form, shared + number * size, d_model, dtype)
    x = inputs(1, d_model, dtype)
    for chosen in {1, max(1, number - 1), number}:
        experts = choices(1, number, chosen)
        found = one(mlp, x, experts[0], shared, size)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        expected = mlp.out(x, running(experts, shared, number, size, True))
        assert off(found, expected) < ERROR[dtype]
        assert torch.equal(found, one(mlp, x, experts[0], shared, size))


@pytest.mark.parametrize(("shape", "form", "dtype"), CASES, ids=str)
def test_many_tokens(shape, form, dtype):
    shared, number, size, d_model = SHAPES[shape]
    mlp = made(form, shared + number * size, d_model, dtype)
    x, base = inputs(37, d_model, dtype), inputs(37, d_model, dtype)
    chosen = max(1, number - 1)
    experts = choices(37, number, chosen)
    expected = mlp.out(x, running(experts, shared, number, size, False))
    for more in (None, base):
        found = launches.grouped(mlp, mlp.kind, x, experts, shared, size, more)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        assert off(found, expected if more is None else expected + more) < ERROR[dtype]


def test_many_tokens_give_the_same_again():
    mlp, x = made("gated", 24, 12, torch.float32), inputs(37, 12, torch.float32)
    once, again = (launches.grouped(mlp, 0, x, choices(37, 3, 2), 0, 8, x) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
def test_activations(kind):
    mlp, x = made("gated", 24, 12, torch.float32, kind), 4 * inputs(20, 12, torch.float32)
    experts = choices(20, 3, 2)
    expected = mlp.out(x, running(experts, 0, 3, 8, True))
    assert off(launches.grouped(mlp, kind, x, experts, 0, 8, None), expected) < 1e-5
    assert off(one(mlp, x[:1], experts[0], 0, 8), expected[:1]) < 1e-5


def test_what_is_not_a_number_stays_so():
    for kind in range(len(ACTIVATIONS)):
        mlp, x = made("gated", 24, 12, torch.float32, kind), inputs(3, 12, torch.float32)
        x[1, 4] = torch.nan
        experts = choices(3, 3, 2)
        found = launches.grouped(mlp, kind, x, experts, 0, 8, None)
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert one(mlp, x[1:2], experts[1], 0, 8).isnan().all()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_single_neurons_whose_gate_is_known(form, dtype):
    mlp, x = made(form, 39, 19, dtype), inputs(1, 19, dtype)
    rows = torch.tensor([38, 0, 7, 21, 20], device=DEVICE)
    runs = torch.zeros(1, 39, dtype=torch.bool, device=DEVICE).index_fill(1, rows, True)
    gated = None
    if mlp.gate is not None:
        gated = ACTIVATIONS[mlp.kind](F.linear(x, mlp.gate, mlp.gate_bias))
    h = launches.hidden(mlp, mlp.kind, x, rows, 0, 1, gated)
    found = launches.summed(mlp, h, rows, 0, 1, dtype)
    assert off(h[None], mlp.h(x)[:, rows]) < ERROR[dtype]
    assert off(found, mlp.out(x, runs)) < ERROR[dtype]


@given(st.data())
def test_blocks_hold_every_pair_once(data):
    number = data.draw(st.integers(1, 9))
    chosen = data.draw(st.integers(1, number))
    block = data.draw(st.sampled_from([1, 4, 16]))
    order = st.permutations(range(number)).map(lambda order: order[:chosen])
    experts = torch.tensor(data.draw(st.lists(order, min_size=1, max_size=30)))
    pairs, owners, starts, stops = launches._blocks(experts, number, block)
    seen = []
    for owner, start, stop in zip(owners.tolist(), starts.tolist(), stops.tolist(), strict=True):
        if owner < number:
            assert 0 < stop - start <= block
            found = pairs[start:stop]
            assert (experts.flatten()[found] == owner).all()
            seen += found.tolist()
    assert sorted(seen) == list(range(experts.numel()))


def test_columns_in_several_goes(monkeypatch):
    mlp, x = made("gated with biases", 24, 300, torch.float32), inputs(9, 300, torch.float32)
    experts = choices(9, 3, 2)
    whole = launches.grouped(mlp, 0, x, experts, 0, 8, x)
    monkeypatch.setattr(launches, "PARTIAL_BYTES", 1)
    assert torch.equal(launches.grouped(mlp, 0, x, experts, 0, 8, x), whole)


def test_views_are_read_in_place():
    """Rows of a wider matrix, such as a part of a fused one."""
    mlp, x = made("gated", 24, 12, torch.float32), inputs(5, 12, torch.float32)
    experts = choices(5, 3, 2)
    plain = launches.grouped(mlp, 0, x, experts, 0, 8, None), one(mlp, x[:1], experts[0], 0, 8)
    for name in ("gate", "up", "down"):
        setattr(mlp, name, F.pad(getattr(mlp, name), (0, 7), value=torch.nan)[:, :12])
    assert torch.equal(launches.grouped(mlp, 0, x, experts, 0, 8, None), plain[0])
    assert torch.equal(one(mlp, x[:1], experts[0], 0, 8), plain[1])


COMPILED = """
import itertools, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mlpmoe.core.kernels import triton_kernels

TYPED = {"x", "gate", "up", "down", "gate_bias", "up_bias", "idle_mean", "gated", "base", "bias"}
FLOATS, LONGS = {"parts"}, {"pairs", "owners", "starts", "stops"}
BLOCKS = {
    "some_hidden": dict(KIND=0, ROWS=8, COLUMNS=512, gated=None),
    "some_summed": dict(ROWS=32, COLUMNS=128),
    "add_parts": dict(COLUMNS=128),
    "grouped_hidden": dict(KIND=1, WIDEN=False, TOKENS=128, NEURONS=64),
    "grouped_parts": dict(WIDEN=False, TOKENS=128, COLUMNS=128),
}
for (name, fixed), (dtype, capability) in itertools.product(
    BLOCKS.items(), (("fp32", 80), ("bf16", 90))
):
    grouped, kernel = name.startswith("grouped"), getattr(triton_kernels, name)
    if grouped:
        fixed = fixed | {"DEPTH": 32 if dtype == "fp32" else 64}
    types = {}
    for param in kernel.params:
        typed = param.name in TYPED | {"out"} | ({"h"} if grouped else set())
        floats = param.name in FLOATS | {"h"}
        longs = param.name in LONGS or (param.name == "experts" and not grouped)
        types[param.name] = (
            "constexpr" if param.name in fixed else "*" + dtype if typed else
            "*fp32" if floats else "*i64" if longs else "i32"
        )
    even = [type[0] == "*" or each.endswith("_step") for each, type in types.items()]
    divisible = {(n,): [["tt.divisibility", 16]] for n, each in enumerate(even) if each}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 8 if grouped else 4}
    built = compile(ASTSource(kernel, types, fixed, divisible), target, options)
    assert built.asm["cubin"] and built.metadata.shared <= 99 * 1024, built.metadata
    print(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")
def test_they_compile_for_two_generations_of_gpus(tmp_path):
    """Which needs none of them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 10


# modules

ROUTED = {
    "half of the experts": {"method": "contiguous", "experts": 4, "active": 0.5},
    "some shared": {"method": "random", "experts": 6, "shared": 0.34, "active": 0.6},
    "filled": {"method": "contiguous", "experts": 4, "active": 0.5, "compensation": "mean"},
    "another router": {"method": "cmoe", "experts": 6, "active": 0.6},
    "neurons": {"method": "neurons", "active": 0.4},
    "neurons, filled": {"method": "neurons", "active": 0.4, "compensation": "mean"},
}


def module_of(made: str, kind: str, dtype: torch.dtype = torch.float32, d_ff: int = 39):
    layer = layer_of(random_mlp(kind, d_ff, 19, dtype))
    return convert_mlp(layer.weights, ConversionSpec(**ROUTED[made]), layer).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated", "plain with biases"])
@pytest.mark.parametrize("made", ROUTED)
def test_modules(made, kind):
    module = module_of(made, kind)
    exact = copy.deepcopy(module).double()
    for tokens in (1, 9):
        kernel = module.kernel(tokens)
        if tokens > 1 and isinstance(module, NeuronMLP):
            assert kernel is None
            continue
        x = inputs(tokens, 19, torch.float32)
        assert off(kernel(x), exact.many(x.double())) < 1e-5


@torch.no_grad()
def test_modules_without_kernels():
    weights = random_mlp("gated", 24, 12)
    layer = layer_of(weights)
    for spec in (
        ConversionSpec(method="contiguous", experts=4, active=1.0),
        ConversionSpec(method="inputs", active=0.5),
        ConversionSpec(method="coactivation", experts=4, active=0.5, selection="threshold"),
        ConversionSpec(method="neurons", active=0.5, selection="threshold"),
    ):
        module = convert_mlp(weights, spec, layer)
        assert module.kernel(1) is None
        assert module.kernel(9) is None
    spec = ConversionSpec(method="neurons", active=0.5)
    assert convert_mlp(replace(weights, activation=torch.tanh), spec).kernel(1) is None


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU passes for one; nothing was tried before. A list of what was timed."""
    timed = []
    monkeypatch.setattr(gpu, "_pays", {})
    monkeypatch.setattr(gpu, "_readable", lambda module, x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(gpu, "is_faster", lambda quick, plain, seconds: timed.append(1) or True)
    monkeypatch.setattr(gpu, "_said", set())
    return timed


@torch.no_grad()
def test_the_choice_is_made_once_per_shape(on_gpu, monkeypatch):
    module = module_of("half of the experts", "gated")
    ran = []

    def kernel(tokens):
        return lambda x: ran.append(len(x)) or module.many(x)

    monkeypatch.setattr(module, "kernel", kernel)
    for tokens in (1, 1, 5, 6, 8, 9):
        gpu.run(module, inputs(tokens, 19, torch.float32), module.many)
    assert len(on_gpu) == 3  # 1; 5 to 8; 9 to 16
    assert ran == [1, 1, 1, 5, 5, 6, 8, 9, 9]
    monkeypatch.setattr(gpu, "_pays", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.run(module, inputs(1, 19, torch.float32), module.many)
    assert len(on_gpu) == 3
    with torch.enable_grad():
        gpu.run(module, inputs(1, 19, torch.float32), module.many)
    assert len(ran) == 9


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["disagrees", "does not work"])
def test_a_kernel_that_is_wrong_leaves_it_to_torch(on_gpu, monkeypatch, caplog, wrong):
    module = module_of("half of the experts", "gated")

    def kernel(x):
        if wrong == "disagrees":
            return 1.01 * module.many(x)
        raise RuntimeError("out of resources")

    monkeypatch.setattr(module, "kernel", lambda tokens: kernel)
    for tokens in (1, 1, 5, 9):
        x = inputs(tokens, 19, torch.float32)
        assert torch.equal(gpu.run(module, x, module.many), module.many(x))
    assert not on_gpu
    assert [wrong in record.message for record in caplog.records] == [True]


def test_what_a_kernel_reads(monkeypatch):
    module = module_of("half of the experts", "gated")
    x = inputs(3, 19, torch.float32)
    assert gpu._readable(module, x) is (DEVICE == "cuda")
    monkeypatch.setenv("MLPMOE_KERNELS", "plain")
    assert not gpu._readable(module, x)


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("made", ROUTED)
def test_modules_on_a_gpu(made, dtype, monkeypatch):
    """With the kernels and without."""
    module = module_of(made, "gated with biases", dtype, d_ff=304)
    for faster in (True, False):
        monkeypatch.setattr(gpu, "_pays", {})
        monkeypatch.setattr(gpu, "is_faster", lambda *_, faster=faster: faster)
        for tokens in (1, 2, 100):
            x = inputs(tokens, 19, dtype)
            found = module(x)
            assert list(gpu._pays.values()) == [faster] * len(gpu._pays)
            assert off(found, module.many(x)) < 3 * ERROR[dtype]


@needs_gpu
@torch.inference_mode()
def test_timing_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "_pays", {})
    module = module_of("half of the experts", "gated", torch.bfloat16)
    for tokens in (1, 9):
        module(inputs(tokens, 19, torch.bfloat16))
    assert len(gpu._pays) == 2
