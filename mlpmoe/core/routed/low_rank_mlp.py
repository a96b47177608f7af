"""LowRankMLP: every matrix is the product of two narrow ones."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import one_token
from ..kernels.choice import run_one
from ..kernels.one_token import OneToken
from ..kernels.rows import sum_rows
from .choosing import choose


class Factors(nn.Module):
    """A matrix (m, n) as the sum of rank-one experts, or directions: Σ_i second_i first_iᵀ.

    For a token x, z_i = first_i · x + offset_i says how large each is; the `kept` largest |z_i|
    count. first: (directions, n). second: (directions, m), of orthogonal rows of length 1, so that
    no other choice of as many is nearer to all of them. offset: (directions,). bias: (m,).
    """

    def __init__(
        self, first: Tensor, second: Tensor, kept: int, offset: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        self.offset = None if offset is None else nn.Parameter(offset)
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.kept = kept

    @property
    def directions(self) -> int:
        return len(self.first)

    def sizes(self, x: Tensor) -> Tensor:
        """(tokens, directions): z of x (tokens, n)."""
        return F.linear(x, self.first, self.offset)

    def choose(self, z: Tensor) -> Tensor:
        """(tokens, directions) bool: which of them count."""
        return choose(z.abs(), self.kept, None)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, n) -> (tokens, m)."""
        z = self.sizes(x)
        if len(x) == 1 and self.kept < self.directions:
            rows = self.choose(z)[0].nonzero()[:, 0]
            y = sum_rows(z[0, rows], self.second, rows)
        else:
            y = (z if self.kept == self.directions else z * self.choose(z)) @ self.second
        return y if self.bias is None else y + self.bias

    @property
    def macs(self) -> int:
        """Multiply-adds for a token."""
        return self.first.numel() + self.kept * self.second.shape[1]

    def extra_repr(self) -> str:
        n, m = self.first.shape[1], self.second.shape[1]
        return f"{n} to {m}, kept={self.kept} of {self.directions}"


class LowRankMLP(nn.Module):
    """An MLP of which each matrix is in two factors: down(φ(gate x) ⊙ up x), or down(φ(up x)).

    One token reads, of the second factors, the rows of its directions only.
    """

    def __init__(
        self,
        gate: Factors | None,
        up: Factors,
        down: Factors,
        activation: Callable[[Tensor], Tensor],
        adds_residual: bool,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.act_fn, self.adds_residual = activation, adds_residual

    @property
    def projections(self) -> dict[str, Factors]:
        """By name, those that there are."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: factors for name, factors in named.items() if factors is not None}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        flat = x.reshape(-1, x.shape[-1])
        y = run_one(self, flat, self.many) if len(flat) == 1 else self.many(flat)
        y = y.view_as(x)
        return y if residual is None else y + residual

    def many(self, x: Tensor) -> Tensor:
        """(tokens, d_model) -> (tokens, d_model), by torch."""
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """(tokens, d_ff): what down reads."""
        h = self.up(x)
        return self.act_fn(h) if self.gate is None else self.act_fn(self.gate(x)) * h

    def select(self, x: Tensor) -> Tensor:
        """(tokens, directions) bool: which directions of down each token uses."""
        return self.down.choose(self.down.sizes(self.hidden(x)))

    def one_token(self) -> OneToken | None:
        return one_token.low_rank(self.act_fn, self.gate, self.up, self.down)

    @property
    def d_ff(self) -> int:
        return self.up.second.shape[1]

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense MLP."""
        return sum(f.first.shape[1] * f.second.shape[1] for f in self.projections.values())

    @property
    def idle_parameters(self) -> float:
        """Parameters that a token does not meet."""
        return sum((f.directions - f.kept) * f.second.shape[1] for f in self.projections.values())

    @property
    def macs_per_token(self) -> float:
        """Multiply-adds in weight matrices."""
        return sum(factors.macs for factors in self.projections.values())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {f.extra_repr()}" for name, f in self.projections.items())
