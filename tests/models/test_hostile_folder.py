"""A folder is what somebody else made: links, sizes, and settings of another machine."""

import errno
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlpmoe import ConversionSpec, convert
from mlpmoe.core.errors import UserError
from mlpmoe.measure.quality.perplexity import perplexity
from mlpmoe.measure.text.generation import write_side_by_side
from mlpmoe.models import ModelError, assets_folder, preflight
from mlpmoe.models.checkpoint import folder_checkpoint
from mlpmoe.models.loading import load
from mlpmoe.models.stored_config import read_stored_config
from tests.families import build
from tests.tiny import byte_tokenizer, save_tiny_model

TEXT = "Once upon a time, there was a fox."


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, device="cpu")
    assert str(caught.value).isprintable() and str(folder.parent) not in str(caught.value)
    return str(caught.value)


def change(folder, file, **fields) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "any.txt"]
)
def test_links_that_leave_the_folder_are_refused(folder, tmp_path, file):
    outside = tmp_path / "outside"
    if (folder / file).exists():
        (folder / file).rename(outside)
    else:
        outside.write_text("what is on this machine")
    (folder / file).symlink_to(outside)
    said = refusal(folder)
    assert said.startswith(f"{file} in the folder of model is a link to a place outside of it")


def test_links_to_links_and_folders_of_templates_are_looked_through(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rag.jinja").write_text("x")
    (folder / "inner").symlink_to(outside / "rag.jinja")
    assert "inner in the folder" in refusal(folder)
    (folder / "inner").unlink()
    templates = folder / "additional_chat_templates"
    templates.symlink_to(outside)
    assert "additional_chat_templates in the folder" in refusal(folder)
    templates.unlink()
    templates.mkdir()
    (templates / "rag.jinja").symlink_to(outside / "rag.jinja")
    assert "rag.jinja in the folder" in refusal(folder)


def test_other_links_are_followed(folder, tmp_path):
    expected = load(folder, device="cpu")[0].state_dict()
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")  # within the folder
    (folder / "logs").symlink_to(tmp_path)  # a folder, which is not read
    (folder / "nowhere.txt").symlink_to(tmp_path / "nowhere")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    for place in (folder, linked):
        found = load(place, device="cpu")[0].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_folder_of_the_hub_s_cache_is_read(tiny_folder, tmp_path):
    """snapshots/COMMIT/FILE links to blobs/DIGEST; what leaves that is refused there, too."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "a1"
    shutil.copytree(tiny_folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert load(snapshot, device="cpu")
    outside = tmp_path / "outside"
    (blobs / "config.json").rename(outside)
    (blobs / "config.json").symlink_to(outside)
    with pytest.raises(ModelError, match=r"config\.json in the folder of a1 is a link"):
        preflight(snapshot)
    assert folder_checkpoint(snapshot, "a1", links=True)


# Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json"],
)
def test_small_files_that_are_large_are_not_parsed(folder, file):
    content = (folder / file).read_bytes() if (folder / file).exists() else b""
    (folder / file).write_bytes(content + b" " * 2_900_000)
    assert f"The {file} of model has 3 MB; at most 2 MB are read." == refusal(folder)


def test_tokenizers_are_counted_with_all_that_may_be_read(folder, monkeypatch):
    monkeypatch.setattr("mlpmoe.models.checkpoint.MAX_TOKENIZER_BYTES", 100_000)
    assert preflight(folder)
    (folder / "tekken.json").write_bytes(b" " * 100_000)
    assert "The tokenizer of model has" in refusal(folder)


def test_chat_templates_beside_the_others_are_counted(folder):
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    for name in "ab":
        (templates / f"{name}.jinja").write_bytes(b" " * 1_500_000)
    assert "The chat templates of model have more than 2 MB" in refusal(folder)


def test_a_card_that_is_large_is_not_read(folder):
    head = "---\nlicense: mit\n---\n"
    (folder / "README.md").write_text(head)
    assert preflight(folder).licence == "mit"
    (folder / "README.md").write_text(head + " " * 2_000_000)
    assert preflight(folder).licence is None


def test_what_a_model_computes_counts_as_memory(tmp_path):
    """GPT-Neo keeps a mask of its whole context in every layer, which no file holds."""
    needed = {}
    for context in (64, 4096):
        folder = tmp_path / str(context)
        build("gpt_neo").save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        change(folder, "config.json", max_position_embeddings=context)
        needed[context] = preflight(folder, device="cpu").memory_needed
    assert needed[4096] - needed[64] >= 2 * (4096**2 - 64**2)
    change(folder, "config.json", max_position_embeddings=10_000_000)
    assert "needs about" in refusal(folder)
    with pytest.raises(ModelError, match=r"keeps tables of 20[0-9]\.[0-9] TB"):
        preflight(folder, device="cpu", in_memory=False)


# Settings of another machine -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"return_dict": False},
        {"use_return_dict": False},
        {"output_attentions": True},
        {"output_attentions": True, "_attn_implementation": "flash_attention_2"},
        {"output_hidden_states": True},
        {"torchscript": True},
        {"attn_implementation": {"": "owner/kernels"}},
        {"experts_implementation": "owner/kernels"},
        {"configuration_files": ["config.4.0.0.json"]},
    ],
    ids=str,
)
def test_how_a_model_was_run_elsewhere_does_not_matter(folder, fields):
    model, tokenizer = load(folder, device="cpu")
    expected = perplexity(model, tokenizer, TEXT).value
    (folder / "config.4.0.0.json").write_text(json.dumps({"model_type": "gpt2"}))
    change(folder, "config.json", **fields)
    found, _ = load(folder, device="cpu")
    assert found.config.to_dict() == model.config.to_dict()
    assert perplexity(found, tokenizer, TEXT).value == expected


def test_nested_configs_are_put_right_too(folder):
    inner = json.loads((folder / "config.json").read_text()) | {"_attn_implementation": "none"}
    change(folder, "config.json", model_type="mistral3", text_config=inner, vision_config={})
    config = read_stored_config(folder)
    assert config.text_config._attn_implementation is None
    assert config.name_or_path == str(folder)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", "bf16", "Tensor", 5, {}, [1]])
def test_dtypes_that_are_none_of_a_model(folder, dtype):
    change(folder, "config.json", dtype=dtype)
    assert preflight(folder, device="cpu").saved_dtype is torch.float32
    assert load(folder, device="cpu")[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": "2"}, "model type, llama, does not allow, such as that of num_hid"),
        ({"hidden_act": "magic"}, "does not describe a working llama model (unknown: magic)."),
        ({"num_hidden_layers": 0}, "has no decoder layers"),
        ({"num_hidden_layers": -1}, "has no decoder layers"),
        ({"max_position_embeddings": -1}, "does not describe a working llama model"),
        ({"max_position_embeddings": 0}, "does not describe a working llama model"),
    ],
)
def test_numbers_that_make_no_model(folder, fields, said):
    change(folder, "config.json", **fields)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{", '"x"', '{"eos_token_id": "end"}',
        '{"eos_token_id": [[1], [2]]}', '{"eos_token_id": {"a": 1}}', '{"bos_token_id": true}',
        '{"watermarking_config": {"x": 1}}', "[" * 100_000,
    ],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_how_it_writes_is_by_default_where_that_cannot_be_read(folder, content, caplog):
    (folder / "generation_config.json").write_text(content)
    model, tokenizer = load(folder, device="cpu")
    assert model.generation_config.eos_token_id == 0
    assert "model: its generation_config.json cannot be used" in caplog.text
    converted = convert(model, ConversionSpec(branches=4, keep=3))
    *_, last = write_side_by_side((model, converted), tokenizer, "Once", 3)
    assert all(writing.tokens for writing in last)


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_implementation": "nonsense"},
        {"compile_config": {"fullgraph": True}},
        {"custom_generate": "owner/code"},
    ],
    ids=str,
)
def test_how_it_wrote_elsewhere_is_left_out(folder, fields, caplog):
    change(folder, "generation_config.json", **fields, temperature=0.7, do_sample=True)
    model, _ = load(folder, device="cpu")
    assert model.generation_config.temperature == 0.7 and not caplog.messages
    assert not any(getattr(model.generation_config, key, None) for key in fields)


def test_settings_that_contradict_each_other_are_written_as_they_were_read(folder, tmp_path):
    """As those of Llama 2: how to sample, but not that it is to."""
    said = {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    change(folder, "generation_config.json", **said)
    model, _ = load(folder, device="cpu")
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: written[key] for key in said} == said


# Weight files ----------------------------------------------------------------------------------


def test_a_tensor_in_two_files(tmp_path):
    folder = save_tiny_model(tmp_path / "model", max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    name = min(tensors)
    save_file(load_file(first) | {name: tensors[name] * 2}, first, metadata={"format": "pt"})
    assert refusal(folder).startswith(f"Two weight files of model hold the tensor {name}.")


def test_a_tensor_that_the_index_does_not_name(tmp_path):
    folder = save_tiny_model(tmp_path / "model", max_shard_size="20KB")
    first = min(folder.glob("*.safetensors"))
    extra = {"model.layers.0.mlp.up_proj.bias": torch.ones(48)}
    save_file(load_file(first) | extra, first, metadata={"format": "pt"})
    assert "hold 1 tensor that its config.json has no place for" in refusal(folder)


def test_our_own_model_may_be_installed_as_links(tmp_path, monkeypatch):
    """As some installers do it, out of their cache."""
    demo, cache = assets_folder() / "demo", tmp_path / "assets" / "demo"
    cache.mkdir(parents=True)
    for file in demo.iterdir():
        (cache / file.name).symlink_to(file)
    with pytest.raises(ModelError, match="is a link to a place outside"):
        preflight(cache)
    module = import_module("mlpmoe.models.preflight")  # by attribute it is the function
    monkeypatch.setattr(module, "assets_folder", lambda: tmp_path / "assets")
    assert preflight(cache).parameters == 7_344_384


# And a disk that is full ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_full_disk_is_not_the_fault_of_the_model(folder, monkeypatch, name):
    """Nor is a model loaded without the settings that could not be passed on."""
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    write = Path.write_text

    def full(self, *args, **ways):
        if self.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **ways)

    monkeypatch.setattr(Path, "write_text", full)
    assert refusal(folder) == "Temporary files cannot be written: the disk is full."
