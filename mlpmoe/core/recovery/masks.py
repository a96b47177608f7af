"""A student that learns which neurons its overlapping experts have, and its routers (ToMoE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SpecError
from ..routed import ClusterMLP
from ..spec import ConversionSpec
from .budget import best_neurons, shared_out
from .generator import MaskGenerator
from .kinds import MAX_STEPS
from .soft import TEMPERATURE, SoftlyClustered, straight_through
from .student import Student, Whole, replace_tensor, size_of

# Of the loss, beside a KL divergence of 1. ToMoE's code weighs that by 16, the others by 16 and 1.
BUDGET, BALANCE = 16 / 16, 1 / 16
# Logits at the start: by the logarithm of a neuron's importance, and how far from 0 they are.
SHARPNESS, LEAST, MOST = 2.0, 0.1, 6.0
ROUTER_PACE = 4.0  # of a router, in units of its size, beside that of the generator
COPIES = 6  # float32 numbers for each of a mask: logits, noise, soft and hard ones, gradients


class MaskStudent(Student):
    """Masks that choose an expert's neurons, and the router that chooses a token's expert, are
    trained; weights stay.

    A step sees masks drawn by the Gumbel-sigmoid of a generator's logits, one draw for all its
    tokens, and is pulled towards the number of neurons that a token runs before, in all layers
    together. The finished model runs exactly that many: `budget.shared_out` says how many neurons
    an expert has in each layer, and these are the ones of its highest logits.

    model: its experts are drafts (see ClusterMLP).
    """

    draft = True
    kept_per_neuron = 6

    def __init__(self, model: PreTrainedModel, spec: ConversionSpec) -> None:
        super().__init__(model)
        self.mlps = {
            path: mlp for path, mlp in model.named_modules() if isinstance(mlp, ClusterMLP)
        }
        if not self.mlps:
            raise SpecError(f"recover {spec.recover}: this conversion has none to train.")
        if any(mlp.importance is None for mlp in self.mlps.values()):
            raise SpecError(
                f"recover {spec.recover}: this model was converted without it, so its experts "
                "have their neurons already; convert with it."
            )
        self.total = sum(mlp.size for mlp in self.mlps.values())
        self.seed = spec.seed
        starts = [start(mlp.importance, mlp.members) for mlp in self.mlps.values()]
        self.generator = MaskGenerator(starts, torch.Generator().manual_seed(spec.seed))
        self.routers = nn.ModuleDict()
        for path, mlp in self.mlps.items():
            soft = self.twin.get_submodule(path)
            soft.__class__ = SoftlyClustered
            soft.register_buffer("running", mlp.masks.to(mlp.up.dtype))
            for name, tensor in mlp.router.named_parameters():
                self.routers[f"{path}.router.{name}".replace(".", "/")] = Whole(tensor)

    def forward(self, ids: Tensor, step: int | None = None) -> Tensor:
        logits = super().forward(ids, step)
        if self.penalty is not None:
            balances = [self.twin.get_submodule(path).balance for path in self.mlps]
            self.penalty = self.penalty + BALANCE * sum(balances) / len(balances)
        return logits

    def values(self, step: int | None = None) -> Iterator[tuple[str, Tensor]]:
        logits = self.generator()
        if step is None:
            masks = [
                torch.zeros_like(own).scatter_(1, members, 1.0)
                for own, members in zip(logits, self._members(logits), strict=True)
            ]
            self.penalty = None
        else:
            masks = self._drawn(logits, step)
            found = sum(mask.sum(1).mean() for mask in masks)
            self.penalty = BUDGET * (found / self.total).log().abs()
        for (path, mlp), mask in zip(self.mlps.items(), masks, strict=True):
            yield f"{path}.running", mask.to(mlp.up.dtype)
        for name, form in self.routers.items():
            yield name.replace("/", "."), form()

    def _members(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """(experts, neurons) int64 for each layer: those of the finished model."""
        logits = [own.detach() for own in logits]
        counts = shared_out(logits, self.total)
        return [best_neurons(own, count) for own, count in zip(logits, counts, strict=True)]

    def _drawn(self, logits: Sequence[Tensor], step: int) -> list[Tensor]:
        """Masks of 0 and 1, and their gradient. A difference of two numbers drawn from Gumbel's
        distribution is one drawn from the logistic one."""
        random = torch.Generator().manual_seed(self.seed * (MAX_STEPS + 1) + step)
        masks = []
        for own in logits:
            drawn = torch.rand(own.shape, generator=random).to(own.device)
            noisy = own + drawn.logit(eps=1e-6)
            masks.append(straight_through(noisy > 0, (noisy / TEMPERATURE).sigmoid(), own.dtype))
        return masks

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.generator.parameters(), *self.routers.parameters()]

    @property
    def paces(self) -> list[float]:
        pace = [1.0] * len(list(self.generator.parameters()))
        return pace + [ROUTER_PACE * size_of(p) for p in self.routers.parameters()]

    @property
    def begins_with(self) -> list[Tensor]:
        own = [tensor for mlp in self.mlps.values() for tensor in (mlp.members, mlp.importance)]
        return own + [form.value for form in self.routers.values()]

    @property
    def widest(self) -> int:
        return max(mlp.d_ff for mlp in self.mlps.values())

    def bytes_of_a_pass(self) -> int:
        numbers = sum(mlp.experts * mlp.d_ff for mlp in self.mlps.values())
        return 4 * COPIES * numbers

    @property
    def active(self) -> float:
        with torch.no_grad():
            counts = shared_out(self.generator(), self.total)
        return sum(counts) / sum(mlp.neurons for mlp in self.mlps.values())

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        for path, members in zip(self.mlps, self._members(self.generator()), strict=True):
            model.get_submodule(path).settle(members)
        for name, form in self.routers.items():
            replace_tensor(model, name.replace("/", "."), form())


def start(importance: Tensor, members: Tensor) -> Tensor:
    """(experts, d_ff) float32: logits to begin with, above 0 for the neurons that are chosen.

    How far from 0 says how clearly a neuron is chosen or not: by the logarithm of its importance,
    less that at the border. importance: (experts, d_ff). members: (experts, size) int64.
    """
    value = importance.float().clamp(min=1e-30).log()
    size = members.shape[1]
    ranked = value.sort(dim=1, descending=True).values
    border = ranked[:, size - 1 : size + 1].mean(1, keepdim=True)
    distance = (SHARPNESS * (value - border)).clamp(-MOST, MOST)
    chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(1, members, True)
    return torch.where(chosen, distance.clamp(min=LEAST), distance.clamp(max=-LEAST))
