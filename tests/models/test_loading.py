"""From a checked folder to a model in memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    tokenization_utils_tokenizers,
)

from mlpmoe.core.errors import UserError
from mlpmoe.measure.quality.perplexity import perplexity
from mlpmoe.models.errors import ModelError
from mlpmoe.models.loading import load
from mlpmoe.models.origin import origin_of
from tests.tiny import BOS, byte_tokenizer, save_tiny_model, tiny_model

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, device="cpu", **options)
    message = str(caught.value)
    assert str(folder.parent) not in message
    assert message.isprintable() and len(message) < 400
    return message


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_tiny_model_is_always_the_same():
    first, second = tiny_model().state_dict(), tiny_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("text", ["Once upon a time", "  two  spaces\n\ttab", "naïve 猫 🙂", ""])
def test_the_byte_tokenizer_gives_any_text_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0 and len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_dtypes(tiny_folder, dtype):
    model, tokenizer = load(tiny_folder, dtype, "cpu")
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    logits = model(tokenizer("Hello", return_tensors="pt")["input_ids"]).logits
    assert logits.isfinite().all()
    assert torch.get_default_dtype() is torch.float32


def test_a_cpu_gets_float32_for_a_small_model(tmp_path):
    folder = tmp_path / "half"
    save_tiny_model(folder)
    tiny_model().bfloat16().save_pretrained(folder)
    model, _ = load(folder, device="cpu")
    assert model.dtype is torch.float32


def test_the_model_is_plain_and_can_be_saved(tiny_folder, tmp_path):
    model, tokenizer = load(str(tiny_folder), device="cpu")
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again", device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_missing_tensors_are_never_made_up(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.pop(name))
    assert refusal(folder) == (
        "The weights of model do not fit its config.json: 1 of its tensors is missing, such as "
        f"{name}."
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.1.mlp.up_proj.bias"], "hold 1 tensor that"),
        (
            ["model.layers.2.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"],
            "hold 2 tensors that",
        ),
        (["v_head.summary.weight"], "hold 1 tensor that"),
        (["model.layers.0.self_attn.bias"], "hold 1 tensor that"),  # no mask: it has one dimension
    ],
)
def test_tensors_without_a_place_are_never_left_out(folder, names, said):
    change_weights(folder, lambda tensors: tensors.update({n: torch.ones(4) for n in names}))
    message = refusal(folder)
    assert said in message and f"has no place for, such as {min(names)}." in message


def test_what_models_compute_themselves_may_be_there(folder):
    expected = load(folder, device="cpu")[0].state_dict()
    computed = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.embeddings.position_ids": torch.arange(8.0)[None],
    }
    change_weights(folder, lambda tensors: tensors.update(computed))
    found = load(folder, device="cpu")[0].state_dict()
    assert found.keys() == expected.keys()


def test_heads_for_later_tokens_are_left_out_and_named(folder, monkeypatch, caplog):
    """Where transformers says that the next token does not depend on them."""
    extra = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}
    change_weights(folder, lambda tensors: tensors.update(extra))
    assert "hold 2 tensors that its config.json has no place for" in refusal(folder)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    model, _ = load(folder, device="cpu")
    assert origin_of(model).left_out == tuple(sorted(extra))
    (note,) = origin_of(model).notes
    assert note.startswith("2 tensors of the base model's files are left out, such as mtp.layers.0")
    assert note in caplog.text


def test_a_head_of_its_own_is_said_to_be_one(tmp_path):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert load(folder, device="cpu")[0].config.tie_word_embeddings
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": rows.clone()}))
    same, _ = load(folder, device="cpu")  # stored twice
    assert same.config.tie_word_embeddings and same.lm_head.weight is same.model.embed_tokens.weight
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": 2 * rows}))
    model, _ = load(folder, device="cpu")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, 2 * rows)
    assert torch.equal(model.model.embed_tokens.weight, rows)


def test_tensors_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder) == (
        "The weights of model do not fit its config.json: 6 of its tensors have another shape, "
        "such as model.layers.0.mlp.down_proj.weight, which is (32, 48) and should be (32, 64)."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    change_weights(folder, spoil)
    assert refusal(folder, dtype="float32") == (
        f"The weights of model hold values that are not finite numbers in float32 ({name})."
    )


def test_weights_that_float16_cannot_hold(folder):
    def enlarge(tensors):
        tensors["model.norm.weight"][0] = 1e6

    change_weights(folder, enlarge)
    said = refusal(folder, dtype="float16")
    assert "not finite numbers in float16" in said and "Choose bfloat16 or float32." in said
    assert load(folder, "bfloat16", "cpu")


def test_tokenizers_that_cannot_be_used(folder):
    original = (folder / "tokenizer.json").read_text()
    for text in ("", "{}", original[:-20], "[]"):
        (folder / "tokenizer.json").write_text(text)
        assert "The tokenizer of model cannot be read" in refusal(folder)


def test_a_tokenizer_of_another_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model", vocab_size=100)
    assert refusal(folder) == (
        "The tokenizer of model does not fit its weights: 157 of its tokens, from 100 (¦), have no "
        "row in the embedding, which has 100."
    )


def test_a_token_that_was_added_later(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|say|>"]})
    tokenizer.save_pretrained(folder)
    assert refusal(folder) == (
        "The tokenizer of model does not fit its weights: 1 of its tokens, from 257 (<|say|>), has "
        "no row in the embedding, which has 257."
    )


def test_tokens_that_no_text_is_made_of_are_taken_away(folder, tmp_path):
    """As of Gemma 3 of 1 B, whose tokenizer is that of its siblings that see images."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image = "<image_soft_token>"
    tokenizer.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": [image]})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": image}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert len(AutoTokenizer.from_pretrained(folder)) == 259
    model, found = load(folder, device="cpu")
    assert len(found) == 257 and found.pad_token is None
    text = "a <image_soft_token> and a <pad>"
    assert found(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    assert perplexity(model, found, text).tokens == len(text)
    found.save_pretrained(tmp_path / "again")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == 257


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_keeps_nothing(tiny_folder, monkeypatch, error):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def fail_halfway(*args, **kwargs):
        model = original(*args, **kwargs)[0]
        loaded.append(weakref.ref(model))
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail_halfway)
    with pytest.raises(
        ModelError, match=r"The memory of cpu ran out while tiny was being"
    ) as caught:
        load(tiny_folder, device="cpu")
    error.__traceback__ = None  # of the test's own error object
    gc.collect()
    assert loaded[0]() is None
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_a_refused_model_is_not_kept_by_its_error(folder, monkeypatch):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def remember(*args, **kwargs):
        model, info = original(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", remember)
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="1 of its tensors is missing") as caught:
        load(folder, device="cpu")
    assert loaded[0]() is None and caught.value.__traceback__ is not None


