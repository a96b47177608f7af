"""What the conversion promises about speed and memory, measured against the dense model.

Everything runs on a random model of a known shape, such as that of the paper's small one,
Qwen2.5-0.5B, and is given as a ratio within one run: two machines, or two runs on a busy one, agree
about ratios only. The dense model writes with the compiled kernels that the others have; how much
slower torch alone is stands beside it. On a GPU other sizes count, and other targets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from ...core.conversion import convert, convert_mlp, loop_over_branches
from ...core.kernels import gpu
from ...core.kernels.arrays import allowed
from ...core.mlps import MLPWeights, read_mlps
from ...core.spec import ConversionSpec
from ...core.static.schedule import branch_sparsities
from .bench_plan import (
    FEWER,
    HALF,
    HALF_OF_FEWER,
    HOPED_FOR,
    KEEP,
    ROUTED,
    ROUTED_ON_GPU,
    SHAPES,
    Shape,
    goals,
)  # fmt: skip
from .parameters import parameter_report
from .speed import (
    Ratio,
    decode,
    decoding,
    forward,
    ratio,
    read,
    run_mlps,
    time_in_turn,
    wait,
    with_kernels,
)

BRANCHES = 16
FADE = 0.9
PUBLISHED_LAYERS = 2  # that the published fade is timed on; all layers cost the same
WRITTEN = 64  # tokens per timed generation
READ = 512  # tokens per timed forward pass
READ_ON_GPU = 2048
PATTERN = "2:4"  # zeros that a GPU may leave out
PRODUCTS = 20  # of one matrix, timed together
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchLine:
    """One thing that was measured, and what was hoped for."""

    dtype: str
    what: str
    measured: Ratio  # in `unit`; the quartiles equal the median for what was measured once
    unit: str = "×"  # "×": a ratio, "%": a share, also stored as a ratio; "s": seconds; "GB/s"
    target: float | None = None  # in `unit`
    at_least: bool = False  # whether the target is a lower bound
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the target; None without one."""
        if self.target is None:
            return None
        if self.at_least:
            return self.measured.median >= self.target
        return self.measured.median <= self.target


def machine(device: str = "cpu") -> dict[str, object]:
    """What timings depend on beside the code."""
    features = getattr(torch.cpu, "get_capabilities", dict)()
    known = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": allowed() if device == "cpu" else gpu.allowed(),
        "cpu_features": [name for name in known if features.get(name)],
    } | ({} if device == "cpu" else {"gpu": torch.cuda.get_device_name()})


def bench(
    dtype: torch.dtype = torch.float32,
    shape: Shape = SHAPES["0.5b"],
    rounds: int = 7,
    written: int = WRITTEN,
    report: Callable[[str], None] = lambda message: None,
    device: str = "cpu",
) -> Iterator[BenchLine]:
    """Measure, and yield the lines as they are known; `report` is told what is being timed.

    dtype: of the model. rounds: at least 3, of which median and quartiles are taken. written:
    tokens per timed generation. device: "cpu" or "cuda".
    """
    report("building a random model")
    with torch.device(device):
        model = random_model(dtype, shape)
    for line in bench_model(model, rounds, written, report):
        hoped = shape == HOPED_FOR[device] or not line.what.endswith("to dense")
        yield line if hoped else replace(line, target=None)


