"""What this machine can do: its devices, their dtypes, its free memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from mlpmoe.core.errors import UserError

from .errors import shorten

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
FLOAT32_PARAMETERS = 300_000_000  # up to here a CPU answers quickly enough in float32
CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


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

    An accelerator takes the dtype as saved. A CPU takes float32, and bfloat16 for larger models
    where it has instructions for it: emulated bfloat16 is several times slower than float32.
    """
    if dtype is None and device.type == "cpu":
        large = parameters > FLOAT32_PARAMETERS
        return torch.bfloat16 if large and cpu_has_bfloat16() else torch.float32
    chosen = dtype or (saved if saved in DTYPES.values() else torch.float32)
    if chosen is torch.float64 and device.type == "mps":
        raise UserError("Apple GPUs have no float64; choose another dtype, or the device cpu.")
    return chosen


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    # Private functions of torch, which may come and go between versions.
    checks = (
        getattr(torch.cpu, name, None)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check() for check in checks if check is not None)


def available_memory(device: torch.device) -> int | None:
    """Bytes that a model may still take on `device`; None if the driver does not tell."""
    if device.type == "cuda":
        try:
            return torch.cuda.mem_get_info(device)[0]
        except (RuntimeError, AssertionError):  # such as a GPU that is lent for each call only
            return None
    available = psutil.virtual_memory().available  # an Apple GPU shares the main memory
    headroom = cgroup_headroom()
    return available if headroom is None else min(available, headroom)


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or would be created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cgroup_headroom(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> int | None:
    """Bytes left under the memory limits of this process's control groups; None without a limit.

    A container sees the whole machine's memory in /proc, but is killed at its own limit. Page
    cache counts as used there although the kernel gives it back on demand, so it is added again.
    """
    headrooms = []
    for folder in _cgroup_folders(root, membership):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None:
                cache = _statistic(folder / "memory.stat", cache_key)
                headrooms.append(max(0, limit - usage + cache))
    return min(headrooms, default=None)


def _available_devices() -> list[torch.device]:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [*devices, torch.device("cpu")]


def _text(value: object) -> str:
    """`value` as a message may show it."""
    if isinstance(value, (str, torch.dtype, torch.device)):
        return f'"{shorten(str(value))}"'
    return f"a {type(value).__name__}"


def _cgroup_folders(root: Path, membership: Path) -> set[Path]:
    """Folders that may hold a limit: of the own groups and of the groups around them."""
    folders = {root, root / "memory"}
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        group = Path(line.split(":", 2)[-1].lstrip("/"))
        for part in (group, *group.parents):
            folders |= {root / part, root / "memory" / part}
    return folders


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