def test_other_failures_name_their_kind_and_no_path(tiny_folder, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(f"cannot read {tiny_folder}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert "The weights of tiny cannot be read (OSError)" in refusal(tiny_folder)


@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "owner/kernels", "flex_attention", "none"])
def test_kernels_are_those_of_this_machine(folder, setting, value):
    """Whatever config.json names: a package that is not here, or code to download."""
    config = json.loads((folder / "config.json").read_text())
    expected = load(folder, device="cpu")[0].config._attn_implementation
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    model, _ = load(folder, device="cpu")
    assert model.config._attn_implementation == expected == "sdpa"


def test_repository_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForCausalLM": "evil.Model",
        "AutoConfig": "evil.Config",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('repository code was run')")
    model, _ = load(folder, device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_progress(tiny_folder):
    seen = []
    load(tiny_folder, device="cpu", on_progress=lambda *report: seen.append(report))
    assert seen == [("checking", None), ("reading weights", None)]


needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="no real model in ../shared")


@needs_stories
def test_a_real_model_writes_a_story():
    model, tokenizer = load(STORIES, device="cpu")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert loss < 2.0
    assert "there was" in tokenizer.decode(written[0])


@needs_stories
def test_a_tokenizer_that_transformers_would_replace(tmp_path):
    """transformers forces Qwen2Tokenizer on model type qwen2, whatever tokenizer.json says."""
    for file in STORIES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    config.update(tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    right = AutoTokenizer.from_pretrained(STORIES)("Once upon a time, there was a cat")["input_ids"]
    change_weights(tmp_path, add_qwen2_biases)
    _, tokenizer = load(tmp_path, device="cpu")
    assert tokenizer("Once upon a time, there was a cat")["input_ids"] == right
    assert tokenizer.bos_token == BOS


def add_qwen2_biases(tensors) -> None:
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))


def test_a_tokenizer_is_parsed_once(tiny_folder, monkeypatch):
    """Which holds all threads of Python: for seconds, where a vocabulary is large."""
    parsed = []

    class Counting:
        def __getattr__(self, name):
            parsed.append(name)
            return getattr(Tokenizer, name)

    monkeypatch.setattr(tokenization_utils_tokenizers, "TokenizerFast", Counting())
    load(tiny_folder, device="cpu")
    assert parsed == ["from_file"]
