"""GGUF files: the model that comes out is the one that was written, or none."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from mlpmoe.core.errors import UserError
from mlpmoe.models import origin_of
from mlpmoe.models.gguf_header import fetch_header, read_header
from mlpmoe.models.loading import load
from mlpmoe.models.preflight import preflight
from tests.gguf_writing import write_gguf
from tests.models.random_models import PLAIN_ROPE, logits, save_random, tokenizer

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
STORY_TEXT = Path(__file__).resolve().parents[3] / "shared" / "text" / "tinystories-eval.txt"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS = {
    "llama": {"rope_parameters": PLAIN_ROPE, "head_dim": 32},
    "llama, three frequencies": {"rope_parameters": LLAMA3},
    "llama, linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "llama, biases": {
        "rope_parameters": PLAIN_ROPE,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"rope_parameters": PLAIN_ROPE},
    "qwen2, yarn": {"rope_parameters": YARN},
    "qwen3": {"rope_parameters": PLAIN_ROPE, "head_dim": 32},
    "gemma2": {
        "rope_parameters": PLAIN_ROPE,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "rope_parameters": GEMMA_ROPE,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5},
        "sliding_window": 8,
    },
}


def refusal(place, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(place, device="cpu", **options)
    message = str(caught.value)
    assert message.isprintable() and message.endswith(".") and len(message) < 500
    assert "/tmp" not in message
    return message


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a checkpoint; shared, so not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save_random(folder, "llama", rope_parameters=PLAIN_ROPE)


# What comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_what_was_written(name, tmp_path):
    folder = save_random(tmp_path / "model", name.split(",")[0], **MODELS[name])
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    file = write_gguf(folder, tmp_path / "model.gguf")
    model, _ = load(file, device="cpu")
    assert type(model) is type(expected)
    found, right = logits(model), logits(expected)
    assert (found - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_quantised_weights_become_plain_floats(kind, saved, tmp_path):
    file = write_gguf(saved, tmp_path / "model.gguf", kind=kind)
    model, _ = load(file, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.config.to_dict().get("quantization_config")
    original = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, found in model.state_dict().items():
        wanted = original[name]
        if wanted.ndim < 2:
            assert torch.equal(found, wanted)
            continue
        # half a step of the format: of the range of each block of 32, or of the value itself
        blocks = wanted.reshape(-1, 32)
        steps = {
            Kind.Q4_1: (blocks.amax(1) - blocks.amin(1)) / 15,
            Kind.Q8_0: blocks.abs().amax(1) / 127,
            Kind.F16: 2**-10 * blocks.abs().amax(1),
            Kind.BF16: 2**-7 * blocks.abs().amax(1),
        }[kind]
        error = (found - wanted).reshape(-1, 32).abs().amax(1)
        assert (error <= 0.6 * steps + 1e-6).all()
    assert origin_of(model).saved_dtype is {
        Kind.F16: torch.float16
    }.get(kind, torch.bfloat16)  # fmt: skip
    assert load(file, "bfloat16", "cpu")[0].dtype is torch.bfloat16


def test_the_origin_names_the_file(saved, tmp_path):
    model, _ = load(write_gguf(saved, tmp_path / "my-model-F32.gguf"), device="cpu")
    origin = origin_of(model)
    assert origin.name == origin.gguf == "my-model-F32.gguf" and not origin.on_hub
    assert origin.saved_dtype is torch.float32


TEXTS = (
    "Once upon a time, the cat\n\n  saw 1995 birds.",
    "  12 ½ ٣٤ \t x",
    "the<s>the whole thing",
)


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
        ),
        ("qwen2", None),  # as transformers has it
        ("llama-bpe", None),
    ],
)
def test_tokenizers(pre, split, saved, tmp_path):
    original = tokenizer()
    backend = original.backend_tokenizer
    if split is None:
        split = GGUF_PRE_TOKENIZER_SPLITS[pre]
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.pre_tokenizer = split
    backend.model.ignore_merges = pre == "llama-bpe"
    _, found = load(write_gguf(saved, tmp_path / "model.gguf", pre=pre), device="cpu")
    for text in TEXTS:
        assert found(text)["input_ids"] == original(text)["input_ids"]
    assert found.decode(found(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    assert (found.bos_token, found.eos_token) == (original.bos_token, original.eos_token)
    messages = [{"role": "user", "content": "Hello"}]
    assert found.apply_chat_template(messages, tokenize=False) == "Hello"
    found.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        assert again(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_the_beginning_of_a_text(said, pre, saved, tmp_path):
    """Llama 3's vocabulary begins with BOS unless the file denies it, others if it says so."""

    def change(writer):
        del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]
        if said is not None:
            writer.add_add_bos_token(said)

    file = write_gguf(saved, tmp_path / "model.gguf", pre=pre, change=change)
    ids = load(file, device="cpu")[1]("the cat")["input_ids"]
    begins = pre == "llama-bpe" if said is None else said
    assert (ids[0] == 0) is begins


