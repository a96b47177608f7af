"""A random Llama checkpoint of any size, written layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import byte_tokenizer

# 8.03 billion parameters in bfloat16: 16 GB
SHAPE_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
STD = 0.02


def write_random_llama(folder: Path, **shape: int) -> Path:
    """Config, tokenizer and bfloat16 weights in `folder`, one file per layer."""
    config = LlamaConfig(
        **{"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0, **shape}
    )
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, place in skeleton.state_dict().items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        groups.setdefault(layer, {})[name] = place.shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for index, shapes in enumerate(groups.values(), 1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, STD, generator=generator)
            for name, size in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
