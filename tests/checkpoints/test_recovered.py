"""Conversions that were trained a little leave as checkpoints like any others."""

import json
from dataclasses import replace

import pytest
import torch

from mlpmoe import ConversionSpec, convert, export
from mlpmoe.checkpoints.forms.dense import dense_form
from mlpmoe.checkpoints.forms.form import EXACT
from mlpmoe.checkpoints.forms.moe import moe_form
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import recovery_of
from mlpmoe.core.recovery import course as courses
from tests.checkpoints.test_dense_form import difference, reloaded
from tests.families import VOCABULARY, build
from tests.tiny import byte_tokenizer, tiny_model

TEXT = "One day, a fox slept in the grass.\n<|endoftext|>\nA cat sat on the wall and looked down."
GENERATOR = torch.Generator().manual_seed(3)
CALIBRATION = Calibration(torch.randint(2, VOCABULARY, (160, 32), generator=GENERATOR))
STATIC = ConversionSpec(branches=4, keep=2, recover_steps=6)
RATES = {"router": 0.1, "lora": 1e-3, "all": 1e-3}  # that help a random model in a few steps
ROUTED = ConversionSpec(method="contiguous", experts=4, active=0.5, shared=0.25, recover_steps=8)


def made(spec, family="llama"):
    model = convert(build(family), spec, CALIBRATION)
    assert recovery_of(model).best > 0
    return model


@pytest.mark.parametrize("recover", ["alpha", "down", "lora", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_static_ones_come_back_as_dense_models(recover, family, tmp_path):
    model = made(replace(STATIC, recover=recover), family)
    assert difference(model, reloaded(dense_form(model), tmp_path)) <= EXACT


@pytest.mark.parametrize("recover", ["router", "lora", "all"])
@torch.no_grad()
def test_routed_ones_come_back_as_stock_mixtures(recover, tmp_path):
    model = made(replace(ROUTED, recover=recover, recover_rate=RATES[recover]))
    assert difference(model, reloaded(moe_form(model, "qwen2-moe", None), tmp_path)) <= 1e-3


def test_an_export_says_what_was_trained(tmp_path):
    """With the proof by a fresh process that it repeats the model in memory."""
    spec = ConversionSpec(branches=8, keep=6, recover="lora", recover_steps=4)
    samples = torch.randint(1, 257, (32, 32), generator=GENERATOR)
    dense = tiny_model()
    model = convert(dense, spec, Calibration(samples))
    done = export(
        model, tmp_path / "made", tokenizer=byte_tokenizer(), text=TEXT, calibration_name="noise"
    )
    assert done.verification.passed and done.verification.relative_difference <= EXACT
    record = json.loads((tmp_path / "made" / "conversion.json").read_text())
    assert ConversionSpec.from_dict(record["spec"]) == spec
    assert record["recovery"] == json.loads(json.dumps(recovery_of(model).to_dict()))
    card = (tmp_path / "made" / "README.md").read_text()
    assert "trained a little (lora, 4 steps)" in card and "without training" not in card
    assert "nats per token" in card and "time limit" not in card


def test_a_card_says_that_the_limit_cut_it_short(tmp_path, monkeypatch):
    spec = ConversionSpec(branches=8, keep=6, recover="lora", recover_steps=4)
    samples = torch.randint(1, 257, (32, 32), generator=GENERATOR)
    monkeypatch.setattr(courses.Course, "_plan", lambda course: None)
    monkeypatch.setattr(courses.Course, "_is_late", lambda course: course.step == 3)
    model = convert(tiny_model(), spec, Calibration(samples), recover_seconds=60)
    export(model, tmp_path / "made", tokenizer=byte_tokenizer(), text=TEXT)
    card = (tmp_path / "made" / "README.md").read_text()
    assert "A time limit ended the training at step 3 of 4" in card
