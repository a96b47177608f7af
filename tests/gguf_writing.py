"""A checkpoint as a GGUF file, for tests: as llama.cpp's converter writes it, without llama.cpp.

Written from the GGUF specification, not from `mlpmoe.models`, so that the tests can compare the
two; names of keys and tensors come from the package `gguf`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
}
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # how GGUF calls the two kinds of tokenizers


def write_gguf(
    folder: Path,
    target: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    change: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    """Write the checkpoint in `folder` to the file `target`, which is returned.

    The tokenizer has to be a BPE in tokenizer.json, of bytes or with sentencepiece's "▁". kind: the
    format of matrices; vectors are always float32. pre: how the tokenizer cuts text before it
    merges, as llama.cpp calls it. change: may add keys and tensors before the end. Raises
    ValueError for another architecture, and for a tensor that GGUF has no name for.
    """
    config = json.loads((folder / "config.json").read_text())
    (declared,) = config["architectures"]
    if declared not in ARCHITECTURES:
        raise ValueError(f"{declared} cannot be written as GGUF")
    architecture = ARCHITECTURES[declared]
    writer = GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name("made by a test")
    add_keys(writer, config)
    add_tokenizer(writer, folder, config, pre)
    add_tensors(writer, folder, config, architecture, kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp's converter states of a model."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    family = config["model_type"]
    if width * heads != config["hidden_size"]:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if family in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, width))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def llama3_divisors(rope: dict[str, Any], width: int) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, (width / 2,) float32."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    divisors = []
    for index in range(width // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * index / width)
        if wavelength < old / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            divisors.append(factor)
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            share = (old / wavelength - rope["low_freq_factor"]) / span
            divisors.append(1 / ((1 - share) / factor + share))
    return np.array(divisors, np.float32)


def add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any], pre: str) -> None:
    """Tokens in the order of their ids, merges in the order of their rank."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(tokenizer["model"]["vocab"])
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(config["vocab_size"])):
        raise ValueError("the tokenizer does not name every row of the embedding")
    kinds = gguf.TokenType
    types = [kinds.CONTROL if token in special else kinds.NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    if tokenizer["model"].get("byte_fallback"):
        writer.add_tokenizer_model(SENTENCEPIECE)
        rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed([*enumerate(merges)])}
        writer.add_token_scores([rank.get(token, -1e6) for token in tokens])
        byte = [token.startswith("<0x") for token in tokens]
        types = [kinds.BYTE if b else kind for b, kind in zip(byte, types, strict=True)]
    else:
        writer.add_tokenizer_model(BYTE_LEVEL)
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def add_tensors(
    writer: GGUFWriter,
    folder: Path,
    config: dict[str, Any],
    architecture: gguf.MODEL_ARCH,
    kind: GGMLQuantizationType,
) -> None:
    """Every tensor under its name in GGUF; an output matrix that is the embedding is left out."""
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ValueError(f"GGUF has no name for {name}")
            projection = name.split(".")[-2]
            if architecture == gguf.MODEL_ARCH.LLAMA and projection in heads:
                tensor = interleaved(tensor, heads[projection])
            if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
                tensor = tensor + 1  # Gemma multiplies by 1 + weight
            add_tensor(writer, gguf_name, tensor, kind)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    values = tensor.to(torch.float32).contiguous().numpy()
    if values.ndim < 2:
        kind = GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """(heads · d, ...), rows of each head in another order.

    RoPE turns pairs of a head's dimensions. Here row i makes a pair with row i + d/2; llama.cpp
    takes neighbours, 2i and 2i + 1.
    """
    halves = weight.view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, d/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)
