"""Models built in another dtype than torch's default, which stays what it is for other threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from transformers import modeling_utils

# What makes a tensor of the default dtype where it is given none.
FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.linspace,
    torch.logspace, torch.eye, torch.empty_strided,
}  # fmt: skip
FROM_NUMBERS = {torch.tensor, torch.arange}  # of the default dtype where the numbers are floats

_building = Lock()


class _Default(TorchFunctionMode):
    """torch's default dtype, for this thread."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("dtype") is None:
            return func(*args, **kwargs | {"dtype": self.dtype})
        made = func(*args, **kwargs)
        if func in FROM_NUMBERS and kwargs.get("dtype") is None and made.is_floating_point():
            if not any(isinstance(given, torch.Tensor) for given in args):
                return func(*args, **kwargs | {"dtype": self.dtype})
        return made


@contextmanager
def default_dtype_stays() -> Iterator[None]:
    """`from_pretrained` in here builds models in the dtype it is given, as always, but does not
    change torch's default for that, which is one for all threads: others would compute in 16 bits
    meanwhile. One thread at a time."""
    with _building, patch.object(modeling_utils, "local_torch_dtype", _local_dtype):
        yield


@contextmanager
def _local_dtype(dtype: torch.dtype, model_class_name: str | None = None) -> Iterator[None]:
    """Stands in for transformers' context of this name."""
    with _Default(dtype):
        yield