@pytest.mark.skipif(not STORIES.is_dir(), reason="no real model in ../shared")
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer(prefix, tmp_path):
    file = write_gguf(
        STORIES,
        tmp_path / "stories.gguf",
        change=lambda writer: writer.add_add_space_prefix(prefix),
    )
    model, found = load(file, device="cpu")
    original = AutoTokenizer.from_pretrained(STORIES)
    # its own normalizer drops what spaces are too many, for which GGUF has a flag of its own
    texts = [" ".join(STORY_TEXT.read_text()[:20_000].split()), "naïve 猫\n\t!"]
    for text in texts:
        ids = found(text, verbose=False)["input_ids"]
        assert (ids == original(text, verbose=False)["input_ids"]) is prefix
        assert ids[0] == 1
        assert found.decode(ids, skip_special_tokens=True) == text
    right = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    assert (logits(model) - logits(right)).abs().max() < 1e-4


# Which file ------------------------------------------------------------------------------------


def test_a_folder_with_one_file(saved, tmp_path):
    file = write_gguf(saved, tmp_path / "model-Q8_0.gguf", kind=Kind.Q8_0)
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")  # sees images for it
    (tmp_path / "tokenizer.json").write_text("{}")  # of whatever else
    for place in (file, str(file), tmp_path, str(tmp_path)):
        found = preflight(place, device="cpu")
        assert found.gguf == "model-Q8_0.gguf" and found.reads_gguf
        assert found.bytes_on_disk == file.stat().st_size
        assert found.architecture == "LlamaForCausalLM" and found.download == 0
    model, _ = load(tmp_path, device="cpu")
    assert model.num_parameters() == found.parameters


def test_safetensors_win_unless_the_file_is_named(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "both"))
    file = write_gguf(saved, folder / "model.gguf", kind=Kind.Q4_1)
    assert preflight(folder).weight_files == ("model.safetensors",)
    assert preflight(file).weight_files == ("model.gguf",)


