"""Tensors as the arrays that compiled kernels read: nothing is copied but small vectors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import RLock
from types import BuiltinFunctionType, FunctionType
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH_A_THREAD = 50_000  # multiply-adds; about 5 µs, two or three times what waking one takes
SWITCH = "MLPMOE_KERNELS"  # "plain": torch only
DTYPES = (torch.float32, torch.bfloat16)
NONE = np.zeros(0, np.float32)  # a vector that is not there
_alone = RLock()  # a kernel takes all cores, and numba's own thread pool bears no second caller
GRID = torch.linspace(-6, 6, 241)
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: tuple[Activation, ...] = (  # in the order of their numbers in `compiled`
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    lambda x: F.relu(x).square(),
)
logger = logging.getLogger(__name__)
_kinds: WeakKeyDictionary[Activation, int | None] = WeakKeyDictionary()


@cache
def installed() -> bool:
    """Whether numba is there and works. It is imported, which takes a second, once it is asked."""
    if find_spec("numba") is None:
        return False
    try:
        from . import compiled  # noqa: F401
    except Exception as error:  # a NumPy it does not know, nowhere to keep what it compiled, ...
        logger.warning("numba does not work here, so torch does all: %s", error)
        return False
    return True


def switched_on() -> bool:
    """Whether nobody has turned all kernels off."""
    return os.environ.get(SWITCH, "") != "plain"


def allowed() -> bool:
    """Whether compiled kernels may run: nobody has turned them off, and numba works."""
    return switched_on() and installed()


def threads(multiply_adds: int) -> int:
    """How many a kernel takes: as many as torch, but none that has next to nothing to do."""
    return max(1, min(torch.get_num_threads(), multiply_adds // WORTH_A_THREAD))


@contextmanager
def running(threads: int) -> Iterator[None]:
    """Kernels run one at a time, with so many threads."""
    from numba import config, set_num_threads

    with _alone:
        set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
        yield


def fits(tensor: Tensor) -> bool:
    """Whether a kernel can read a tensor's numbers."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES


def matrix(tensor: Tensor) -> np.ndarray | None:
    """(n, m) as it is stored, float32 or the uint16 of bfloat16, with at least m columns: the first
    m of them count, where it is a part of a wider matrix. None where rows do not lie in one
    piece."""
    tensor = tensor.detach()
    wide = tensor.stride(0)
    if not fits(tensor) or tensor.stride(1) != 1 or wide < tensor.shape[1]:
        return None
    if tensor.storage_offset() + len(tensor) * wide > tensor.untyped_storage().nbytes() // (
        tensor.element_size()
    ):
        return None  # the last row would reach beyond the end
    whole = tensor.as_strided((len(tensor), wide), (wide, 1))
    return (whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole).numpy()


def vector(tensor: Tensor | None) -> np.ndarray:
    """(n,) float32, a copy where it is stored otherwise."""
    return NONE if tensor is None else tensor.detach().float().contiguous().numpy()


def kind_of(activation: Activation) -> int | None:
    """The number in `compiled` of the activation that computes the same; None if there is none."""
    known = isinstance(activation, nn.Module | FunctionType | BuiltinFunctionType)
    if known and activation in _kinds:
        return _kinds[activation]
    with torch.no_grad():
        said = activation(GRID.clone())
        agree = (torch.allclose(said, form(GRID), atol=1e-5) for form in ACTIVATIONS)
        kind = next((number for number, same in enumerate(agree) if same), None)
    if known:
        _kinds[activation] = kind
    return kind
