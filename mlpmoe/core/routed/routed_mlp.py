"""RoutedMLP: shared neurons and experts chosen per token. NeuronMLP: single neurons chosen."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gpu, one_token
from ..kernels.choice import run_one
from ..kernels.one_token import OneToken
from ..kernels.rows import dot_rows, sum_rows
from ..mlps import MLPWeights
from .choosing import best, choose, choose_neurons, sizes

# Multiply-adds of a matrix of one expert with its tokens, by bytes per number, from which experts
# one by one paid on two CPU cores (d_ff 1536 and 4864, 16 to 64 experts, 64 and 512 tokens).
# A rule, and not tried out as one token is, so that the same text has the same perplexity.
GROUPED_FROM = {8: 2e6, 4: 2e6, 2: 3e7}

# Tokens of an expert are filled up to a multiple of this: torch prepares a product anew for every
# number of rows that it has not met, and with each text all of them are others.
PADDED_TO = 16


class NeuronRows(nn.Module):
    """The neurons of an MLP as rows of three matrices, so that some of them can be run alone.

    `down` is stored transposed: row i belongs to neuron i, as in gate and up. Neurons that do not
    run count with their mean, if one is given: h_i - mean_i is added up over those that run, and
    Σ mean_i · down_i over all is part of the bias.
    """

    def __init__(self, weights: MLPWeights, idle_mean: Tensor | None) -> None:
        super().__init__()
        down = weights.down.detach().T.contiguous()
        bias = None if weights.down_bias is None else weights.down_bias.detach()
        if idle_mean is not None:
            idle_mean = idle_mean.to(down.device)
            filled = (idle_mean @ down.float()).to(down.dtype)
            bias = filled if bias is None else bias + filled
            idle_mean = idle_mean.to(down.dtype)
        self.gate, self.up = _rows(weights.gate), _rows(weights.up)  # (d_ff, d_model)
        self.down = nn.Parameter(down)  # (d_ff, d_model)
        self.gate_bias, self.up_bias = _rows(weights.gate_bias), _rows(weights.up_bias)  # (d_ff,)
        self.down_bias = _rows(bias)  # (d_model,)
        self.register_buffer("idle_mean", idle_mean)  # (d_ff,), 0 for neurons that always run
        self.act_fn = weights.activation
        self.adds_residual = weights.adds_residual

    @property
    def d_ff(self) -> int:
        return self.down.shape[0]

    @property
    def matrices(self) -> int:
        """Weight matrices of which a neuron owns a row."""
        return 2 if self.gate is None else 3

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.is_cuda:
            y = gpu.run(self, flat, self.one if len(flat) == 1 else self.many)
        else:
            y = run_one(self, flat, self.one) if len(flat) == 1 else self.many(flat)
        y = y.view_as(x)
        return y if residual is None else y + residual

    def one(self, x: Tensor) -> Tensor:
        """(1, d_model) -> (1, d_model): only the rows that are chosen are read, by torch."""
        return self._with_bias(self._one(x))

    def many(self, x: Tensor) -> Tensor:
        """(tokens, d_model) -> (tokens, d_model), as matrix products. What one token costs less,
        and what is compiled, agree with this."""
        return self._with_bias(self._many(x))

    def one_token(self) -> OneToken | None:
        """The compiled form, of one token."""
        raise NotImplementedError

    def kernel(self, tokens: int) -> gpu.Run | None:
        """What runs on a GPU in place of `one` or `many`."""
        return None

    @property
    def fixed(self) -> bool:
        """Whether it is known how many neurons run, before a token is."""
        return False

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.down_bias is None else y + self.down_bias

    def _one(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _many(self, x: Tensor) -> Tensor:
        return self.summed(x) @ self.down

    def summed(self, x: Tensor) -> Tensor:
        """(tokens, d_ff): what down adds up: h of the neurons that run, less its mean when idle,
        and 0 for the others. x: (tokens, d_model)."""
        raise NotImplementedError

    def _project_rows(self, x: Tensor, name: str, rows: Tensor) -> Tensor:
        """(n,): gate or up of one token (1, d_model) for some neurons."""
        values, bias = dot_rows(x, getattr(self, name), rows), getattr(self, f"{name}_bias")
        return values if bias is None else values + bias[rows]

    def _of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """(1, d_model): what some neurons add to the output of one token (1, d_model)."""
        h = self._project_rows(x, "up", rows)
        if self.gate is None:
            h = self.act_fn(h)
        else:
            h = self.act_fn(self._project_rows(x, "gate", rows)) * h
        return self._sum(h, rows)

    def _activations(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """(tokens, n): h of these neurons for all tokens, less its mean when idle."""

        def project(matrix: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, matrix[rows], None if bias is None else bias[rows])

        h = project(self.up, self.up_bias)
        if self.gate is None:
            h = self.act_fn(h)
        else:
            h = self.act_fn(project(self.gate, self.gate_bias)) * h
        return h if self.idle_mean is None else h - self.idle_mean[rows]

    def _add_for(self, y: Tensor, x: Tensor, tokens: Tensor, rows: Tensor | slice) -> Tensor:
        """y, to which what some neurons say of these tokens is added. y, x: (all tokens, d_model);
        tokens: (n,) int64."""
        filled = F.pad(tokens, (0, -len(tokens) % PADDED_TO))
        said = self._activations(x.index_select(0, filled), rows) @ self.down[rows]
        return y.index_add_(0, tokens, said[: len(tokens)])

    def _sum(self, h: Tensor, rows: Tensor) -> Tensor:
        """(1, d_model): what some neurons of one token add to the output."""
        h = h if self.idle_mean is None else h - self.idle_mean[rows]
        return sum_rows(h, self.down, rows)


class RoutedMLP(NeuronRows):
    """Shared neurons run for every token, experts where the router wants them.

        y = E_shared(x) + Σ_{e chosen} E_e(x)            (ExpertWeaver, section 3.4)

    No gate weights: a chosen expert counts exactly 1, so with all experts chosen the sum is the
    dense MLP. One token reads only the rows of its experts. Of many tokens, each expert is one
    product with those that chose it; where such products are too small to pay (GROUPED_FROM), all
    experts run, masked.

    weights: neurons in the order shared, expert 0, expert 1, ... shared: how many are shared.
    experts: routed ones, of equal size. router: (tokens, d_model) -> scores (tokens, experts).
    active: experts chosen per token; with a `threshold`, all above it are, and `active` is the
    mean on the calibration text. Ties go to the expert of lower index.
    """

    def __init__(
        self,
        weights: MLPWeights,
        shared: int,
        experts: int,
        router: nn.Module | None,
        active: float,
        threshold: float | None = None,
        idle_mean: Tensor | None = None,
    ) -> None:
        super().__init__(weights, idle_mean)
        self.shared, self.experts, self.active = shared, experts, active
        self.size = (weights.d_ff - shared) // experts if experts else 0
        self.threshold = threshold
        self.router = router

    def select(self, x: Tensor) -> Tensor:
        """(tokens, experts) bool: which experts each token runs. x: (tokens, d_model)."""
        if not self.chooses:
            return x.new_ones(len(x), self.experts, dtype=torch.bool)
        return choose(self.router(x), int(self.active), self.threshold)

    def one_token(self) -> OneToken | None:
        parts = getattr(self.router, "linear", None)
        choice = self.active, self.threshold
        if self.chooses and parts is not None:
            return one_token.experts(self, self.shared, self.size, parts, choice)
        every, shared = np.arange(self.d_ff), np.arange(self.shared)

        def chosen(x: np.ndarray) -> np.ndarray:
            rows = self._rows(torch.from_numpy(x)[None].to(self.up.dtype))
            return np.concatenate([shared, rows.numpy()])

        return one_token.given(self, chosen if self.chooses else lambda x: every)

    @property
    def chooses(self) -> bool:
        return self.active != self.experts or self.threshold is not None

    @property
    def fixed(self) -> bool:
        return self.threshold is None

    def chosen(self, x: Tensor) -> Tensor:
        """(tokens, active) int64: the experts of each token, the best first, where so many are
        `fixed`. x: (tokens, d_model)."""
        return best(self.router(x), int(self.active))

    def always(self, x: Tensor) -> Tensor:
        """(tokens, d_model): what the shared neurons add. x: (tokens, d_model)."""
        return self._slice(x, 0, self.shared)

    def kernel(self, tokens: int) -> gpu.Run | None:
        if not self.fixed or not self.chooses or self.active < 1:
            return None
        return gpu.experts(self, tokens)

    def _rows(self, x: Tensor) -> Tensor:
        """(n,) int64: the neurons of the experts that one token (1, d_model) chooses."""
        if self.fixed and self.chooses and x.device.type != "cpu":
            experts = self.chosen(x).T  # (k, 1), without waiting for the device
        else:
            experts = self.select(x)[0].nonzero()  # (k, 1), ascending
        inside = torch.arange(self.size, device=x.device)
        return (self.shared + experts * self.size + inside).flatten()

    def _one(self, x: Tensor) -> Tensor:
        y = self.always(x)
        rows = self._rows(x)
        if not len(rows):
            return y
        return y + self._of_rows(x, rows)

    def _many(self, x: Tensor) -> Tensor:
        chosen = self.select(x)
        work = self.size * x.shape[1] * len(x) * self.active / max(1, self.experts)
        if work < GROUPED_FROM[x.element_size()]:
            return self._masked(x, chosen) @ self.down
        return self._grouped(x, chosen)

    def summed(self, x: Tensor) -> Tensor:
        return self._masked(x, self.select(x))

    def _masked(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(tokens, d_ff): all neurons run, and what was not chosen is masked."""
        h = self._activations(x, slice(None))
        if not self.experts:
            return h
        runs = chosen.to(h.dtype).repeat_interleave(self.size, 1)
        if torch.is_grad_enabled():
            return torch.cat([h[:, : self.shared], h[:, self.shared :] * runs], dim=1)
        h[:, self.shared :].mul_(runs)
        return h

    def _slice(self, x: Tensor, start: int, stop: int) -> Tensor:
        """What neurons start to stop, run for all tokens, add to the output."""
        rows = slice(start, stop)
        return self._activations(x, rows) @ self.down[rows]

    def _grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Expert by expert, with the tokens that chose it."""
        y = self.always(x)
        expert, token = chosen.T.nonzero(as_tuple=True)
        counts = torch.bincount(expert, minlength=self.experts).tolist()
        for number, tokens in enumerate(token.split(counts)):
            if len(tokens):
                start = self.shared + number * self.size
                y = self._add_for(y, x, tokens, slice(start, start + self.size))
        return y

    @property
    def neurons_per_token(self) -> float:
        """Neurons that run for a token, on average."""
        return self.shared + self.active * self.size

    @property
    def idle_parameters(self) -> float:
        """Parameters that a token does not meet, on average."""
        return (self.d_ff - self.neurons_per_token) * self.matrices * self.up.shape[1]

    @property
    def macs_per_token(self) -> float:
        """Multiply-adds in weight matrices, router included."""
        router = 0 if self.active == self.experts else getattr(self.router, "macs", 0)
        return router + self.neurons_per_token * self.matrices * self.up.shape[1]

    def extra_repr(self) -> str:
        return (
            f"shared={self.shared}, experts={self.experts}×{self.size}, active={self.active:.4g}"
            + ("" if self.threshold is None else f", threshold={self.threshold:.4g}")
        )


class NeuronMLP(NeuronRows):
    """The gate is computed in full and chooses the neurons; up and down run for these only.

    AbsTopK-GLU (ExpertWeaver, section 2.2) with a number of neurons, CATS (arXiv 2404.08763) with
    a threshold. Many tokens together need every neuron, so they run dense and what was not chosen
    is masked; one token reads only the rows it chose. An MLP without a gate computes up in full
    and saves in down only.

    weights: as read. importance: (d_ff,) factor on |φ(gate x)|, or None. active: neurons per
    token; with a `threshold`, the mean on the calibration text.
    """

    def __init__(
        self,
        weights: MLPWeights,
        importance: Tensor | None,
        active: float,
        threshold: float | None = None,
        idle_mean: Tensor | None = None,
    ) -> None:
        super().__init__(weights, idle_mean)
        self.active, self.threshold = active, threshold
        self.register_buffer("importance", importance)

    def one_token(self) -> OneToken | None:
        return one_token.neurons(self, self.importance, (self.active, self.threshold))

    @property
    def fixed(self) -> bool:
        return self.threshold is None

    def kernel(self, tokens: int) -> gpu.Run | None:
        return gpu.single(self) if self.fixed and tokens == 1 else None

    def chosen(self, gated: Tensor) -> Tensor:
        """(tokens, active) int64: the neurons of each token, in any order, where so many are
        `fixed`. gated: (tokens, d_ff)."""
        scores = sizes(gated, self.importance)
        return scores.topk(int(self.active), dim=-1, sorted=False).indices

    def gated(self, x: Tensor) -> Tensor:
        """(tokens, d_ff): φ(gate x), by which neurons are chosen."""
        if self.gate is None:
            return self.act_fn(F.linear(x, self.up, self.up_bias))
        return self.act_fn(F.linear(x, self.gate, self.gate_bias))

    def select(self, x: Tensor) -> Tensor:
        """(tokens, d_ff) bool: which neurons each token runs."""
        return self._select(self.gated(x))

    def _select(self, gated: Tensor) -> Tensor:
        return choose_neurons(gated, self.importance, int(self.active), self.threshold)

    def _one(self, x: Tensor) -> Tensor:
        gated = self.gated(x)
        if self.fixed and x.device.type != "cpu":
            rows = self.chosen(gated)[0]  # without waiting for the device
        else:
            rows = self._select(gated)[0].nonzero()[:, 0]  # ascending
        h = gated[0, rows]
        if self.gate is not None:
            h = h * self._project_rows(x, "up", rows)
        return self._sum(h, rows)

    def summed(self, x: Tensor) -> Tensor:
        gated = self.gated(x)
        chosen = self._select(gated)
        h = gated if self.gate is None else gated * F.linear(x, self.up, self.up_bias)
        return (h if self.idle_mean is None else h - self.idle_mean) * chosen

    @property
    def neurons_per_token(self) -> float:
        """Neurons that run for a token, on average."""
        return self.active

    @property
    def idle_parameters(self) -> float:
        """Parameters that a token does not meet, on average."""
        return (self.d_ff - self.active) * (self.matrices - 1) * self.up.shape[1]

    @property
    def macs_per_token(self) -> float:
        """Multiply-adds in weight matrices: the first in full, the others for chosen neurons."""
        return (self.d_ff + self.active * (self.matrices - 1)) * self.up.shape[1]

    def extra_repr(self) -> str:
        return f"d_ff={self.d_ff}, active={self.active:.4g}" + (
            "" if self.threshold is None else f", threshold={self.threshold:.4g}"
        )


def _rows(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)
