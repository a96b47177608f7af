"""Random models of several families as checkpoints, with a tokenizer that merges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice, product
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "Ġ"), ("Ġ", "3")]
VOCABULARY = 263
# Values that no config has by default: what a reader forgets shows.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 3e-4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 700.0}


def merging(merges: Iterable[tuple[str, str]], *words: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with some merges, and words that no merges lead to."""
    made = byte_tokenizer()
    as_json = json.loads(made.backend_tokenizer.to_str())
    vocabulary = as_json["model"]["vocab"]
    as_json["model"]["merges"] = [list(merge) for merge in merges]
    for token in (*map("".join, as_json["model"]["merges"]), *words):
        vocabulary[token] = len(vocabulary)
    made._tokenizer = Tokenizer.from_str(json.dumps(as_json))
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    return merging(MERGES, "whole")


def large_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Of so many tokens, at most 65,793: pairs of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return merging(islice(product(letters, letters), size - len(byte_tokenizer())))


def save_random(folder: Path, model_type: str, **config) -> Path:
    """A random checkpoint in float32 in which no vector is at its default, and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **SHAPE | config), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    ids = torch.arange(1, 41)[None] * 5 % VOCABULARY
    with torch.inference_mode():
        return model(ids).logits[0]
