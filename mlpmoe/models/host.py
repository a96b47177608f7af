"""What this machine can do: its devices, their dtypes, its free memory and disk."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from mlpmoe.core.errors import UserError
from mlpmoe.core.memory import available_memory as available_memory

from .errors import shorten

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
FLOAT32_PARAMETERS = 50_000_000  # up to here a CPU answers quickly enough in float32
GAIN = 1.2  # how much faster bfloat16 has to be than float32 to be chosen
PRODUCT = (128, 1024, 2048)  # tokens, width, neurons of the product that is timed: some ms


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype of that name; None for "auto". Raises UserError."""
    if isinstance(dtype, str):
        if dtype == "auto":
            return None
        if dtype in DTYPES:
            return DTYPES[dtype]
    elif dtype in DTYPES.values():
        return dtype
    raise UserError(f"dtype is {_text(dtype)}; allowed are auto, {', '.join(DTYPES)}.")


def parse_device(device: str | torch.device) -> torch.device:
    """The device of that name if it is there; "auto" is CUDA, then MPS, then CPU. Raises UserError.

    A CUDA device comes back with its index.
    """
    found = _available_devices()
    if device == "auto":
        return found[0]
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        wanted = None
    if wanted is not None and (wanted.index is None or wanted.type != "cuda"):
        wanted = next((other for other in found if other.type == wanted.type), None)
    if wanted not in found:
        names = ", ".join(str(other) for other in found)
        raise UserError(f"device is {_text(device)}; this machine has {names}, and auto chooses.")
    return wanted


def choose_dtype(
    dtype: torch.dtype | None, *, device: torch.device, parameters: int, saved: torch.dtype
) -> torch.dtype:
    """`dtype`, or what suits the device where it is None.

    An accelerator takes the dtype as saved. A CPU takes float32, and bfloat16 for models of more
    than FLOAT32_PARAMETERS where it multiplies that faster: emulated, it is several times slower.
    """
    if dtype is None and device.type == "cpu":
        large = parameters > FLOAT32_PARAMETERS
        return torch.bfloat16 if large and bfloat16_is_faster() else torch.float32
    chosen = dtype or (saved if saved in DTYPES.values() else torch.float32)
    if chosen is torch.float64 and device.type == "mps":
        raise UserError("Apple GPUs have no float64; choose another dtype, or the device cpu.")
    return chosen


@cache
def bfloat16_is_faster(product_seconds: Callable[[torch.dtype], float] | None = None) -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, by timing a product of each.

    Measured once per process, in some milliseconds: what a CPU announces and what torch makes of
    it are two things. product_seconds: takes the time of one product.
    """
    timed = product_seconds or _product_seconds
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(4):  # the first also sets up; others may be working, so the fastest counts
        for dtype in best:
            best[dtype] = min(best[dtype], timed(dtype))
        if best[torch.bfloat16] > 4 * best[torch.float32]:
            return False
    return best[torch.bfloat16] * GAIN < best[torch.float32]


def _product_seconds(dtype: torch.dtype) -> float:
    tokens, width, neurons = PRODUCT
    values = torch.ones(tokens, width, dtype=dtype)
    weight = torch.ones(neurons, width, dtype=dtype)
    with torch.inference_mode():
        start = time.perf_counter()
        torch.nn.functional.linear(values, weight)
        return time.perf_counter() - start


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or would be created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gpu_is_lent() -> bool:
    """Whether this is a ZeroGPU Space, which has a GPU for the length of a call."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def _available_devices() -> list[torch.device]:
    if gpu_is_lent():  # it says that it has one, at any time
        return [torch.device("cpu")]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [*devices, torch.device("cpu")]


def _text(value: object) -> str:
    """`value` as a message may show it."""
    if isinstance(value, (str, torch.dtype, torch.device)):
        return f'"{shorten(str(value))}"'
    return f"a {type(value).__name__}"
