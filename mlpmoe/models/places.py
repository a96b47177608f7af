"""Tensors in the files of a checkpoint that have no place, or not the place its config names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import shorten

# What models compute themselves, and older checkpoints hold: rotary frequencies and tables,
# positions, what masked scores become. Causal masks are called as a bias would be, which is a row.
COMPUTED = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|masked_bias|causal_mask)$")
MASK = re.compile(r"(attn|attention)\.bias$")


def is_computed(key: str, shape: Sequence[int]) -> bool:
    """Whether a model has no place for this tensor because it computes it itself."""
    return bool(COMPUTED.search(key) or (MASK.search(key) and len(shape) > 1))


def has_no_part(key: str, model: PreTrainedModel) -> bool:
    """Whether transformers says of this tensor, for which `model` has no place, that the next
    token does not depend on it: heads that predict the tokens after that, mostly."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, key) for pattern in patterns)


def left_out(model: PreTrainedModel, folder: Path, files: Iterable[str]) -> tuple[str, ...]:
    """Names, as in the files, of the tensors that have no part in `model`, and that it does not
    compute itself: what a checkpoint made from it will lack."""
    places = model.state_dict().keys()
    return tuple(
        sorted(
            key
            for key, shape in _shapes(folder, files).items()
            if has_no_part(key, model)
            and not is_computed(key, shape)
            and key not in places
            and f"{model.base_model_prefix}.{key}" not in places
        )
    )


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
    return refuse_extra(unexpected, name) if unexpected else None


def refuse_extra(keys: Collection[str], name: str) -> str:
    """The refusal of a checkpoint that holds these tensors beside those of its model."""
    count, first = len(keys), shorten(min(keys))
    return (
        f"The weights of {name} hold {count} {'tensor' if count == 1 else 'tensors'} that its "
        f"config.json has no place for, such as {first}. Without them it would be another model: "
        "correct the config.json, or choose another checkpoint."
    )


def refuse_missing(keys: Collection[str], name: str) -> str:
    """The refusal of a checkpoint that lacks these tensors of its model."""
    return (
        f"The weights of {name} do not fit its config.json: {len(keys)} of its tensors "
        f"{'is' if len(keys) == 1 else 'are'} missing, such as {shorten(min(keys))}."
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
