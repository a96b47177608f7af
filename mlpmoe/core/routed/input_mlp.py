"""InputMLP: each matrix reads the most important of its inputs only, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import one_token
from ..kernels.one_token import OneToken
from ..kernels.rows import sum_rows
from ..mlps import MLPWeights
from .choosing import choose, sizes
from .routed_mlp import NeuronRows

NEVER, ALL = -1.0, -1.0  # score of what is not computed; the threshold that all computed ones pass


class Stages(NamedTuple):
    """A number for each choice that is made for a token, in the order in which they are made."""

    inputs: float  # entries of x that gate reads, and up where no neurons are opened
    opened: float  # neurons that up is computed for, by their gate; all where up reads `inputs`
    read: float  # neurons that down reads


Choose = Callable[[str, Tensor], Tensor]  # a stage and its scores -> what is chosen, bool


class InputMLP(NeuronRows):
    """Gate and up read the chosen entries of x, down reads the chosen neurons.

    Scores are |x_j| and |h_i|, of gate, up and down alike (TEAL, arXiv 2408.14690), times the
    lengths of the columns that they meet where importances are given (WINA, arXiv 2505.19427).
    If `opens`, up reads all of x, but is computed only for the neurons with the largest
    |φ(gate)| times importance, of which down reads some. One token reads only what it chose; for
    many tokens the products are dense, with zeros in place of what was not chosen.

    weights: as read. opens: needs a gate. input_importance: (d_model,), importance: (d_ff,),
    float32, or None. active: entries and neurons per token; with `thresholds` on the scores, the
    mean on the calibration text.
    """

    def __init__(
        self,
        weights: MLPWeights,
        opens: bool,
        input_importance: Tensor | None,
        importance: Tensor | None,
        active: Stages,
        thresholds: Stages | None = None,
        idle_mean: Tensor | None = None,
    ) -> None:
        super().__init__(weights, idle_mean)
        self.opens, self.active, self.thresholds = opens, active, thresholds
        for name in self.by_columns:  # in memory by columns: what an entry of x meets
            matrix = getattr(weights, name).detach()
            setattr(self, name, nn.Parameter(matrix.T.contiguous().T))  # (d_ff, d_model)
        self.register_buffer("input_importance", input_importance)
        self.register_buffer("importance", importance)

    @property
    def by_columns(self) -> tuple[str, ...]:
        """The matrices that read chosen entries of x, the first one first."""
        if self.gate is None:
            return ("up",)
        return ("gate",) if self.opens else ("gate", "up")

    def input_scores(self, x: Tensor) -> Tensor:
        """(tokens, d_model), of x."""
        return sizes(x, self.input_importance)

    def products(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """φ(gate x) and h, both (tokens, d_ff), of all neurons, where gate (and up, unless
        neurons are opened) reads the chosen entries of x only; both h where there is no gate."""
        some = x * chosen
        if self.gate is None:
            h = self.act_fn(F.linear(some, self.up, self.up_bias))
            return h, h
        gated = self.act_fn(F.linear(some, self.gate, self.gate_bias))
        return gated, gated * F.linear(x if self.opens else some, self.up, self.up_bias)

    def opened(self, gated: Tensor, choose: Choose) -> Tensor | None:
        """(tokens, d_ff) bool: which neurons up is computed for, given φ(gate x); None: all."""
        return choose("opened", sizes(gated, self.importance)) if self.opens else None

    def reads(self, h: Tensor, opened: Tensor | None, choose: Choose) -> Tensor:
        """(tokens, d_ff) bool: which neurons down reads, of those that are opened."""
        scores = sizes(h, self.importance)
        return choose("read", scores if opened is None else torch.where(opened, scores, NEVER))

    def choose(self, stage: str, scores: Tensor) -> Tensor:
        """Bool like scores: the highest of each token, or all above the threshold of a stage."""
        threshold = None if self.thresholds is None else getattr(self.thresholds, stage)
        return choose(scores, int(getattr(self.active, stage)), threshold)

    def run(self, x: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        """h (tokens, d_ff), and which of it down reads."""
        gated, h = self.products(x, choose("inputs", self.input_scores(x)))
        return h, self.reads(h, self.opened(gated, choose), choose)

    def select(self, x: Tensor) -> Tensor:
        """(tokens, d_ff) bool: which neurons down reads. x: (tokens, d_model)."""
        return self.run(x, self.choose)[1]

    def summed(self, x: Tensor) -> Tensor:
        h, chosen = self.run(x, self.choose)
        return (h if self.idle_mean is None else h - self.idle_mean) * chosen

    def one_token(self) -> OneToken | None:
        none = Stages(None, None, None)
        return one_token.inputs(
            self, self.by_columns, self.input_importance, self.importance,
            list(zip(self.active, self.thresholds or none, strict=True)),
        )  # fmt: skip

    def _one(self, x: Tensor) -> Tensor:
        inputs = _indices(self.choose("inputs", self.input_scores(x)))
        first, *second = (self._read_columns(x, name, inputs) for name in self.by_columns)
        gated = self.act_fn(first)
        h = gated * second[0] if second else gated
        opened = self.opened(gated, self.choose)
        if opened is not None:
            rows = _indices(opened)
            h = torch.zeros_like(gated)
            h[0, rows] = gated[0, rows] * self._project_rows(x, "up", rows)
        rows = _indices(self.reads(h, opened, self.choose))
        return self._sum(h[0, rows], rows)

    def _read_columns(self, x: Tensor, name: str, rows: Tensor) -> Tensor:
        """(1, d_ff): gate or up of one token (1, d_model), from some entries of it."""
        matrix, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if len(rows) == x.shape[1]:
            return F.linear(x, matrix, bias)
        values = sum_rows(x[0, rows], matrix.T, rows)
        return values if bias is None else values + bias

    @property
    def neurons_per_token(self) -> float:
        """Neurons that down reads for a token, on average."""
        return self.active.read

    @property
    def idle_parameters(self) -> float:
        """Parameters that a token does not meet, on average."""
        return self.matrices * self.down.numel() - self.macs_per_token

    @property
    def macs_per_token(self) -> float:
        """Multiply-adds in weight matrices: chosen columns of those that read chosen entries of x,
        opened rows of up where it reads all of x, and chosen columns of down."""
        d_ff, d_model = self.down.shape
        rows = self.active.opened if self.opens else 0
        return (
            len(self.by_columns) * self.active.inputs * d_ff + (rows + self.active.read) * d_model
        )

    def extra_repr(self) -> str:
        names = [name for name in Stages._fields if self.opens or name != "opened"]
        parts = [f"d_ff={self.d_ff}"]
        parts += [f"{name}={getattr(self.active, name):.4g}" for name in names]
        if self.thresholds is not None:
            values = (f"{getattr(self.thresholds, name):.4g}" for name in names)
            parts.append(f"thresholds=({', '.join(values)})")
        return ", ".join(parts)


def _indices(chosen: Tensor) -> Tensor:
    """(n,) int64: what is chosen for a single token (1, count)."""
    return chosen[0].nonzero()[:, 0]
