"""A Llama checkpoint as a GGUF file in float32, for tests: what llama.cpp needs to judge it.

Written from the GGUF specification; names of keys and tensors come from the package `gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURE = "LlamaForCausalLM"
GPT2 = "gpt2"  # how GGUF calls a byte-level BPE


def write_gguf(folder: Path, target: Path) -> None:
    """folder: a checkpoint of a Llama with plain RoPE and a byte-level BPE in tokenizer.json.

    Raises ValueError for another architecture, and for a tensor that GGUF has no name for.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    if config["architectures"] != [ARCHITECTURE] or rope["rope_type"] != "default":
        raise ValueError(f"only a {ARCHITECTURE} with plain RoPE can be written")
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name("judged")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, folder, config)
    add_tensors(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    """Tokens in the order of their ids, merges in the order of their rank."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(tokenizer["model"]["vocab"])
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(config["vocab_size"])):
        raise ValueError("the tokenizer does not name every row of the embedding")
    kinds = gguf.TokenType
    writer.add_tokenizer_model(GPT2)
    writer.add_tokenizer_pre("gpt-2")  # the split into words that ByteLevel makes
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if t in special else kinds.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def add_tensors(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    """Every tensor under its name in GGUF; an output matrix that is the embedding is left out."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            if gguf_name is None:
                raise ValueError(f"GGUF has no name for {name}")
            projection = name.split(".")[-2]
            if projection in heads:
                tensor = interleaved(tensor, heads[projection])
            writer.add_tensor(gguf_name, tensor.to(torch.float32).contiguous().numpy())


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """(heads · d, width), rows of each head in another order.

    RoPE turns pairs of a head's dimensions. Here row i makes a pair with row i + d/2; llama.cpp
    takes neighbours, 2i and 2i + 1.
    """
    halves = weight.view(heads, 2, -1, weight.shape[1])  # (heads, 2, d/2, width)
    return halves.transpose(1, 2).reshape(weight.shape)
