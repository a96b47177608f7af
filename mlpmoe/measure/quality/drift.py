"""How far the hidden states of a converted model drift from those of the dense one, by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.conversion import twin_of
from ...core.mlps import decoder_layers


@dataclass(frozen=True)
class LayerDrift:
    """The residual stream after one decoder layer, converted against dense."""

    layer: int
    cosine: float  # between both states of a token, mean over the tokens
    norm: float  # converted / dense, mean over the tokens
    error: float  # norm of the difference / norm of the dense states, over all tokens


def drift(dense: PreTrainedModel, converted: PreTrainedModel, ids: Tensor) -> list[LayerDrift]:
    """Compare the outputs of all decoder layers on one sequence.

    ids: (tokens,) int64. One pass of each model; neither is changed. The first token counts like
    any other.
    """
    states = [_states(model, ids) for model in (dense, converted)]
    found = []
    for layer, (before, after) in enumerate(zip(*states, strict=True)):
        before, after = before.double(), after.double()  # (tokens, d_model)
        norms = before.norm(dim=1).clamp(min=1e-30)
        found.append(
            LayerDrift(
                layer=layer,
                cosine=float(torch.cosine_similarity(before, after, dim=1).mean()),
                norm=float((after.norm(dim=1) / norms).mean()),
                error=float((after - before).norm() / before.norm().clamp(min=1e-30)),
            )
        )
    return found


@torch.inference_mode()
def _states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each decoder layer puts out; (tokens, d_model) each, on the CPU."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        caught.append(state.detach().reshape(-1, state.shape[-1]).cpu())

    twin = twin_of(model)  # another thread may be using the model
    for layer in decoder_layers(twin)[1]:
        layer.register_forward_hook(catch)
    twin.get_decoder()(ids[None].to(model.device), use_cache=False)
    return caught
