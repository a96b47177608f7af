"""Every method and stage on another device: nothing stays on the CPU, and nothing is different."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from mlpmoe.core import activations
from mlpmoe.core.conversion import convert, convert_all, loop_over_branches, mlp_modules, observe
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.routed.routed_mlp import GROUPED_FROM
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.branched import BranchedMLP
from tests.devices.cases import all_specs, calibration, first_specs, grouped_specs
from tests.devices.stand_in import APPLE, INTEL, another_device, moved
from tests.families import VOCABULARY, build
from tests.tiny import D_FF, tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
FEW = 5  # one of so many specs is tried on the device with float64, too
KINDS = ("llama-bias", "phi3", "gpt2", "bloom")  # biases, fused, transposed, with the residual
CHOOSING = tuple(name for name, method in ROUTED_METHODS.items() if method.family != "directions")
STATIC = ConversionSpec(branches=8, fade=0.9)
ORACLE = ConversionSpec(method="random", experts=8, active=0.5, router="oracle")
OF_ANY_KIND = [(kind, spec) for n, spec in enumerate(first_specs()) for kind in KINDS[n % 2 :: 2]]

pytestmark = pytest.mark.filterwarnings("ignore::mlpmoe.CalibrationWarning")


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Activations are looked at in two pieces."""
    monkeypatch.setattr(activations, "CHUNK", 20 * 32 * D_FF)


@cache
def model_of(kind: str) -> PreTrainedModel:
    return tiny_model() if kind == "tiny" else build(kind)


@torch.inference_mode()
def everything(model: PreTrainedModel, device: torch.device) -> list[torch.Tensor]:
    """What a converted model says of many tokens and of one, and what its MLPs choose."""
    width = model.get_input_embeddings().embedding_dim
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(4)).to(device)
    found = [model(IDS.to(device), use_cache=False).logits]
    for mlp in mlp_modules(model):
        found += [mlp(x), mlp(x[:1])]
        if not isinstance(mlp, BranchedMLP):
            found.append(mlp.select(x))
    return found


def agree(found: list[torch.Tensor], expected: list[torch.Tensor], device: torch.device) -> None:
    for said, due in zip(found, expected, strict=True):
        assert said.device == device
        torch.testing.assert_close(said.cpu(), due, rtol=1e-3, atol=1e-3)


def compare(spec: ConversionSpec, device: torch.device = APPLE, kind: str = "tiny") -> None:
    expected = everything(convert(model_of(kind), spec, calibration()), CPU)
    fresh = tiny_model() if kind == "tiny" else build(kind)
    with another_device(device):
        converted = convert(moved(fresh, device), spec, calibration())
        tensors = (*converted.named_parameters(), *converted.named_buffers())
        assert [name for name, tensor in tensors if tensor.device != device] == []
        agree(everything(converted, device), expected, device)


@pytest.mark.parametrize("spec", all_specs(), ids=ConversionSpec.to_query)
def test_a_conversion_there_is_the_one_here(spec):
    compare(spec)


@pytest.mark.parametrize("spec", all_specs()[::FEW], ids=ConversionSpec.to_query)
def test_a_conversion_on_a_device_with_float64_is_the_one_here(spec):
    compare(spec, INTEL)


@pytest.mark.parametrize("kind, spec", OF_ANY_KIND)
def test_mlps_of_any_kind_convert_there(kind, spec):
    compare(spec, kind=kind)


@pytest.mark.parametrize("spec", grouped_specs(), ids=ConversionSpec.to_query)
def test_experts_one_by_one_say_the_same_there(spec, monkeypatch):
    for size in GROUPED_FROM:
        monkeypatch.setitem(GROUPED_FROM, size, 0)
    compare(spec)


def test_what_was_observed_there_converts_many_times():
    specs = first_specs()
    expected = convert_all(model_of("tiny"), specs, calibration())
    with another_device() as device:
        there = moved(tiny_model(), device)
        converted = convert_all(there, specs, observe(there, calibration()))
        for one, other in zip(converted, expected, strict=True):
            agree(everything(one, device), everything(other, CPU), device)


@pytest.mark.parametrize("spec", [*first_specs(), ORACLE], ids=ConversionSpec.to_query)
def test_what_was_converted_here_moves_there(spec):
    converted = convert(tiny_model(), spec, calibration())
    expected = everything(converted, CPU)
    with another_device() as device:
        agree(everything(moved(converted, device), device), expected, device)


def test_the_loop_over_branches_runs_there():
    expected = loop_over_branches(convert(model_of("tiny"), STATIC))(IDS).logits
    with another_device() as device:
        looped = loop_over_branches(convert(moved(tiny_model(), device), STATIC))
        agree([looped(IDS.to(device)).logits], [expected], device)


def test_16_bits_convert_there_as_here():
    specs = first_specs()
    expected = convert_all(tiny_model().bfloat16(), specs, calibration())
    with another_device() as device:
        converted = convert_all(moved(tiny_model().bfloat16(), device), specs, calibration())
        for spec, one, other in zip(specs, converted, expected, strict=True):
            logits = one(IDS.to(device)).logits.float().cpu(), other(IDS).logits.float()
            assert all(each.isfinite().all() for each in logits)
            if spec.method not in CHOOSING:  # which rounding lets choose others
                assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()
