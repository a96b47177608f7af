from __future__ import annotations

import pytest
import torch

from mlpmoe.core.errors import UserError
from mlpmoe.models import host

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_dtypes_by_name():
    assert host.parse_dtype("auto") is None
    assert host.parse_dtype("bfloat16") is torch.bfloat16
    assert host.parse_dtype(torch.float64) is torch.float64


@pytest.mark.parametrize("dtype", ["int8", "", "float8_e4m3fn", torch.int8, 16, None, "x" * 10_000])
def test_other_dtypes_are_refused_with_the_list(dtype):
    with pytest.raises(UserError) as caught:
        host.parse_dtype(dtype)
    message = str(caught.value)
    assert message.endswith("allowed are auto, float32, bfloat16, float16, float64.")
    assert len(message) < 200


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta", "", "cpu cpu", 3.5, None])
def test_other_devices_are_refused_with_the_list(device):
    with pytest.raises(UserError, match=r"this machine has .*cpu, and auto chooses"):
        host.parse_device(device)


def test_devices(monkeypatch):
    assert host.parse_device("cpu") == CPU
    assert host.parse_device(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert host.parse_device("auto") == GPU
    assert host.parse_device("cuda") == GPU
    assert host.parse_device("cuda:1") == torch.device("cuda", 1)
    assert host.parse_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert host.parse_device("auto") == torch.device("mps")


def test_auto_dtype(monkeypatch):
    def choose(device, parameters, saved=torch.bfloat16, dtype=None):
        return host.choose_dtype(dtype, device=device, parameters=parameters, saved=saved)

    monkeypatch.setattr(host, "bfloat16_is_faster", lambda: True)
    assert choose(CPU, 50_000_000) is torch.float32
    assert choose(CPU, 135_000_000) is torch.bfloat16
    assert choose(CPU, 135_000_000, saved=torch.float32) is torch.bfloat16
    monkeypatch.setattr(host, "bfloat16_is_faster", lambda: False)
    assert choose(CPU, 494_000_000) is torch.float32
    assert choose(CPU, 135_000_000, dtype=torch.float16) is torch.float16
    assert choose(GPU, 135_000_000) is torch.bfloat16
    assert choose(GPU, 135_000_000, saved=torch.float8_e4m3fn) is torch.float32
    with pytest.raises(UserError, match="no float64"):
        choose(torch.device("mps"), 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("bfloat16", "faster", "products"),
    [
        ([9.0, 1.0, 1.0, 1.0], True, 8),  # slow only until it is set up
        ([2.0, 1.9, 1.9, 1.9], False, 8),  # no gain worth the digits
        ([1000.0] * 4, False, 2),  # emulated: one look is enough
    ],
)
def test_the_cpu_is_asked_once_which_dtype_it_multiplies_faster(bfloat16, faster, products):
    times = {torch.float32: [4.0, 2.0, 2.0, 3.0], torch.bfloat16: list(bfloat16)}
    asked = []

    def seconds(dtype):
        asked.append(dtype)
        return times[dtype].pop(0)

    assert host.bfloat16_is_faster(seconds) is faster
    assert host.bfloat16_is_faster(seconds) is faster
    assert len(asked) == products


def test_this_cpu_says_which_dtype_is_faster():
    assert host.bfloat16_is_faster() in (True, False)


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert host.free_disk(tmp_path / "not" / "yet") > 0
