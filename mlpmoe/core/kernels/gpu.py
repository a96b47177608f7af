"""MLP modules on a GPU: kernels by triton, where they agree with torch and were faster when tried.

Both is tried once per kind of module, shape, dtype and number of tokens, up to a power of two, and
then stays so: a text has the same perplexity as long as the process lives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from threading import RLock
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn

from .arrays import kind_of, switched_on
from .choice import is_faster
from .one_token import Rows

Run = Callable[[Tensor], Tensor]  # (tokens, d_model) -> (tokens, d_model)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the output's norm
PAUSE = 10_000_000  # clock cycles, some milliseconds: enough to queue the launches of one token
logger = logging.getLogger(__name__)
_pays: dict[tuple, bool] = {}
_said: set[str] = set()
_alone = RLock()


class Launched(Protocol):
    """A module that knows its kernels for a GPU."""

    def kernel(self, tokens: int) -> Run | None: ...


class Experts(Rows, Protocol):
    """An MLP of shared neurons and experts, of which each token chooses so many."""

    shared: int
    size: int

    def chosen(self, x: Tensor) -> Tensor: ...  # (tokens, d_model) -> (tokens, k) int64

    def always(self, x: Tensor) -> Tensor: ...  # what the shared ones add, (tokens, d_model)


class Single(Rows, Protocol):
    """An MLP whose gate chooses single neurons, always so many."""

    def gated(self, x: Tensor) -> Tensor: ...  # (tokens, d_model) -> (tokens, d_ff)

    def chosen(self, gated: Tensor) -> Tensor: ...  # (tokens, d_ff) -> (tokens, k) int64


@cache
def installed() -> bool:
    """Whether triton is there."""
    return find_spec("triton") is not None


def allowed() -> bool:
    """Whether kernels may run: nobody has turned them off, and triton is there."""
    return switched_on() and installed()


def run(module: Launched, x: Tensor, plain: Run) -> Tensor:
    """(tokens, d_model) -> (tokens, d_model): the module's kernel, or `plain`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _readable(module, x):
        return plain(x)
    quick = module.kernel(len(x))
    if quick is None:
        return plain(x)
    shape = _shape(module, x)
    if shape not in _pays:
        if torch.cuda.is_current_stream_capturing():
            return plain(x)  # nothing can be measured now
        with _alone, torch.cuda.device(x.device):
            _pays[shape] = _pay(partial(quick, x), partial(plain, x), x)
    if not _pays[shape]:
        return plain(x)
    with torch.cuda.device(x.device):
        return quick(x)


def experts(mlp: Experts, tokens: int) -> Run | None:
    """For one token, or several."""
    kind = kind_of(mlp.act_fn)
    if kind is None:
        return None
    return partial(_one_with_experts if tokens == 1 else _many_with_experts, mlp, kind)


def single(mlp: Single) -> Run | None:
    """For one token."""
    kind = kind_of(mlp.act_fn)
    return None if kind is None else partial(_one_with_neurons, mlp, kind)


def _one_with_experts(mlp: Experts, kind: int, x: Tensor) -> Tensor:
    from . import launches

    chosen = mlp.chosen(x)[0]
    h = launches.hidden(mlp, kind, x, chosen, mlp.shared, mlp.size)
    return launches.summed(mlp, h, chosen, mlp.shared, mlp.size, x.dtype)


def _many_with_experts(mlp: Experts, kind: int, x: Tensor) -> Tensor:
    from . import launches

    base = mlp.always(x) if mlp.shared else None
    return launches.grouped(mlp, kind, x, mlp.chosen(x), mlp.shared, mlp.size, base)


def _one_with_neurons(mlp: Single, kind: int, x: Tensor) -> Tensor:
    from . import launches

    gated = mlp.gated(x)
    rows = mlp.chosen(gated)[0]
    if mlp.gate is not None:
        h = launches.hidden(mlp, kind, x, rows, 0, 1, gated)
    else:
        h = gated[0, rows].float()
        h = h if mlp.idle_mean is None else h - mlp.idle_mean[rows].float()
    return launches.summed(mlp, h, rows, 0, 1, x.dtype)


def _readable(module: Rows, x: Tensor) -> bool:
    """Whether a kernel can read all numbers."""
    if not x.is_cuda or not len(x) or not allowed():
        return False
    matrices = [each for each in (module.gate, module.up, module.down) if each is not None]
    return x.dtype in CLOSE and all(
        each.dtype == x.dtype and each.device == x.device and each.stride(1) == 1
        for each in matrices
    )


def _pay(quick: Callable[[], Tensor], plain: Callable[[], Tensor], x: Tensor) -> bool:
    """Whether a kernel agrees, and is faster. One token mostly runs as a part of a graph (see
    `decoding`), which takes the launches from the CPU, so there the GPU's own time counts."""
    try:
        found, expected = quick().float(), plain().float()
        if not bool((found - expected).norm() <= CLOSE[x.dtype] * expected.norm()):
            warn("a kernel disagrees with torch on this GPU, so torch does it")
            return False
        return is_faster(quick, plain, _busy if len(x) == 1 else _waited)
    except Exception as error:  # a driver, a compiler, a chip with less memory than it takes, ...
        warn("a kernel does not work on this GPU, so torch does it: ", error)
        return False


def warn(message: str, error: Exception | str = "") -> None:
    """Once per message."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s%s", message, error)


def _waited(action: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    torch.cuda.synchronize()
    start = perf_counter()
    action()
    torch.cuda.synchronize()
    return perf_counter() - start


def _busy(action: Callable[[], object]) -> float:
    """Seconds that the GPU takes where launches wait for it: they queue up behind a pause."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE)
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _shape(module: nn.Module, x: Tensor) -> tuple:
    """What the time and the result depend on. The extra_repr says how many neurons run."""
    names = ("gate", "gate_bias", "up_bias", "down_bias", "idle_mean")
    return (
        type(module),
        module.extra_repr(),
        tuple(getattr(module, name) is None for name in names),
        kind_of(module.act_fn),
        x.dtype,
        x.device,
        x.shape[1],
        (len(x) - 1).bit_length(),
    )
