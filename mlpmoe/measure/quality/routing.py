"""Which experts the tokens of a text choose, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.conversion import mlp_modules, spec_of, twin_of
from ...core.errors import UserError
from ...core.routed import ClusterMLP, RoutedMLP
from ...core.static.branched import BranchedMLP


@dataclass(frozen=True)
class LayerRouting:
    """The choices of one layer on a text. Where all neurons always run, as in a layer that was
    spared, there are no experts to choose."""

    # experts' worth of neurons that always run: 0 where single neurons are chosen, 1 where all run
    shared: int
    chosen: Tensor  # (tokens, experts or neurons) bool
    favourite: Tensor  # (tokens,) int64: expert of the highest score; -1 where there is no router

    @property
    def load(self) -> Tensor:
        """(experts or neurons,): share of the tokens that run each."""
        return self.chosen.float().mean(0)

    @property
    def counts(self) -> Tensor:
        """(tokens,): how many each token runs."""
        return self.chosen.sum(1)


@torch.inference_mode()
def routing(model: PreTrainedModel, ids: Tensor) -> list[LayerRouting]:
    """The choices of every layer of a routed conversion for `ids` (tokens,) int64, read as one
    text. Raises UserError for a model without routing."""
    twin = twin_of(model)
    found: list[LayerRouting] = []

    def look(mlp: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        spared = isinstance(mlp, BranchedMLP)
        chosen = torch.ones(len(x), 0, dtype=torch.bool) if spared else mlp.select(x).cpu()
        favourite = torch.full((len(chosen),), -1)
        shared = int(spared)
        if isinstance(mlp, RoutedMLP):
            shared = mlp.shared // mlp.size if mlp.size else 1
            if mlp.router is not None and mlp.experts:
                favourite = mlp.router(x).argmax(-1).cpu()
        elif isinstance(mlp, ClusterMLP):
            favourite = mlp.expert_of(x).cpu()
        found.append(LayerRouting(shared, chosen, favourite))

    spec = spec_of(model)
    if spec is None or not spec.routed:
        raise UserError("this model has no routed experts; convert it by a routed method first.")
    for mlp in mlp_modules(twin):
        mlp.register_forward_pre_hook(look)
    twin.get_decoder()(ids[None].to(model.device), use_cache=False)
    return found
