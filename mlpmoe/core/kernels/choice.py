"""One token through an MLP module: compiled, where that fits and was faster when it was tried."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import allowed, fits, running
from .one_token import OneToken

TRIALS = 5  # of each, once per shape


class Quick(Protocol):
    """A module that knows its compiled form."""

    def one_token(self) -> OneToken | None: ...


_bound: WeakKeyDictionary[nn.Module, tuple[tuple, OneToken | None]] = WeakKeyDictionary()
_faster: dict[tuple, bool] = {}


def run_one(module: nn.Module, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """(1, d_model) -> (1, d_model): the module's compiled form, or `plain`."""
    if torch.is_grad_enabled() or not fits(x) or not allowed() or torch.compiler.is_compiling():
        return plain(x)
    run = _bound_form(module)
    if run is None:
        return plain(x)

    quick, slow, shape = partial(_run, run, x), partial(plain, x), _shape(module, x)
    if shape not in _faster:
        with running(1):  # nothing else meanwhile
            _faster[shape] = is_faster(quick, slow)
    return quick() if _faster[shape] else slow()


def _run(run: OneToken, x: Tensor) -> Tensor:
    """(1, d_model) -> (1, d_model), in the dtype of x."""
    given, out = x[0].float().contiguous().numpy(), np.zeros(x.shape[1], np.float32)
    run(given, out)
    return torch.from_numpy(out)[None].to(x.dtype)


def _seconds(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def is_faster(
    quick: Callable[[], object],
    plain: Callable[[], object],
    seconds: Callable[[Callable[[], object]], float] = _seconds,
) -> bool:
    """Measured in turn, after a first run of both: the first quick one is compiled. seconds: how
    long an action takes."""
    spent: list[list[float]] = [[], []]
    for trial in range(TRIALS + 1):
        for times, action in zip(spent, (quick, plain), strict=True):
            taken = seconds(action)
            if trial:
                times.append(taken)
    return median(spent[0]) < median(spent[1])


def _bound_form(module: nn.Module) -> OneToken | None:
    """The compiled form of the weights as they are now."""
    state = tuple(_state(tensor) for tensor in _tensors(module))
    known = _bound.get(module)
    if known is None or known[0] != state:
        known = state, module.one_token()
        _bound[module] = known
    return known[1]


def _tensors(module: nn.Module) -> list[Tensor]:
    parts = [module, *module.children()]
    return [
        tensor
        for part in parts
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    ]


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is moved or changed."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _shape(module: nn.Module, x: Tensor) -> tuple:
    """What the time depends on. The extra_repr says how many neurons run."""
    return type(module), module.extra_repr(), x.dtype, x.shape[1], torch.get_num_threads()
