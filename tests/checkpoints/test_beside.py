"""What stands beside the weights of an export: all that the base model has, or its name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlpmoe import ConversionSpec, ModelError, convert, export, load
from mlpmoe.checkpoints.check.reload import PROBE
from mlpmoe.checkpoints.write.beside import copy_beside, name_for_older, tokenizer_notes
from mlpmoe.checkpoints.write.file_export import export_files
from mlpmoe.models import preflight
from tests.tiny import save_tiny_model

SPEC = ConversionSpec(branches=8, keep=6)
BESIDE = {
    "preprocessor_config.json": "{}", "vocab.json": '{"a": 1}', "tekken.json": "{}",
    "additional_chat_templates/rag.jinja": "{{ messages }}",
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    folder = save_tiny_model(tmp_path / "base")
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    (folder / "notes.txt").write_text("neither")
    return folder


def exported(base, folder, way, change=lambda tokenizer: None):
    if way == "files":
        return export_files(preflight(base, in_memory=False), folder, SPEC)
    model, tokenizer = load(base)
    change(tokenizer)
    return export(convert(model, SPEC), folder, tokenizer=tokenizer)


@pytest.mark.parametrize("way", ["memory", "files"])
def test_all_of_the_tokenizer_is_there_or_named(base, tmp_path, way):
    made = exported(base, tmp_path / "out", way)
    for name, text in BESIDE.items():
        assert (made.folder / name).read_text() == text
    assert not (made.folder / "notes.txt").exists()
    assert made.record.notes[-1] == "Left out of the base model's files: tokenization_own.py."
    ids = [AutoTokenizer.from_pretrained(f)(PROBE)["input_ids"] for f in (base, made.folder)]
    assert ids[0] == ids[1]


def test_of_another_tokenizer_nothing_is_copied(base, tmp_path):
    made = exported(
        base, tmp_path / "out", "memory", lambda tokenizer: tokenizer.add_tokens(["<new>"])
    )
    assert not (made.folder / "vocab.json").exists()
    assert (
        "since the tokenizer is not as it was loaded: preprocessor_config.json, tekken.json"
        in (made.record.notes[-1])
    )


@pytest.mark.parametrize("way", ["memory", "files"])
@pytest.mark.parametrize(
    "name", ["vocab.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
)
def test_a_link_that_leaves_the_folder_is_not_followed(base, tmp_path, way, name):
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(ModelError, match=f"{Path(name).name} in the folder of base is a link"):
        exported(base, tmp_path / "out", way)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../blobs/123")
    (tmp_path / "out").mkdir()
    assert copy_beside(snapshot, ["vocab.json", "absent.json"], tmp_path / "out") == [
        "Left out of the base model's files: absent.json."
    ]
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


def test_older_readers_find_what_they_look_for(base, tmp_path):
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config.save_pretrained(base)
    made = exported(base, tmp_path / "out", "memory")
    values = json.loads((made.folder / "config.json").read_text())
    assert values["rope_theta"] == 5000.0
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    again = AutoConfig.from_pretrained(made.folder)
    assert again.rope_parameters == config.rope_parameters
    settings = made.folder / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text()) | {
        "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>", "<b>"]
    }  # fmt: skip
    settings.write_text(json.dumps(tokenizer))
    name_for_older(made.folder)
    written = json.loads(settings.read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<a>", "<b>"]
    assert "extra_special_tokens" not in written
    assert AutoTokenizer.from_pretrained(made.folder).extra_special_tokens == ["<a>", "<b>"]
    with torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(made.folder)(ids).logits).all()


def test_a_tokenizer_that_opens_as_another_is_named(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROBE)["input_ids"]
    assert list(tokenizer_notes(tokenizer, ids, "")) == []
    assert "in another way" in next(tokenizer_notes(tokenizer, ids[1:], ""))
    assert "(ValueError: no)" in next(tokenizer_notes(tokenizer, None, "ValueError: no"))
