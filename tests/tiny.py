"""A tiny random model with a byte tokenizer: what tests use instead of downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<s>"
D_MODEL = 32
D_FF = 48
LAYERS = 2
VOCABULARY = 257  # BOS, then one token per byte
CONTEXT = 256  # tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and BOS (id 0) before each text; any text comes back exactly."""
    symbols = [BOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(**config: Any) -> LlamaForCausalLM:
    """A random Llama in float32, always the same one; `config` replaces fields of LlamaConfig."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large enough that the MLPs matter for the logits
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**fields, **config})).eval()


def save_tiny_model(folder: Path, *, max_shard_size: str = "1GB", **config: Any) -> Path:
    """Write the tiny model and its tokenizer to `folder`, as a checkpoint, and return `folder`."""
    tiny_model(**config).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder
