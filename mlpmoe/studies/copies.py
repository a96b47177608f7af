"""Copies of the last branches of a model: one in their place, or all of them as experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..core.conversion import convert, twin_of
from ..core.recovery.student import frozen_twin
from ..core.routed import RoutedMLP
from ..core.spec import ConversionSpec
from ..core.static.branched import BranchedMLP

Rows = Mapping[str, Tensor]  # by parameter of the branched model: what belongs to its last branches

# Fields of MLPWeights with a part for each neuron: their names in a BranchedMLP, and the dimension
# that counts neurons. The bias of down belongs to no neuron.
FIELDS = {
    "gate": ("gate_proj.weight", 0),
    "up": ("up_proj.weight", 0),
    "down": ("down_proj.weight", 1),
    "gate_bias": ("gate_proj.bias", 0),
    "up_bias": ("up_proj.bias", 0),
}


@dataclass(frozen=True)
class _Part:
    """A parameter of the branched model, whose numbers from `first` on belong to the copies."""

    whole: Tensor
    dim: int
    first: int

    @property
    def shared(self) -> Tensor:
        return self.whole.narrow(self.dim, 0, self.first)

    @property
    def own(self) -> Tensor:
        return self.whole.narrow(self.dim, self.first, self.whole.shape[self.dim] - self.first)


class Copies:
    """A model whose last branches, in every MLP, may be replaced by trained copies of them.

    model: dense, unchanged. branches: into which its MLPs are cut. shared: how many of these are
    the same for all copies, as is everything outside the MLPs. Raises SpecError where an MLP has
    less neurons than branches.
    """

    def __init__(self, model: PreTrainedModel, branches: int, shared: int) -> None:
        self.seed = convert(model, ConversionSpec(branches=branches))
        self._frozen = frozen_twin(self.seed)
        self._mlps = {p: m for p, m in self.seed.named_modules() if isinstance(m, BranchedMLP)}
        self._first = {path: sum(mlp.sizes[:shared]) for path, mlp in self._mlps.items()}
        self._parts = {
            f"{path}.{name}": _Part(tensor.detach(), dim, self._first[path])
            for path, mlp in self._mlps.items()
            for field, (name, dim) in FIELDS.items()
            if (tensor := getattr(mlp.weights, field)) is not None
        }

    def start(self) -> Rows:
        """The rows of the model itself, as parameters of their own."""
        return {name: nn.Parameter(part.own.clone()) for name, part in self._parts.items()}

    def logits(self, rows: Rows, ids: Tensor) -> Tensor:
        """Next-token logits (samples, tokens, vocabulary) with these rows, differentiable in them
        and in nothing else."""
        inputs, options = (ids.to(self.seed.device),), {"use_cache": False}
        whole = self._joined([rows])
        return functional_call(self._frozen, whole, inputs, options, tie_weights=False).logits

    def dense(self, rows: Rows) -> PreTrainedModel:
        """The model with these rows in place of its own."""
        model = twin_of(self.seed)
        for name, value in self._joined([rows]).items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(value.detach()))
        return model

    def experts(
        self, copies: Sequence[Rows], router: Callable[[str], nn.Module]
    ) -> PreTrainedModel:
        """One model of all copies: each token runs the shared neurons and, in every MLP, those of
        the copy that `router(path of the MLP)` scores highest."""
        model, joined = twin_of(self.seed), self._joined(copies)
        for path, mlp in self._mlps.items():
            fields = {field: joined.get(f"{path}.{name}") for field, (name, _) in FIELDS.items()}
            given = {field: None if t is None else t.detach() for field, t in fields.items()}
            weights = replace(mlp.weights, **given)
            made = RoutedMLP(weights, self._first[path], len(copies), router(path), active=1)
            model.set_submodule(path, made.train(mlp.training))
        return model

    def _joined(self, copies: Sequence[Rows]) -> dict[str, Tensor]:
        """The parameters with the rows of one copy after the other behind the shared ones."""
        return {
            name: torch.cat([part.shared, *(rows[name] for rows in copies)], part.dim)
            for name, part in self._parts.items()
        }


def average(copies: Sequence[Rows]) -> Rows:
    """The mean of several copies."""
    return {name: torch.stack([rows[name] for rows in copies]).mean(0) for name in copies[0]}
