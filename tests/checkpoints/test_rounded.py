"""Checkpoints whose numbers are rounded, and widths for those who round them later."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from mlpmoe import Calibration, ConversionSpec, ExportError, convert, export, load
from mlpmoe.checkpoints.check.verification import compared
from mlpmoe.checkpoints.forms.dense import plan_dense
from mlpmoe.checkpoints.forms.form import quantisable
from mlpmoe.checkpoints.write import export as exporting
from mlpmoe.checkpoints.write.export import SAVED
from mlpmoe.measure.quality.encoding import Window
from tests.tiny import byte_tokenizer, save_tiny_model, tiny_model

TEXT = "A cat sat on the wall and looked down. " * 12
ROUTED = ConversionSpec(method="contiguous", experts=6, active=0.5)
TOKENS, VOCABULARY = 4000, 50


def answers(shift=0.0, noise=0.05, others=0.3):
    """(mine, theirs, windows): `others` of the tokens have another likeliest one, and the losses of
    theirs are `shift` higher, with so much noise."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY, generator=draw)
    theirs = logits.clone()
    theirs[: int(others * TOKENS)] = logits[: int(others * TOKENS)].flip(1)
    losses = torch.rand(TOKENS, generator=draw) * 5
    changed = losses + shift + noise * torch.randn(TOKENS, generator=draw)
    parts = [
        Window(torch.zeros(101, dtype=torch.int64), 1, n, 0, 400, n, 0)
        for n in range(TOKENS // 100)
    ]
    return (
        {"logits": logits, "losses": losses}, {"logits": theirs, "losses": changed}, parts,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "routed", "passes"),
    [
        ({}, True, True),
        ({}, False, False),  # a dense model has no such excuse
        ({"shift": 0.05}, True, False),  # predicts worse, beyond its error
        ({"shift": -0.05}, True, False),
        ({"others": 0.8}, True, False),  # another model
        ({"noise": 3.0}, True, False),  # too little text to tell
    ],
)
def test_the_text_decides_where_rounding_changes_experts(given, routed, passes):
    mine, theirs, parts = answers(**given)
    found = compared(mine, theirs, "BF16", torch.float32, True, parts, routed)
    assert not found.repeats and found.passed == passes
    assert json.loads(json.dumps(found.to_dict()))["passed"] == passes
    if routed:
        change = math.exp((theirs["losses"] - mine["losses"]).double().mean())
        assert found.ratio == pytest.approx(change, rel=1e-5)
    else:
        assert found.ratio is None


def test_exact_files_have_to_be_exact():
    mine, theirs, parts = answers()
    assert compared(mine, theirs, "F32", torch.float32, True, parts, True).ratio is None


@pytest.fixture
def routed(tmp_path):
    """A routed model in float32, of a base model in bfloat16, and its tokenizer."""
    folder = tmp_path / "base"
    save_tiny_model(folder)
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    model, tokenizer = load(folder, dtype="float32")
    calibration = Calibration.from_text(tokenizer, TEXT * 4, 1024, 64)
    return convert(model, ROUTED, calibration), tokenizer


def dtypes(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}


@pytest.fixture
def unlike(monkeypatch):
    """Checkpoints in 16 bits do not repeat the model, whatever they do."""
    verify = exporting.verify_and_score

    def judged(*arguments, **options):
        found, perplexity = verify(*arguments, **options)
        if found.saved_dtypes == "BF16":
            found = replace(found, typical_difference=1.0, argmax_agreement=0.4)
        return found, perplexity

    monkeypatch.setattr(exporting, "verify_and_score", judged)


@pytest.mark.usefixtures("unlike")
def test_what_rounding_makes_another_model_is_saved_as_it_is(routed, tmp_path):
    model, tokenizer = routed
    made = export(model, tmp_path / "out", tokenizer=tokenizer, text=TEXT, dtype=SAVED)
    assert dtypes(made.folder) == {"F32"}
    assert made.verification.strict and made.verification.passed
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "float32"
    (note,) = (note for note in made.record.notes if note.startswith("Saved as F32"))
    assert "rounded to BF16" in note and "40.0%" in note


@pytest.mark.usefixtures("unlike")
def test_who_asks_for_16_bits_hears_what_would_do(routed, tmp_path):
    model, _ = routed
    with pytest.raises(ExportError, match="Saved as float32 it does"):
        export(model, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("width", "filled"), [(640, 640), (635, 640), (612, 640), (608, 608), (36, 36), (1535, 1536)]
)
def test_blocks_are_filled_up_where_that_is_cheap(width, filled):
    assert quantisable(width) == filled


@pytest.mark.parametrize(
    ("full", "width", "written", "note"),
    [
        (1536, 1152, 1152, None),
        (1536, 635, 640, "5 of 640 neurons per layer are zeros, so that other software can"),
        (1536, 1535, 1536, "1 of 1,536 neurons per layer are zeros"),
        (1536, 36, 36, "36 neurons are not a multiple of 32"),
        (1500, 635, 635, None),  # neither was the base model's
    ],
)
def test_the_width_of_a_dense_checkpoint(full, width, written, note):
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=full, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    plan = plan_dense(config, LlamaForCausalLM, [width, width], False)
    assert plan.skeleton.config.intermediate_size == written
    assert (note is None and plan.notes == ()) or plan.notes[0].startswith(note)


def test_a_filled_up_checkpoint_computes_the_same(tmp_path):
    model = tiny_model(intermediate_size=640)
    converted = convert(model, ConversionSpec(branches=16, keep=11, fade=0.3))
    widths = {sum(mlp.mlp.sizes) for mlp in converted.model.layers}
    made = export(converted, tmp_path / "out", tokenizer=byte_tokenizer(), text=TEXT)
    assert made.verification.strict and made.verification.passed
    written = json.loads((made.folder / "config.json").read_text())["intermediate_size"]
    assert written == quantisable(*widths)
