"""The memory that is asked for before a load is what work with the model then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from mlpmoe.measure.quality.head import LOGITS_AT_ONCE
from mlpmoe.models.architecture import Architecture
from mlpmoe.models.memory import LOGITS, memory_needed
from tests.gguf_writing import write_gguf
from tests.models.random_models import large_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 65_536
# Loads the model, converts all of its MLPs, scores a window with both, and says by how many bytes
# the memory of the process rose at most. Writing to clear_refs sets the peak back.
WORK = """
import json, sys
from pathlib import Path
from mlpmoe import ConversionSpec, convert, perplexity
from mlpmoe.models import load_checked, preflight

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

checked = preflight(sys.argv[1], dtype=sys.argv[2], device="cpu")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
model, tokenizer = load_checked(checked)
whole = ConversionSpec(branches=16, order="norm", fade=0.5, fade_projections="gate-up-down")
converted = convert(model, whole)
for each in (model, converted):
    perplexity(each, tokenizer, "a cat sat " * 600, window=512, stride=512)
print(json.dumps([checked.memory_needed, status("VmHWM:") - before]))
"""
LLAMA = Architecture(
    "LlamaForCausalLM", 8_030_261_248, 5_637_144_576, 128_256, 4096, 14_336, torch.bfloat16
)


def test_every_part_counts():
    needed = memory_needed(LLAMA, torch.bfloat16)
    weights, copy = 2 * LLAMA.parameters, 2 * LLAMA.mlp_parameters
    assert weights + copy < needed < 1.05 * (weights + copy)
    assert memory_needed(LLAMA, torch.float32) > 1.9 * needed
    assert memory_needed(replace(LLAMA, mlp_parameters=0), torch.bfloat16) < needed - 0.9 * copy
    assert LOGITS == LOGITS_AT_ONCE
    # a head is scored in pieces, so a larger vocabulary takes more for its tokens only
    wider = memory_needed(replace(LLAMA, vocabulary=2 * LLAMA.vocabulary), torch.bfloat16)
    assert wider - needed < 200e6


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """Small layers under a large vocabulary, as Gemma has them."""
    folder = tmp_path_factory.mktemp("gemma") / "model"
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=512, sliding_window=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)
    large_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
@pytest.mark.parametrize(("gguf", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_measured_beside_expected(gemma, gguf, dtype, tmp_path):
    place = write_gguf(gemma, tmp_path / "model.gguf", kind=Kind.Q8_0) if gguf else gemma
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(place), dtype], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"{place.name}, {dtype}: expected {expected / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < expected < 2.5 * peak
