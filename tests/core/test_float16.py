"""Finite weights whose numbers float16 has no place for: said to be so, and never learnt from."""

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.text.generation import write_side_by_side
from tests.tiny import byte_tokenizer, tiny_model

SAID = r"computes numbers beyond 65,504, where float16 ends: load it in bfloat16 or float32\."
TEXT = Calibration(torch.randint(1, 257, (32, 32), generator=torch.Generator().manual_seed(0)))
CALIBRATED = [
    ConversionSpec(method="cmoe", active=0.75),
    ConversionSpec(method="expertweaver", active=0.75),
    ConversionSpec(method="lowrank", active=0.5),
    ConversionSpec(branches=4, keep=3, order="activation"),
    ConversionSpec(branches=4, keep=3, order="least-squares", compensation="refit"),
    ConversionSpec(branches=4, keep=3, allocation="sensitivity"),
    ConversionSpec(branches=4, keep=3, compensation="mean"),
    ConversionSpec(branches=4, keep=3, recover="lora", recover_steps=2),
]


@torch.no_grad()
def enlarged(what: str) -> torch.nn.Module:
    """The tiny model, of which one vector or all matrices of the MLPs are large."""
    model = tiny_model()
    layer = model.model.layers[1]
    if what == "norm":  # so that the MLP is fine on ordinary input, and not on what it gets
        layer.post_attention_layernorm.weight *= 30_000
    else:
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            matrix.weight *= 60
    assert all(p.half().isfinite().all() for p in model.parameters())
    return model


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.to_flags())
def test_nothing_is_learnt_from_undefined_numbers(spec):
    with pytest.raises(UserError, match=SAID):
        convert(enlarged("norm").half(), spec, TEXT)


def test_the_same_is_learnt_from_where_the_dtype_has_numbers():
    for dtype in (torch.bfloat16, torch.float32):
        assert convert(enlarged("norm").to(dtype), CALIBRATED[3], TEXT)


def test_weights_are_not_blamed():
    with pytest.raises(UserError, match=rf"^model\.layers\.1\.mlp {SAID}"):
        convert(enlarged("MLP").half(), ConversionSpec(branches=4))
    assert convert(enlarged("MLP").bfloat16(), ConversionSpec(branches=4))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nothing_is_written_from_undefined_numbers(temperature):
    model = enlarged("norm")
    *_, last = write_side_by_side([model], byte_tokenizer(), "Once", 2, temperature)
    assert last[0].tokens
    with pytest.raises(UserError, match=SAID):
        list(write_side_by_side([model.half()], byte_tokenizer(), "Once", 2, temperature))
