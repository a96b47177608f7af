"""Weights and tokenizer of a GGUF file, by transformers' own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import GgufConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from .errors import ModelError, shorten
from .gguf_config import ROPE_FREQUENCIES, config_of
from .gguf_header import Header, read_header
from .tokens import take_away

# How a byte-level vocabulary cuts text before it merges, by the name in the file. transformers
# takes GPT-2's way for every name that it does not know, so those that are GPT-2's are named here.
PRE_TOKENIZER = "tokenizer.ggml.pre"
LIKE_GPT2 = {"gpt-2", "phi-2", "gigachat", "mpt", "olmo", "jais", "trillion", "exaone4"}
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Vocabularies whose words are tokens even where no merges lead to them, and which begin with BOS
# unless the file denies it.
LIKE_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"}


def check_tokenizer(header: Header, name: str) -> None:
    """Raise ModelError unless the tokenizer in the file is one that can be built exactly."""
    kind = header.metadata.get("tokenizer.ggml.model")
    needed = ("tokens", "merges") if kind == "gpt2" else ("tokens",)
    if kind is None or not all(header.metadata.get(f"tokenizer.ggml.{what}") for what in needed):
        raise ModelError(f"{name} has no tokenizer, so it cannot read text.")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{name} has a tokenizer of the type {shorten(str(kind))}; gpt2 (byte-level) and llama "
            "(sentencepiece) can be read. Choose the original model."
        )
    way = header.metadata.get(PRE_TOKENIZER, "none")
    known = way in LIKE_GPT2 | DIGITS_APART | GGUF_PRE_TOKENIZER_SPLITS.keys()
    if kind == "llama":
        way = "without extra spaces"
        known = not header.metadata.get("tokenizer.ggml.remove_extra_whitespaces")
    if not known:
        raise ModelError(
            f"The tokenizer of {name} cuts text in a way that cannot be read here "
            f"({shorten(str(way))}). Choose the original model."
        )


def read_tokenizer(folder: Path, file: str, header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer in a file that passed `check_tokenizer`, with its chat template."""
    # Not from_pretrained, which takes a tokenizer.json that lies beside the file.
    tokenizer = PreTrainedTokenizerFast(name_or_path=str(folder), gguf_file=file, **_begins(header))
    backend = tokenizer.backend_tokenizer
    way = header.metadata.get(PRE_TOKENIZER)
    if header.metadata["tokenizer.ggml.model"] == "llama":
        if header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
            _without_prefix(backend)
    elif way in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif way in LIKE_LLAMA3:
        backend.model.ignore_merges = True
    # Only the tokens of the file: transformers adds those that it takes for usual, such as
    # <|endoftext|>, and the model has no row for them.
    count = header.metadata["tokenizer.ggml.tokens"]
    take_away(tokenizer, {text for text, token in tokenizer.get_vocab().items() if token >= count})
    return tokenizer


def weights_from(folder: Path, file: str, name: str) -> dict[str, Any]:
    """The arguments by which `from_pretrained(folder, ...)` reads the weights of the file as plain
    floats, with the config that its header states. Raises ModelError."""
    header = read_header(folder / file, name)
    return {
        "gguf_file": file,
        "config": config_of(header, name, _frequencies(folder / file, header)),
        "quantization_config": GgufConfig(dequantize=True),
    }


def saved_dtype(header: Header) -> torch.dtype:
    """What the weights would be stored in as plain floats: their own format, or bfloat16 for
    quantised ones, which have fewer digits."""
    if header.quantised or "BF16" in header.formats:
        return torch.bfloat16
    return torch.float16 if "F16" in header.formats else torch.float32


def _begins(header: Header) -> dict[str, bool]:
    """Whether BOS begins a text, where the file does not say and transformers does not know."""
    said = "tokenizer.ggml.add_bos_token" in header.metadata
    return {} if said or header.metadata.get(PRE_TOKENIZER) not in LIKE_LLAMA3 else {
        "add_bos_token": True
    }  # fmt: skip


def _without_prefix(backend: Tokenizer) -> None:
    """No space before the first word, which transformers' Llama tokenizer always adds and takes
    away again."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _frequencies(file: Path, header: Header) -> np.ndarray | None:
    """The divisors of the rotary frequencies, (n,) float32, if the file has them."""
    entry = header.tensors.get(ROPE_FREQUENCIES)
    if entry is None:
        return None
    offset = header.data_start + entry.offset
    return np.fromfile(file, "<f4", entry.shape[0], offset=offset)