def test_several_files_need_a_choice(tmp_path):
    for name in ("b-Q8_0.gguf", "a-Q4_K_M.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(bytes(1000))
    folder = tmp_path.name
    assert refusal(tmp_path) == (
        f"{folder} has 2 GGUF files; name one of them as {folder}/a-Q4_K_M.gguf. There are: "
        "a-Q4_K_M.gguf (1 kB), b-Q8_0.gguf (1 kB)."
    )
    for index in range(40):
        (tmp_path / f"model-{index:02}.gguf").write_bytes(bytes(1000))
    assert refusal(tmp_path).endswith("and 30 more.")


def test_a_part_of_a_split_file(tmp_path):
    (tmp_path / "big-00001-of-00002.gguf").write_bytes(bytes(1000))
    for place in (tmp_path, tmp_path / "big-00001-of-00002.gguf"):
        assert "one part of a model that was split" in refusal(place)


def test_files_that_are_not_there():
    assert refusal("./no.gguf") == 'There is no file "./no.gguf".'
    assert refusal("no.gguf") == 'There is no file "no.gguf".'


# What is refused, from the header alone ---------------------------------------------------------


def test_a_damaged_file(saved, tmp_path):
    whole = write_gguf(saved, tmp_path / "model.gguf").read_bytes()
    start = read_header(tmp_path / "model.gguf", "model").data_start
    for length in (0, 3, 4, 20, 24, 200, start // 2, start - 40):
        (tmp_path / "model.gguf").write_bytes(whole[:length])
        assert "damaged GGUF file, or one that was cut off" in refusal(tmp_path)
    for length in (start, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.gguf").write_bytes(whole[:length])
        assert "is cut off: it has" in refusal(tmp_path)
    for content, words in (
        (b"nope" + whole[4:], "is not a valid GGUF file"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "is GGUF of version 1"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "little-endian"),
        (whole[:8] + struct.pack("<QQ", 2**60, 2**60) + whole[24:], "damaged"),
        (whole[:24] + struct.pack("<Q", 2**62) + whole[32:], "damaged"),
    ):
        (tmp_path / "model.gguf").write_bytes(content)
        assert words in refusal(tmp_path)


def test_formats_that_cannot_be_unpacked(saved, tmp_path):
    file = write_gguf(saved, tmp_path / "model.gguf", kind=Kind.Q8_0)
    assert set(read_header(file, "model").formats) == {"F32", "Q8_0"}
    content = file.read_bytes()
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16  # behind the number of dimensions, and those
    for kind, shown in ((Kind.Q8_K, "Q8_K"), (99, "format 99")):
        file.write_bytes(content[:place] + struct.pack("<I", kind) + content[place + 4 :])
        assert refusal(file) == (
            f"model.gguf is quantised as {shown}, which cannot be read here. Choose a file of "
            "another format, such as Q8_0, Q4_K_M or F16."
        )


def test_architectures_that_cannot_be_read_exactly(saved, tmp_path):
    def named(architecture):
        def change(writer):
            writer.kv_data[0]["general.architecture"].value = architecture

        return write_gguf(saved, tmp_path / f"{architecture}.gguf", change=change)

    assert refusal(named("mamba")) == (
        "mamba.gguf has the GGUF architecture mamba, which cannot be read here; llama, qwen2, "
        "qwen3, gemma2, gemma3, phi3 can. Choose the original model."
    )
    assert "does not state" in refusal(named("qwen2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_expert_count(8), "is a mixture of experts already"),
        (lambda w: w.add_logit_scale(0.5), "states logit_scale, for which there is no place here"),
        (lambda w: w.add_type("adapter"), "is an adapter (LoRA), not a whole model"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "scales its rotary positions in a way that cannot be read here (longrope)",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32)),
            "scales its rotary positions by a table that is not Llama 3's",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)),
            "they have 95,488 weights where the model has 95,424",
        ),
    ],
)
def test_headers_that_say_more_than_is_understood(change, words, saved, tmp_path):
    assert words in refusal(write_gguf(saved, tmp_path / "model.gguf", change=change))


def test_tokenizers_that_cannot_be_built(saved, tmp_path):
    unknown = write_gguf(saved, tmp_path / "unknown.gguf", pre="bloom")
    assert "cuts text in a way that cannot be read here (bloom)" in refusal(unknown)

    def change(writer):
        del writer.kv_data[0]["tokenizer.ggml.tokens"]

    assert "has no tokenizer" in refusal(write_gguf(saved, tmp_path / "n.gguf", change=change))

    def change(writer):
        writer.kv_data[0]["tokenizer.ggml.model"].value = "t5"

    assert "has a tokenizer of the type t5" in refusal(
        write_gguf(saved, tmp_path / "t5.gguf", change=change)
    )


def test_without_the_package(saved, tmp_path, monkeypatch):
    file = write_gguf(saved, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(file) == (
        "model.gguf is a GGUF file, for which the package gguf is needed: pip install gguf."
    )


def test_a_header_is_fetched_in_few_pieces(saved, tmp_path, monkeypatch):
    file = write_gguf(saved, tmp_path / "model.gguf")
    content = file.read_bytes()
    monkeypatch.setattr("mlpmoe.models.gguf_header.FIRST_PIECE", 100)
    asked = []

    def read(count):
        asked.append(count)
        return content[:count]

    assert fetch_header(read, len(content), "model") == read_header(file, "model")
    assert asked == [100, 400, 1600, 6400, 25600][: len(asked)] and asked[-1] < len(content)
