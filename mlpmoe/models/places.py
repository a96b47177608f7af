"""Tensors in the files of a checkpoint that have no place, or not the place its config names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import shorten

# What models compute themselves, and older checkpoints hold: rotary frequencies and tables,
# positions, what masked scores become. Causal masks are called as a bias would be, which is a row.
COMPUTED = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|masked_bias)$")
MASK = re.compile(r"(attn|attention)\.bias$")


def is_computed(key: str, shape: Sequence[int]) -> bool:
    """Whether a model has no place for this tensor because it computes it itself."""
    return bool(COMPUTED.search(key) or (MASK.search(key) and len(shape) > 1))


def without_place(
    unexpected: Iterable[str], folder: Path, files: Iterable[str], name: str
) -> str | None:
    """Why a model is refused whose files hold more than it has places for; None if it is not.
    transformers leaves such tensors out, and goes on: what is measured would be another model.

    unexpected: as transformers calls them, maybe with another prefix than in `files`.
    """
    unexpected = set(unexpected)
    if unexpected:
        shapes = _shapes(folder, files)
        unexpected -= {key for key in unexpected if is_computed(key, _shape(key, shapes))}
    if not unexpected:
        return None
    count, first = len(unexpected), shorten(min(unexpected))
    return (
        f"The weights of {name} hold {count} {'tensor' if count == 1 else 'tensors'} that its "
        f"config.json has no place for, such as {first}. Without them it would be another model: "
        "correct the config.json, or choose another checkpoint."
    )


@torch.no_grad()
def tell_own_head(model: PreTrainedModel) -> None:
    """Let the config say what the files hold: a head of its own is not tied, whatever the flag.
    transformers 5 keeps such a head; readers that obey the flag would drop it."""
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is rows.weight or not is_tied(model.config):
        return
    if head.weight.shape == rows.weight.shape and torch.equal(head.weight, rows.weight):
        head.weight = rows.weight
    else:
        untie(model.config)


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether a config says that the head is the embedding."""
    return bool(config.get_text_config(decoder=True).tie_word_embeddings)


def untie(config: PreTrainedConfig) -> None:
    """Let a config say that the head is one of its own."""
    for each in (config, config.get_text_config(decoder=True)):
        each.tie_word_embeddings = False


def _shapes(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    shapes = {}
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(folder / file, framework="pt") as found:
                shapes |= {key: found.get_slice(key).get_shape() for key in found.keys()}
    return shapes


def _shape(key: str, shapes: dict[str, list[int]]) -> Sequence[int]:
    for stored, shape in shapes.items():
        if f".{stored}".endswith(f".{key}") or f".{key}".endswith(f".{stored}"):
            return shape
    return ()
