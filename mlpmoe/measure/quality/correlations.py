"""How the branches of one MLP relate on real text: what √(B/K) assumes, beside what is true."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.conversion import mlp_modules, twin_of
from ...core.errors import UserError
from ...core.static.branched import BranchedMLP, LoopedMLP


@dataclass(frozen=True)
class BranchStatistics:
    """Outputs of the branches of one MLP on a text; the bias of down is left out. float32."""

    tokens: int
    kept: int
    norms: Tensor  # (B,), of each branch's output / norm of the whole
    correlation: Tensor  # (B, B), Pearson, over tokens and d_model, each output less its mean
    mean_share: Tensor  # (B,), of a branch's squared norm: what its mean over the tokens makes up
    size: float  # norm of the sum of the kept branches / norm of the whole
    cosine: float  # between that sum and the whole

    @property
    def alpha_size(self) -> float:
        """The factor that would give what is kept the size of the whole."""
        return 1 / self.size if self.size else float("inf")

    @property
    def alpha_fit(self) -> float:
        """The factor of least squared error."""
        return self.cosine / self.size if self.size else 0.0

    @property
    def mean_correlation(self) -> float:
        """Over all pairs of different branches; 0 for a single branch."""
        count = len(self.norms)
        if count < 2:
            return 0.0
        return float((self.correlation.sum() - self.correlation.trace()) / (count * (count - 1)))


@torch.inference_mode()
def branch_statistics(
    model: PreTrainedModel, layer: int, ids: Tensor, kept: int
) -> BranchStatistics:
    """Statistics of the branches of one layer on the input that its MLP gets for `ids`.

    model: a static conversion with all branches kept and α = 1, so that they add up to the dense
    MLP; its order of the neurons is that of the branches. layer: 0-based. ids: (tokens,) int64.
    kept: the first branches, for size and cosine. Raises UserError for a layer that is not there,
    or another kind of model.
    """
    twin = twin_of(model)
    mlps = mlp_modules(twin)
    if not 0 <= layer < len(mlps):
        raise UserError(f"layer must lie between 0 and {len(mlps) - 1}, not {layer}.")
    if not isinstance(mlps[layer], BranchedMLP):
        raise UserError("only the branches of a static conversion can be compared.")
    caught: list[Tensor] = []
    mlps[layer].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    twin(ids[None].to(model.device), use_cache=False)
    x = caught[0].reshape(-1, caught[0].shape[-1])  # (tokens, d_model)
    loop = LoopedMLP(mlps[layer])
    outputs = torch.stack([loop.branch(b, x).float().cpu() for b in range(len(mlps[layer].sizes))])
    whole, some = outputs.sum(0), outputs[:kept].sum(0)  # (tokens, d_model)
    energy = outputs.square().sum((1, 2)).clamp(min=1e-30)  # (B,)
    means = outputs.mean(1)  # (B, d_model)
    centred = (outputs - means[:, None]).flatten(1)  # (B, tokens · d_model)
    centred = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return BranchStatistics(
        tokens=len(x),
        kept=kept,
        norms=energy.sqrt() / whole.norm(),
        correlation=centred @ centred.T,
        mean_share=(len(x) * means.square().sum(1) / energy).clamp(max=1),
        size=float(some.norm() / whole.norm()),
        cosine=float(torch.cosine_similarity(some.flatten(), whole.flatten(), dim=0)),
    )
