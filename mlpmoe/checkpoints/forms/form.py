"""Form: a converted model in the shape of a checkpoint, before it is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...core.errors import UserError
from ...core.routed import ROUTED_TYPES
from ...core.static.branched import BranchedMLP

# Other software quantises rows in blocks of so many numbers, and rows of down are as long as an MLP
# or an expert is wide. Zeros fill up the last block where they add no more than this share.
BLOCK, MOST_FILLED = 32, 0.05
EXACT = 1e-5  # max|Δlogit| / max|logit| in float32, where a form computes the same function


class FormError(UserError):
    """An architecture cannot hold this conversion; the message says what stands in the way."""


@dataclass(frozen=True)
class Form:
    """What a checkpoint will hold: a model without weights, and the weights.

    `skeleton.save_pretrained(folder, state_dict=tensors)` writes it, with the names that the
    architecture has on disk.
    """

    name: str  # as the command line and the page call it
    # of the class that opens the checkpoint; its own weights are not used, and mostly on meta
    skeleton: PreTrainedModel
    # the skeleton's state_dict without tied copies; what did not change is the converted model's
    tensors: Mapping[str, Tensor]
    # whether it computes the same, up to rounding; else for nearly all tokens nearly the same
    exact: bool = True
    # parts of names of tensors that stay float32, whatever the rest is saved as
    float32: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # sentences for the person who will use the checkpoint
    remote_code: bool = False  # whether it opens with trust_remote_code=True only

    @property
    def architecture(self) -> str:
        return type(self.skeleton).__name__


def quantisable(width: int) -> int:
    """`width`, or a few neurons more that make it a multiple of BLOCK."""
    filled = -(-width // BLOCK) * BLOCK
    return filled if filled - width <= MOST_FILLED * width else width


def block_note(width: int) -> str | None:
    """What should be known of a width that is not a multiple of BLOCK."""
    if width % BLOCK == 0:
        return None
    return (
        f"{width:,} neurons are not a multiple of {BLOCK}, so software that quantises in such "
        "blocks, as llama.cpp does, leaves the down matrices as they are or refuses them."
    )


def skeleton_of(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of this config without memory."""
    # The dtype does not matter on meta, but any other than float32 would change torch's default
    # dtype for every thread while the model is built.
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), dtype=torch.float32)


def converted_mlps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Paths and modules of a converted model's MLPs, in order of the layers; FormError for a
    dense model."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (BranchedMLP, *ROUTED_TYPES))
    }
    if not found:
        raise FormError("this model is not converted: there is nothing to export.")
    return found


def is_static(model: PreTrainedModel) -> bool:
    """Whether the same branches run for every token. FormError for a dense model."""
    return all(isinstance(mlp, BranchedMLP) for mlp in converted_mlps(model).values())


def other_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state_dict of a converted model without its MLPs and without tied copies."""
    prefixes = tuple(f"{name}." for name in converted_mlps(model))
    tied = model.all_tied_weights_keys
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes) and name not in tied
    }


def rounded_to(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype that it is saved in. FormError where that has no numbers for it, which
    were infinite in the checkpoint."""
    rounded = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and not rounded.isfinite().all():
        raise FormError(
            f"{name} holds numbers beyond 65,504, where float16 ends: save it as bfloat16 or "
            "float32."
        )
    return rounded
