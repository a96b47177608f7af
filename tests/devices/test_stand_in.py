"""The stand-in for a GPU refuses what a GPU refuses, and computes what a CPU computes."""

import pytest
import torch
import torch.nn.functional as F

from tests.devices.stand_in import APPLE, INTEL, another_device, moved
from tests.tiny import tiny_model

HERE = torch.arange(6.0).view(2, 3)
ROWS = torch.tensor([1, 0])
MIXED = [
    lambda x: x + HERE,
    lambda x: HERE * x.sum(),  # a number, but of the device
    lambda x: x @ HERE.T,
    lambda x: torch.cat([x, HERE]),
    lambda x: torch.equal(x, HERE),
    lambda x: x.masked_fill(HERE > 2, 0),
    lambda x: x.index_select(0, ROWS),
    lambda x: x.gather(1, ROWS[:, None]),
    lambda x: HERE[x[0].long() % 2],
    lambda x: F.embedding(ROWS, x),
    lambda x: x.add_(HERE),
    lambda x: x.index_put_((ROWS,), HERE),
    lambda x: x.normal_(generator=torch.Generator()),
    lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
]
ALLOWED = [
    lambda x: x[ROWS],
    lambda x: x + torch.tensor(2.0),
    lambda x: x.copy_(HERE.flip(0)),
    lambda x: x.cpu() + HERE,
    lambda x: x + HERE.to(x),
    lambda x: torch.zeros(2, 3).copy_(x),
    lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
]
WIDE = [
    lambda x: x.double(),
    lambda x: x.sum(dtype=torch.float64),
    lambda x: x.new_zeros(3, dtype=torch.float64),
    lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
    lambda x: HERE.double().to(x.device),
    lambda x: x.to("cpu", torch.float64),  # which an Apple GPU would convert before it copies
    lambda x: HERE.double().copy_(x),
]


@pytest.mark.parametrize("act", MIXED)
def test_tensors_of_two_devices_do_not_mix(act):
    with another_device() as device, pytest.raises(RuntimeError, match=r"same device|generator"):
        act(HERE.to(device))


@pytest.mark.parametrize("act", ALLOWED)
def test_what_may_come_from_the_cpu_gives_the_same(act):
    with another_device() as device:
        assert act(HERE.to(device)).tolist() == act(HERE.clone()).tolist()


@pytest.mark.parametrize("act", WIDE)
def test_an_apple_gpu_has_no_float64_and_others_have(act):
    with another_device(APPLE) as device, pytest.raises(TypeError, match="float64"):
        act(HERE.to(device))
    with another_device(INTEL) as device:
        assert act(HERE.to(device)).dtype == torch.float64


def test_numpy_cannot_read_it():
    with another_device() as device, pytest.raises((TypeError, RuntimeError)):
        HERE.to(device).numpy()


def test_a_model_there_says_and_learns_the_same():
    model, ids = tiny_model(), torch.arange(20)[None]
    expected = model(ids).logits
    expected.square().mean().backward()
    with another_device() as device:
        there = moved(tiny_model(), device)
        assert there.device == device and there.dtype == torch.float32
        with pytest.raises(RuntimeError, match="same device"):
            there(ids)
        logits = there(ids.to(device)).logits
        logits.square().mean().backward()
        assert logits.device == device
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
        for own, other in zip(model.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-3, atol=1e-5)


def test_views_share_memory_with_what_they_are_of():
    with another_device() as device, torch.inference_mode():
        x = HERE.to(device)
        x[:, 1:].mul_(2)
        x[0] = 7
        assert x.tolist() == [[7, 7, 7], [3, 8, 10]]
        assert x.to(device) is x
