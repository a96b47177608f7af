"""How much memory is free, and giving back what is not used any more."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil
import torch

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


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


def return_memory() -> None:
    """Give back to the system what this process has freed. The C library keeps it otherwise, in a
    heap for every few threads: many times what is in use. Where it has no such call (other than
    glibc), nothing happens. Takes about a tenth of a second for each GB that goes back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)  # without holding up other threads of Python


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
