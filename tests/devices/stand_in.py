"""A device that is not there: tensors that say they are on a GPU, and hold CPU ones.

What a GPU refuses, this one refuses, too: to compute with tensors of the CPU (only copies, numbers,
and indices may come from there), to draw from a generator of the CPU, to be read by NumPy, and, as
Apple's do, to hold float64. So what runs here moves its tensors where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from transformers import PreTrainedModel

from mlpmoe.core import conversion, mlps

APPLE, INTEL = torch.device("mps", 0), torch.device("xpu", 0)  # without and with float64
DOUBLE = (torch.float64, torch.complex128)
NO_DOUBLE = "Cannot convert a MPS Tensor to float64, which the MPS framework doesn't support"
aten = torch.ops.aten
_devices = [APPLE]  # the one that there is
COPIES = (aten.copy_, aten._to_copy, aten.to)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Elsewhere(Tensor):
    """A tensor on the device. To torch's own code in C++, which has no such device here, it is one
    on the meta device, which Python does not see."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta",
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return _devices[-1]

    @property
    def is_meta(self) -> bool:
        return False

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """To where it is already, as torch must see it: nothing is copied then."""
        args, kwargs = _each((args, kwargs), lambda given: "meta" if _is_here(given) else given)
        return super().to(*args, **kwargs)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict) -> Tensor:
        made: Tensor = Elsewhere(self.held.detach().clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Here(TorchDispatchMode):
    """What is made on the device, or copied to it, without a tensor of it being there before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _FromValues(TorchFunctionMode):
    """The same of what `torch.tensor` makes, which a dispatch mode does not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_here(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(_devices[-1])
        return func(*args, **kwargs)


@contextmanager
def another_device(device: torch.device = APPLE) -> Iterator[torch.device]:
    """APPLE or INTEL exists, in this thread and in those that a conversion starts."""
    threads = partial(ThreadPoolExecutor, initializer=lambda: _enter(ExitStack()))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        _devices.append(device)
        stack.callback(_devices.pop)
        _enter(stack)
        patch.setattr(mlps, "PARAMETER_TYPES", (*mlps.PARAMETER_TYPES, Elsewhere))
        patch.setattr(torch.xpu, "_lazy_init", lambda: None)
        patch.setattr(torch.accelerator, "synchronize", lambda device: None)
        patch.setattr(conversion, "ThreadPoolExecutor", threads)
        yield device


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model there; tied weights stay tied, as those of a real device do by themselves."""
    model.to(device).tie_weights()
    return model


def _enter(stack: ExitStack) -> None:
    stack.enter_context(_Here())
    stack.enter_context(_FromValues())


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    leaves: list[Any] = []
    _each((args, kwargs), leaves.append)
    found = any(isinstance(leaf, Elsewhere) for leaf in leaves)
    asked = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    here = asked != ["cpu"] if asked else found
    if found:
        _check_places(func, args, kwargs, leaves)
    if here and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{_devices[-1]}' device type for generator but found 'cpu'")
    inner_args, inner_kwargs = _each((args, kwargs), _held)
    out = func(*inner_args, **inner_kwargs)
    if not here:
        return out
    known = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, Elsewhere)}
    out = _each(out, lambda value: known[id(value)] if id(value) in known else _placed(value))
    return return_and_correct_aliasing(func, args, kwargs, out) if found else out


def _check_places(func: Any, args: tuple, kwargs: dict, leaves: list) -> None:
    packet = func.overloadpacket
    if packet in COPIES:
        _check_dtype(args, kwargs)
        return
    if packet in INDEXING and isinstance(args[0], Elsewhere):
        leaves = [leaf for number, leaf in enumerate(args) if number != 1]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere) and leaf.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} found at least two "
                f"devices, {_devices[-1]} and {leaf.device}!"
            )


def _check_dtype(args: tuple, kwargs: dict) -> None:
    """A copy changes the dtype on the device that it leaves."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    target = args[0].dtype if source is not args[0] else kwargs.get("dtype")
    if isinstance(source, Elsewhere) and target in DOUBLE and source.device == APPLE:
        raise TypeError(NO_DOUBLE)


def _placed(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype in DOUBLE and _devices[-1] == APPLE:
        raise TypeError(NO_DOUBLE)
    with torch.inference_mode(False):  # a view of a plain tensor is plain in that mode, too
        return Elsewhere(value)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, Elsewhere) else value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers of what `change` makes of each value: torch's own `tree_map` knows more
    kinds of them, and takes most of the time of a test."""
    if type(value) in (tuple, list):
        return type(value)([_each(part, change) for part in value])
    if type(value) is dict:
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):  # what torch returns by name, or keeps immutable
        return tuple(_each(part, change) for part in value)
    return change(value)


def _is_here(value: Any) -> bool:
    if isinstance(value, str) and value:
        value = torch.device(value)
    return isinstance(value, torch.device) and value.type == _devices[-1].type
