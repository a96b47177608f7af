"""Folders: what is found out before a weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BitNetConfig, OPTConfig, T5Config

from mlpmoe.core.errors import UnsupportedModelError, UserError
from mlpmoe.models import host
from mlpmoe.models.preflight import preflight
from tests.tiny import save_tiny_model, tiny_model

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 257}
# The shape of DeepSeek-R1-Distill-Llama-8B.
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Folders need none: any connection is an error."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a folder needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        preflight(folder, **options)
    message = str(caught.value)
    assert str(folder.parent) not in message, "messages do not tell where things lie"
    assert message.isprintable() and len(message) < 400
    return message


def test_a_good_folder(tiny_folder):
    found = preflight(str(tiny_folder), device="cpu")
    assert found.source == str(tiny_folder) and found.name == "tiny"
    assert found.revision is None and found.folder == tiny_folder
    assert found.architecture == "LlamaForCausalLM"
    assert found.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert found.bytes_on_disk == sum(
        (tiny_folder / file).stat().st_size for file in found.weight_files + found.small_files
    )
    assert found.download == 0
    assert found.memory_available > found.memory_needed > found.parameters * 4
    assert found.dtype is torch.float32 and found.device == torch.device("cpu")


def test_a_sharded_folder(tmp_path):
    folder = save_tiny_model(tmp_path / "sharded", max_shard_size="20KB")
    found = preflight(folder)
    assert len(found.weight_files) > 1
    assert "model.safetensors.index.json" in found.small_files
    (folder / found.weight_files[0]).unlink()
    total = len(found.weight_files)
    assert f"1 of its {total} weight files is missing" in refusal(folder)


def test_an_index_cannot_point_elsewhere(tmp_path):
    folder = save_tiny_model(tmp_path / "sharded", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(b"")
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        content["weight_map"]["model.norm.weight"] = shard
        index.write_text(json.dumps(content))
        assert "weight files is missing" in refusal(folder)
    for broken in ({}, {"weight_map": {}}, {"weight_map": {"a": "a.bin"}}, {"weight_map": 5}):
        index.write_text(json.dumps(broken))
        assert "weight index" in refusal(folder)


def test_empty_and_foreign_folders(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert "has no config.json" in refusal(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "Opening those can run any code" in refusal(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert refusal(folder) == (
        "model.safetensors of model is damaged or cut off. Download or copy it again."
    )


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


def test_a_huge_tokenizer(folder, monkeypatch):
    monkeypatch.setattr("mlpmoe.models.checkpoint.MAX_TOKENIZER_BYTES", 100)
    assert re.search(r"tokenizer of model has \d+ kB; at most 0 kB are read", refusal(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "[" * 100_000, "\xff\xfe"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "not valid JSON" in refusal(folder)


def test_configs_that_cannot_be_built(folder):
    edit_config(folder, model_type=None)
    assert "does not name a model type" in refusal(folder)
    edit_config(folder, model_type="llama", hidden_size="many")
    assert "holds values that its model type, llama, does not allow" in refusal(folder)
    edit_config(folder, hidden_size=32, num_attention_heads=0)
    assert "config.json of model" in refusal(folder)
    edit_config(folder, num_attention_heads=4, num_hidden_layers=10**9)
    assert "asks for 1,000,000,000 in num_hidden_layers; at most 1,000" in refusal(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=10**30)
    assert "config.json of model" in refusal(folder)


def test_model_types_and_custom_code(folder):
    edit_config(folder, model_type="no_such_type")
    assert "has the model type no_such_type, which transformers" in refusal(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('repository code was run')")
    assert "needs Python code from its repository" in refusal(folder)
    edit_config(folder, model_type="llama")  # known: its own code is not needed
    assert preflight(folder).architecture == "LlamaForCausalLM"


def test_models_that_do_not_write(folder):
    for config, name in (
        (BertConfig(**SMALL, num_attention_heads=2), "BertForMaskedLM"),
        (T5Config(d_model=16, d_ff=24, num_layers=2), "T5ForConditionalGeneration"),
    ):
        config.architectures = [name]
        config.save_pretrained(folder)
        assert refusal(folder).startswith(f"model is not a causal language model ({name})")


def test_unsupported_structures(folder):
    OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"decoder\.layers\.0"):
        preflight(folder)
    BitNetConfig(**SMALL, num_attention_heads=2).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp"):
        preflight(folder)


def test_memory_refusal_has_both_numbers(folder, monkeypatch):
    edit_config(folder, **LLAMA_8B, dtype="bfloat16", head_dim=128)
    monkeypatch.setattr(host, "available_memory", lambda device: 9_800_000_000)
    assert refusal(folder, dtype="bfloat16", device="cpu") == (
        "model (8.0 billion parameters) needs about 28.2 GB in bfloat16, this machine has 9.8 GB "
        "free. Choose a smaller model."
    )
    monkeypatch.setattr(host, "available_memory", lambda device: 40_000_000_000)
    assert refusal(folder, dtype="float32", device="cpu") == (
        "model (8.0 billion parameters) needs about 56.0 GB in float32, this machine has 40.0 GB "
        "free. In bfloat16 it would fit (28.2 GB)."
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(host, "available_memory", lambda device: 24_000_000_000)
    assert "28.2 GB in bfloat16, the GPU (cuda:0) has 24.0 GB free" in refusal(folder)
    monkeypatch.setattr(host, "available_memory", lambda device: None)
    assert preflight(folder).parameters == 8_030_261_248  # the driver does not tell: go on


def test_dtype_device_and_revision_are_checked(folder):
    assert "allowed are auto, float32" in refusal(folder, dtype="int4")
    assert "this machine has" in refusal(folder, device="cuda:99")
    assert "A folder has no revisions" in refusal(folder, revision="main")
    assert preflight(folder, dtype=torch.float16).dtype is torch.float16


def test_building_on_meta_leaves_torch_as_it_was(folder, monkeypatch):
    """Also while it lasts: the default dtype belongs to all threads."""
    edit_config(folder, dtype="bfloat16")
    before = torch.get_rng_state()
    defaults = []
    original = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda d: (defaults.append(d), original(d)))
    preflight(folder)
    assert set(defaults) <= {torch.float32}
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.empty(1).device.type == "cpu"
