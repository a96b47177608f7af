"""ClusterMLP: each token runs one of several experts, which share neurons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import one_token
from ..kernels.one_token import OneToken
from ..mlps import MLPWeights
from .routed_mlp import GROUPED_FROM, NeuronRows


class ClusterMLP(NeuronRows):
    """Of overlapping experts each token runs the one that its router scores highest.

        y = Σ h_j · down_j over the neurons j of that expert

    Weights are stored once: an expert is a set of rows. Of many tokens, each expert is one product
    with those that chose it; where such products are too small to pay (GROUPED_FROM), all neurons
    run, masked. Ties go to the expert of lower index.

    weights: the neurons that some expert has. members: (experts, size) int64, rows of each expert,
    ascending. router: (tokens, d_model) -> scores (tokens, experts). neurons: of the dense MLP.
    importance: (experts, d_ff), how much each neuron matters to each expert: a draft, whose neurons
    are still to be chosen, until `settle` says which.
    """

    def __init__(
        self,
        weights: MLPWeights,
        members: Tensor,
        router: nn.Module,
        neurons: int,
        idle_mean: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> None:
        super().__init__(weights, idle_mean)
        self.register_buffer("members", members)
        self.register_buffer("importance", importance, persistent=False)
        self.router, self.neurons = router, neurons

    @torch.no_grad()
    def settle(self, members: Tensor) -> None:
        """Give the experts other neurons, in place. Rows that none of them has are dropped.

        members: (experts, size) int64, rows of each expert, ascending; any size."""
        used, rows = members.unique(return_inverse=True)
        if len(used) < self.d_ff:
            for name in ("gate", "up", "down", "gate_bias", "up_bias"):
                if (tensor := getattr(self, name)) is not None:
                    setattr(self, name, nn.Parameter(tensor[used], tensor.requires_grad))
            if self.idle_mean is not None:  # of what goes, the mean is in the bias
                self.idle_mean = self.idle_mean[used]
        self.members, self.importance = rows, None

    @property
    def experts(self) -> int:
        return len(self.members)

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return self.members.shape[1]

    @property
    def masks(self) -> Tensor:
        """(experts, d_ff) bool: which neurons each expert has."""
        empty = torch.zeros(self.experts, self.d_ff, dtype=torch.bool, device=self.members.device)
        return empty.scatter_(1, self.members, True)

    def expert_of(self, x: Tensor) -> Tensor:
        """(tokens,) int64: the expert that each token runs. x: (tokens, d_model)."""
        return self.router(x).argmax(-1)

    def select(self, x: Tensor) -> Tensor:
        """(tokens, experts) bool: the same, as routed_mlp.py has it."""
        return F.one_hot(self.expert_of(x), self.experts).bool()

    def one_token(self) -> OneToken | None:
        members = self.members.cpu().numpy()
        if (linear := getattr(self.router, "linear", None)) is not None:
            return one_token.one_expert(self, members, linear)
        return one_token.given(
            self, lambda x: members[self.expert_of(torch.from_numpy(x)[None].to(self.up.dtype))[0]]
        )

    def _one(self, x: Tensor) -> Tensor:
        return self._of_rows(x, self.members[self.expert_of(x)[0]])

    def _many(self, x: Tensor) -> Tensor:
        if self.size * x.shape[1] * len(x) / self.experts < GROUPED_FROM[x.element_size()]:
            return super()._many(x)
        y = torch.zeros_like(x)
        expert = self.expert_of(x)
        counts = torch.bincount(expert, minlength=self.experts).tolist()
        by_expert = expert.argsort(stable=True).split(counts)
        for rows, tokens in zip(self.members, by_expert, strict=True):
            if len(tokens):
                y = self._add_for(y, x, tokens, rows)
        return y

    def summed(self, x: Tensor) -> Tensor:
        return self._activations(x, slice(None)) * self.masks[self.expert_of(x)]

    @property
    def neurons_per_token(self) -> float:
        return self.size

    @property
    def idle_parameters(self) -> float:
        """Parameters that a token does not meet."""
        return (self.d_ff - self.size) * self.matrices * self.up.shape[1]

    @property
    def macs_per_token(self) -> float:
        """Multiply-adds in weight matrices, router included."""
        return getattr(self.router, "macs", 0) + self.size * self.matrices * self.up.shape[1]

    def extra_repr(self) -> str:
        return f"experts={self.experts}×{self.size} of {self.d_ff} neurons"
