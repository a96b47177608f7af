"""How much memory is free, in a container too."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest
import torch

from mlpmoe.core import memory

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def write_group(folder: Path, limit: str, usage: str, cache: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nother 2\n")


@pytest.mark.parametrize("version", [1, 2])
def test_container_limits_count_and_page_cache_does_not(tmp_path, version):
    root = tmp_path / "memory" if version == 1 else tmp_path
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    assert memory.cgroup_headroom(tmp_path, membership) is None
    write_group(root / "outer" / "inner", "max", "5000", 0, version)
    assert memory.cgroup_headroom(tmp_path, membership) is None
    write_group(root / "outer", "10000", "7000", 2000, version)  # the group around counts too
    assert memory.cgroup_headroom(tmp_path, membership) == 5000
    write_group(root / "outer" / "inner", "6000", "7000", 500, version)
    assert memory.cgroup_headroom(tmp_path, membership) == 0
    assert memory.cgroup_headroom(tmp_path / "nowhere", tmp_path / "missing") is None


def test_available_memory(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_headroom", lambda: None)
    assert 0 < memory.available_memory(CPU) <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "cgroup_headroom", lambda: 12345)
    assert memory.available_memory(CPU) == 12345
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (777, 999))
    assert memory.available_memory(GPU) == 777

    def no_driver(device):
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "mem_get_info", no_driver)
    assert memory.available_memory(GPU) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of this C library")
def test_freed_memory_is_returned_to_the_system():
    """A heap whose last piece is in use keeps all before it."""
    process, pieces = psutil.Process(), [bytearray(60_000) for _ in range(2000)]
    for piece in pieces:
        piece[::4096] = bytes([1]) * len(piece[::4096])
    kept = pieces[-1]
    pieces.clear()
    before = process.memory_info().rss
    memory.return_memory()
    assert process.memory_info().rss < before - 2**26
    assert len(kept) == 60_000


def test_another_c_library_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.return_memory()