def random_model(dtype: torch.dtype, shape: Shape) -> PreTrainedModel:
    """Of Qwen2's kind, with random weights."""
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def bench_model(
    dense: PreTrainedModel,
    rounds: int,
    written: int = WRITTEN,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[BenchLine]:
    """The lines for one model."""
    dtype, device = str(dense.dtype).removeprefix("torch."), dense.device.type
    hoped, tokens = goals(device, dtype), _tokens_read(device)
    fused_spec = ConversionSpec(branches=BRANCHES)
    report("converting")
    yield from _conversion(dense, fused_spec, dtype, rounds)
    report("fading")
    yield _fade(dense, dtype, rounds)
    fused = convert(dense, fused_spec)
    kept = convert(dense, ConversionSpec(branches=BRANCHES, keep=KEEP))
    contestants = [  # with the targets of generation and forward pass
        (f"{BRANCHES} branches fused", fused, (hoped.split_writing, hoped.split_reading)),
        (f"{BRANCHES} branches in a loop", loop_over_branches(fused), (None, None)),
        (f"first {KEEP} of {BRANCHES} branches", kept, (hoped.kept_writing, None)),
    ]
    alike = with_kernels(dense)
    report(f"generation, {rounds} rounds")
    doing = f"generation, {written} tokens"
    yield from _torch_alone(dense, alike, doing, dtype, rounds, written)
    actions = [
        (doing, alike, lambda model: decoding(model, written)),
        (f"forward, {tokens} tokens", dense, lambda model: partial(forward, model, tokens)),
    ]
    for index, (doing, baseline_model, action) in enumerate(actions):
        report(f"{doing}, {rounds} rounds")
        models = [baseline_model, *(model for _, model, _ in contestants)]
        baseline, *others = time_in_turn([action(model) for model in models], rounds)
        for (name, model, targets), seconds in zip(contestants, others, strict=True):
            measured, note = ratio(seconds, baseline), _reads(model, dense) if index == 0 else ""
            what = f"{doing}: {name}, to dense"
            yield BenchLine(dtype, what, measured, target=targets[index], note=note)
    # in groups: each routed model holds its own MLP weights
    for keep, specs in (ROUTED if device == "cpu" else ROUTED_ON_GPU).items():
        report(f"routed, {rounds} rounds")
        yield from _routed(dense, keep, specs, dtype, rounds, written)
    if device == "cuda":
        report(f"{PATTERN} zeros, {rounds} rounds")
        yield from _semi_structured(dense, dtype, rounds)


def _torch_alone(
    dense: PreTrainedModel,
    alike: PreTrainedModel,
    doing: str,
    dtype: str,
    rounds: int,
    written: int,
) -> Iterator[BenchLine]:
    """How fast the dense model reads its weights while it writes, and torch without the kernels."""
    plain = partial(decode, dense, written, compiled=False)
    seconds, slower = time_in_turn([decoding(alike, written), plain], rounds)
    yield BenchLine(dtype, f"{doing}: dense by torch alone, to dense", ratio(slower, seconds))
    gigabytes = written * sum(parameter.nbytes for parameter in dense.parameters()) / 1e9
    for name, times in (("dense", seconds), ("dense by torch alone", slower)):
        read = ratio([gigabytes] * rounds, times)
        yield BenchLine(dtype, f"{doing}: {name}, weights read", read, unit="GB/s")


def _conversion(
    dense: PreTrainedModel, spec: ConversionSpec, dtype: str, rounds: int
) -> Iterator[BenchLine]:
    start = perf_counter()
    converted = convert(dense, spec)
    wait(dense)
    first = perf_counter() - start
    mlp_bytes = sum(
        parameter.nbytes for mlp in read_mlps(dense) for parameter in mlp.module.parameters()
    )
    yield BenchLine(
        dtype,
        f"convert, {BRANCHES} branches, no fade: new memory, of the MLPs'",
        _once(new_bytes(dense, converted) / mlp_bytes),
        unit="%",
        target=0.001,
    )
    yield BenchLine(
        dtype, f"convert, {BRANCHES} branches, no fade: first time", _once(first), unit="s"
    )
    (again,) = time_in_turn([lambda: (convert(dense, spec), wait(dense))], rounds)
    yield BenchLine(
        dtype,
        f"convert, {BRANCHES} branches, no fade: again",
        ratio(again, [1.0] * rounds),
        unit="s",
        note="layers are proved only once",
    )


def _routed(
    dense: PreTrainedModel,
    keep: int,
    specs: Mapping[str, ConversionSpec],
    dtype: str,
    rounds: int,
    written: int,
) -> Iterator[BenchLine]:
    """Routed generation, and how much of the time that the static conversion of the same width
    saves in the same rounds. Where half of the neurons run, reading too."""
    static = convert(dense, ConversionSpec(branches=BRANCHES, keep=keep))
    routed = [convert(dense, spec) for spec in specs.values()]
    doing = f"generation, {written} tokens"
    baseline, ideal, *others = time_in_turn(
        [decoding(model, written) for model in (with_kernels(dense), static, *routed)], rounds
    )
    device = dense.device.type
    hoped = goals(device, dtype)
    could_save = [a - b for a, b in zip(baseline, ideal, strict=True)]
    for (name, spec), model, seconds in zip(specs.items(), routed, others, strict=True):
        measured, note = ratio(seconds, baseline), _reads(model, dense)
        kind = "" if spec.experts is None else ", routed"
        what = f"{doing}: {name}{kind}, to dense"
        yield BenchLine(dtype, what, measured, target=hoped.routed_writing.get(name), note=note)
        if spec.experts is None:
            continue
        saved = [a - b for a, b in zip(baseline, seconds, strict=True)]
        yield BenchLine(
            dtype,
            f"{doing}: {name}, of the ideal gain",
            ratio(saved, could_save),
            unit="%",
            note=f"ideal: first {keep} of {BRANCHES} branches",
        )
    if keep == KEEP:
        fewer = {f"half of {n} experts": replace(HALF, experts=n) for n in FEWER}
        fewer = {name: spec for name, spec in fewer.items() if name not in specs}
        routed += [convert(dense, spec) for spec in fewer.values()]
        yield from _reading(dense, dict(zip((*specs, *fewer), routed, strict=True)), dtype, rounds)


def _reading(
    dense: PreTrainedModel, routed: Mapping[str, PreTrainedModel], dtype: str, rounds: int
) -> Iterator[BenchLine]:
    """A prompt, of which the head reads the last token only, and its MLPs alone."""
    device = dense.device.type
    tokens, hoped = _tokens_read(device), goals(device, dtype)
    for doing, action in ((f"prompt, {tokens} tokens", read), (f"{tokens} tokens, MLPs", run_mlps)):
        models = dense, *routed.values()
        actions = [partial(action, model, tokens) for model in models]
        baseline, *others = time_in_turn(actions, rounds)
        for name, seconds in zip(routed, others, strict=True):
            what = f"{doing}: {name}, routed, to dense"
            target = hoped.routed_reading if name == HALF_OF_FEWER else None
            yield BenchLine(dtype, what, ratio(seconds, baseline), target=target)


def _fade(dense: PreTrainedModel, dtype: str, rounds: int) -> BenchLine:
    mlps = [mlp.weights for mlp in read_mlps(dense)]
    timed = mlps[:PUBLISHED_LAYERS]
    spec = ConversionSpec(branches=BRANCHES, fade=FADE)
    loop, conversion = partial(published_fade, timed, BRANCHES, FADE), partial(convert, dense, spec)
    published, ours = time_in_turn(
        [lambda: (loop(), wait(dense)), lambda: (conversion(), wait(dense))], rounds
    )
    scale = len(mlps) / len(timed)
    return BenchLine(
        dtype,
        f"fade {FADE}, {BRANCHES} branches: published loop, to convert()",
        ratio([scale * seconds for seconds in published], ours),
        target=50,
        at_least=True,
        note=f"loop timed on {len(timed)} of {len(mlps)} layers",
    )


@torch.no_grad()
def _semi_structured(dense: PreTrainedModel, dtype: str, rounds: int) -> Iterator[BenchLine]:
    """One matrix with zeros of which a GPU may leave out half, where it can: 16-bit, and compute
    capability 8.0."""
    if dtype == "float32" or torch.cuda.get_device_capability(dense.device) < (8, 0):
        return
    weights = read_mlps(dense)[0].weights
    up = convert_mlp(weights, ConversionSpec(branches=1, fade_unit=PATTERN)).up_proj.weight.detach()
    x = torch.randn(READ_ON_GPU, up.shape[1], dtype=up.dtype, device=up.device)
    try:
        sparse = torch.sparse.to_sparse_semi_structured(up)
    except RuntimeError as error:  # torch was built without them
        logger.warning("no products with %s zeros: %s", PATTERN, error)
        return

    def multiply(weight: Tensor) -> None:
        for _ in range(PRODUCTS):
            F.linear(x, weight)
        wait(dense)

    seconds, baseline = time_in_turn([partial(multiply, sparse), partial(multiply, up)], rounds)
    yield BenchLine(
        dtype,
        f"one matrix, {READ_ON_GPU} tokens: {PATTERN} zeros left out, to dense",
        ratio(seconds, baseline),
        note="torch's semi-structured tensors; up of the first layer",
    )


@torch.no_grad()
def published_fade(mlps: Sequence[MLPWeights], branches: int, strength: float) -> list[Tensor]:
    """Gate and up of each MLP, faded as the paper prints it: a quantile in float32 per branch."""
    faded = []
    for mlp in mlps:
        for weight in (mlp.gate, mlp.up):
            pieces = []
            sparsities = branch_sparsities(branches, strength)
            for piece, sparsity in zip(weight.tensor_split(branches), sparsities, strict=True):
                if sparsity > 0:
                    magnitude = piece.abs().float()
                    piece = piece * (magnitude > torch.quantile(magnitude, sparsity))
                pieces.append(piece)
            faded.append(torch.cat(pieces))
    return faded


def new_bytes(dense: nn.Module, converted: nn.Module) -> int:
    """Bytes of the tensors of `converted` that are not memory of `dense`."""
    known = _storages(dense)
    return sum(size for place, size in _storages(converted).items() if place not in known)


def _storages(model: nn.Module) -> dict[int, int]:
    """Bytes of each storage, by address."""
    tensors = chain(model.parameters(), model.buffers())
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _tokens_read(device: str) -> int:
    return READ if device == "cpu" else READ_ON_GPU


def _reads(model: PreTrainedModel, dense: PreTrainedModel) -> str:
    """What a token reads of the weights, which is what its time could be."""
    read, all_ = (parameter_report(m, lambda weight: 0).active_per_token for m in (model, dense))
    return f"reads × {read / all_:.2f} of the weights"


def _once(value: float) -> Ratio:
    return Ratio(value, value, value)
