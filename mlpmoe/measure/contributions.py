"""What the branches of one MLP add up to on real text: the algebra of the paper, measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.branched import BranchedMLP, LoopedMLP
from ..core.conversion import convert, convert_mlp, mlp_modules
from ..core.errors import UserError
from ..core.mlps import read_mlps
from ..core.spec import ConversionSpec


@dataclass(frozen=True)
class Contributions:
    """Outputs of one MLP on the tokens of a text; the bias of down is left out."""

    tokens: int
    split_error: float  # max |whole - sum of all B branches| / max |whole|
    kept_norm: float  # norm of the sum of the first K branches / norm of the whole
    alpha: float  # compensation on each kept branch
    cosine: float  # between the sum of the kept branches and the whole
    dropped_share: float  # Σ over dropped branches of squared norm / Σ over all branches


@torch.inference_mode()
def contributions(
    model: PreTrainedModel, layer: int, spec: ConversionSpec, ids: Tensor
) -> Contributions:
    """Measure split and keep (not fade) of `spec` on the input that `layer`'s MLP gets for `ids`.

    model: dense. layer: 0-based. ids: (tokens,) int64. The sum of the branches is taken by the
    paper's loop, in the model's dtype. Raises UserError if there is no such layer or the MLP has
    fewer neurons than `spec` has branches.
    """
    mlps = read_mlps(model)
    if not 0 <= layer < len(mlps):
        raise UserError(f"layer must lie between 0 and {len(mlps) - 1}, not {layer}.")
    weights = replace(mlps[layer].weights, down_bias=None, adds_residual=False)
    spec.check_fits(weights.d_ff)
    x = _mlp_input(model, layer, ids)  # (tokens, d_model)
    whole = BranchedMLP(weights, (weights.d_ff,))(x).float()
    loop = LoopedMLP(convert_mlp(weights, replace(spec, fade=0.0, keep=None)))
    outputs = torch.stack([loop.branch(b, x) for b in range(spec.branches)])  # (B, tokens, d_model)
    kept = outputs[: spec.kept].float().sum(0)
    energy = outputs.float().square().sum((1, 2))  # (B,)
    return Contributions(
        tokens=len(ids),
        split_error=float((loop(x).float() - whole).abs().max() / whole.abs().max()),
        kept_norm=float(kept.norm() / whole.norm()),
        alpha=spec.alpha,
        cosine=float(torch.cosine_similarity(kept.flatten(), whole.flatten(), dim=0)),
        dropped_share=float(energy[spec.kept :].sum() / energy.sum()),
    )


def _mlp_input(model: PreTrainedModel, layer: int, ids: Tensor) -> Tensor:
    """What the MLP of a layer reads, caught by a hook on a copy that shares all tensors."""
    twin = convert(model, ConversionSpec(branches=1))
    caught: list[Tensor] = []
    mlp_modules(twin)[layer].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    twin(ids[None].to(model.device), use_cache=False)
    return caught[0].reshape(-1, caught[0].shape[-1])
