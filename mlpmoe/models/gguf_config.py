"""The transformers config of a GGUF file, from its header.

transformers' own reader leaves fields at their defaults that the file states otherwise (rotary
scaling, sliding windows, widths of heads), which changes what the model computes without a word.
So the fields are read here, for architectures of which each is known; a header with a field that
has no place, or tensors that do not add up to the model, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from .errors import ModelError, shorten
from .gguf_header import Header

# What tells nothing about the function: counts that tensors show, where weights come from.
IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal"}
ROPE_FREQUENCIES = "rope_freqs.weight"  # by what each rotary frequency is divided (Llama 3.1)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA_LOCAL_THETA = 10_000.0
# Layers of the largest Gemma 2 and 3, which scale attention by the width per head and not by the
# head's own width. No key says so; llama.cpp goes by the number of layers, too.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

Fields = dict[str, Any]


class _Keys:
    """The metadata of the architecture, and which of it was asked for."""

    def __init__(self, header: Header, name: str) -> None:
        prefix = f"{header.architecture}."
        self.header, self.name = header, name
        self.values = {
            key.removeprefix(prefix): value
            for key, value in header.metadata.items()
            if key.startswith(prefix)
        }
        self.used = set(IGNORED)

    def __call__(self, key: str, default: Any = None) -> Any:
        """A number or word; layers must agree on it. Without a default it has to be there."""
        self.used.add(key)
        value = self.values.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(
                    f"The layers of {self.name} differ in {shorten(key)}, which is not supported."
                )
            value = value[0]
        if value is None:
            raise ModelError(f"The header of {self.name} does not state {shorten(key)}.")
        if isinstance(value, float):  # as short as float32 allows: 1e-05, not 9.99999974e-06
            return float(str(np.float32(value)))
        return value

    def check_all_used(self) -> None:
        unknown = sorted(set(self.values) - self.used)
        if unknown:
            raise ModelError(
                f"The header of {self.name} states {shorten(unknown[0])}, for which there is no "
                "place here, so the model would not be the one that was trained. Choose the "
                "original model."
            )


def config_of(header: Header, name: str, frequencies: np.ndarray | None = None) -> PreTrainedConfig:
    """The config of the model in a GGUF file.

    frequencies: the tensor ROPE_FREQUENCIES, (head width / 2,) float32, where the file has it;
    without it rotary positions are unscaled, which does not change the model's size. Raises
    ModelError for architectures that cannot be read exactly.
    """
    architecture = header.architecture
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{name} has the GGUF architecture {shorten(architecture or 'none')}, which cannot be "
            f"read here; {', '.join(ARCHITECTURES)} can. Choose the original model."
        )
    keys = _Keys(header, name)
    if keys.values.get("expert_count"):
        raise ModelError(
            f"{name} is a mixture of experts already; only dense MLPs can be converted."
        )
    keys.used |= {"expert_count", "expert_used_count"}
    model_type, read = ARCHITECTURES[architecture]
    fields = _common(keys) | read(keys, frequencies)
    keys.check_all_used()
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise ModelError(
            f"The header of {name} does not describe a working {architecture} model "
            f"({type(error).__name__})."
        ) from error


def _common(keys: _Keys) -> Fields:
    """What every architecture states in the same way."""
    embedding = keys.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{keys.name} has no table of tokens (token_embd.weight).")
    heads = keys("attention.head_count")
    tokens = keys.header.metadata
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": keys("embedding_length"),
        "intermediate_size": keys("feed_forward_length"),
        "num_hidden_layers": keys("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": keys("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.header.tensors,
        "bos_token_id": tokens.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": tokens.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": tokens.get("tokenizer.ggml.padding_token_id"),
    }


def _attention(keys: _Keys) -> Fields:
    """Root mean square norms, and heads of a width of their own."""
    heads = keys("attention.head_count")
    width = keys("attention.key_length", keys("embedding_length") // heads)
    if keys("attention.value_length", width) != width:
        raise ModelError(f"The heads of {keys.name} differ in width, which is not supported.")
    return {
        "num_key_value_heads": keys("attention.head_count_kv", heads),
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon"),
        "head_dim": width,
    }


def _llama(keys: _Keys, frequencies: np.ndarray | None) -> Fields:
    fields = _attention(keys)
    tensors = keys.header.tensors
    return fields | {
        "rope_parameters": _rope(keys, fields["head_dim"], frequencies),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _qwen(keys: _Keys, frequencies: np.ndarray | None) -> Fields:
    fields = _attention(keys)
    return fields | {"rope_parameters": _rope(keys, fields["head_dim"], frequencies)}


def _phi3(keys: _Keys, _: np.ndarray | None) -> Fields:
    fields = _attention(keys)
    width = fields.pop("head_dim")
    turned = keys("rope.dimension_count", width)
    rope = _rope(keys, turned, None) | {"partial_rotary_factor": turned / width}
    window = keys("attention.sliding_window", 0)
    return fields | {"rope_parameters": rope, "sliding_window": window or None}


def _gemma2(keys: _Keys, _: np.ndarray | None) -> Fields:
    fields = _attention(keys)
    return fields | {
        "query_pre_attn_scalar": _gemma_scalar(keys, fields["head_dim"]),
        "rope_parameters": _rope(keys, fields["head_dim"], None),
        "sliding_window": keys("attention.sliding_window"),
        "attn_logit_softcapping": keys("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: _Keys, _: np.ndarray | None) -> Fields:
    fields = _attention(keys)
    rope = {
        "full_attention": _rope(keys, fields["head_dim"], None, theta=1e6),
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": keys("rope.freq_base_swa", GEMMA_LOCAL_THETA),
        },
    }
    return fields | {
        "query_pre_attn_scalar": _gemma_scalar(keys, fields["head_dim"]),
        "rope_parameters": rope,
        "sliding_window": keys("attention.sliding_window"),
        "sliding_window_pattern": keys("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": keys("final_logit_softcapping", 0.0) or None,
    }


def _gemma_scalar(keys: _Keys, head_width: int) -> int:
    if keys("block_count") == GEMMA_27B_LAYERS[keys.header.architecture]:
        return keys("embedding_length") // keys("attention.head_count")
    return head_width


# As llama.cpp calls them -> transformers' model type, and what reads the fields that differ.
ARCHITECTURES: dict[str, tuple[str, Callable[[_Keys, np.ndarray | None], Fields]]] = {
    "llama": ("llama", _llama),  # also Mistral, SmolLM2, Yi, ...
    "qwen2": ("qwen2", _qwen),
    "qwen3": ("qwen3", _qwen),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "phi3": ("phi3", _phi3),
}


def _rope(
    keys: _Keys, turned: int, frequencies: np.ndarray | None, theta: float = 10_000.0
) -> Fields:
    """Rotary positions. turned: dimensions of a head that they turn."""
    if keys("rope.dimension_count", turned) != turned:
        raise ModelError(
            f"{keys.name} turns a part of each head by its rotary positions, which is not "
            "supported for its architecture."
        )
    theta = keys("rope.freq_base", theta)
    kind = keys("rope.scaling.type", "none")
    factor = keys("rope.scaling.factor", 1.0)
    trained = keys("rope.scaling.original_context_length", 0)
    long = [name for name in keys.header.tensors if name.startswith("rope_factors_")]
    if long or kind not in ("none", "linear", "yarn") or (kind == "yarn" and not trained):
        kind = "longrope" if long else kind
        raise ModelError(
            f"{keys.name} scales its rotary positions in a way that cannot be read here "
            f"({shorten(str(kind))}). Choose the original model."
        )
    if frequencies is not None:
        return _llama3_rope(keys.name, turned, theta, frequencies)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    scaled = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    return scaled | ({"original_max_position_embeddings": trained} if kind == "yarn" else {})


def _llama3_rope(name: str, turned: int, theta: float, frequencies: np.ndarray) -> Fields:
    """The parameters of Llama 3.1's scaling that give these divisors, which are tried."""
    factor = float(frequencies.max())
    trained = LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = trained * theta ** -(np.arange(0, turned, 2) / turned) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if frequencies.shape != expected.shape or not np.allclose(frequencies, expected, rtol=1e-3):
        raise ModelError(
            f"{name} scales its rotary positions by a table that is not Llama 3's, which cannot be "
            "read here. Choose the original model."
        )
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3_ROPE
