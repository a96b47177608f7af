"""BranchedMLP: the static mixture as one fused module, and the paper's loop as reference."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import one_token
from ..kernels.choice import run_one
from ..kernels.one_token import OneToken
from ..mlps import MLPWeights


def branch_sizes(d_ff: int, branches: int) -> tuple[int, ...]:
    """Neurons per branch, as torch.tensor_split cuts: the first d_ff mod B get one more."""
    size, extra = divmod(d_ff, branches)
    return tuple(size + (b < extra) for b in range(branches))


def keep_neurons(weights: MLPWeights, count: int) -> MLPWeights:
    """The MLP of the first `count` neurons, as views: nothing is copied. The bias of down
    belongs to no neuron and stays whole."""
    if count == weights.d_ff:
        return weights

    def first(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[:count]

    return replace(
        weights,
        gate=first(weights.gate),
        up=first(weights.up),
        down=weights.down.detach()[:, :count],
        gate_bias=first(weights.gate_bias),
        up_bias=first(weights.up_bias),
    )


class BranchedMLP(nn.Module):
    """The sum of branches, each times its α, as three matrix products (MLPMoE, section 3.1).

        y = Σ_b α_b · down_b [ act(gate_b x) ⊙ (up_b x) ] + down_bias

    A branch is a slice of neurons, so Σ_b over slices is the product with the whole matrix and
    α_b scales the neurons of its branch: no loop, and sums are accumulated inside the matrix
    product instead of being rounded B times.

    weights: MLPWeights of the kept neurons; its tensors are used as they are, not copied.
    sizes: neurons of each kept branch. alpha: initial α, one for all or (K,). branches: B before
    any were dropped. fade_thresholds: per projection and branch, for display.
    `forward(x)`: (..., d_model) -> (..., d_model). Dropout of the original is not carried over.
    """

    def __init__(
        self,
        weights: MLPWeights,
        sizes: tuple[int, ...],
        alpha: float | Tensor = 1.0,
        branches: int | None = None,
        fade_thresholds: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.branches = branches or len(sizes)
        self.sizes = sizes
        self.fade_thresholds = fade_thresholds or {}
        self.adds_residual = weights.adds_residual
        self.gate_proj = None
        if weights.gate is not None:
            self.gate_proj = _linear(weights.gate, weights.gate_bias)
        self.up_proj = _linear(weights.up, weights.up_bias)
        self.down_proj = _linear(weights.down, weights.down_bias)
        self.act_fn = weights.activation
        up = weights.up
        factors = torch.as_tensor(alpha, dtype=up.dtype, device=up.device).expand(len(sizes))
        self.alpha = nn.Parameter(factors.clone())
        self._plain = False  # whether every α was 1 when it was looked at
        index = _branch_of_neuron(sizes, weights.up.device)
        self.register_buffer("branch_of_neuron", index, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.numel() == x.shape[-1]:
            y = run_one(self, x.reshape(1, -1), self.many).view_as(x)
        else:
            y = self.many(x)
        return y if residual is None else y + residual

    def many(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model), as matrix products."""
        h = self.up_proj(x)  # (..., d_ff)
        h = self.act_fn(h) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * h
        if torch.is_grad_enabled() or not self._is_plain(x):
            alpha = self.alpha.index_select(0, self.branch_of_neuron)  # (d_ff,)
            h = h * alpha if torch.is_grad_enabled() else h.mul_(alpha)
        return self.down_proj(h)  # (..., d_model)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether every α is known to be 1, so that one token on a GPU may save two launches. A
        graph that is being recorded cannot look, and takes what was seen just before."""
        if not x.is_cuda or x.numel() != x.shape[-1] or torch.compiler.is_compiling():
            return False
        if not torch.cuda.is_current_stream_capturing():
            self._plain = bool((self.alpha == 1).all())
        return self._plain

    def one_token(self) -> OneToken | None:
        """The compiled form, of one token."""
        alpha = self.alpha.detach()
        scale = None if (alpha == 1).all() else alpha.index_select(0, self.branch_of_neuron)
        return one_token.dense(self.weights, scale)

    @property
    def weights(self) -> MLPWeights:
        """Of the neurons that are kept, without α."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return MLPWeights(
            gate=None if gate is None else gate.weight,
            up=up.weight,
            down=down.weight,
            gate_bias=None if gate is None else gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            activation=self.act_fn,
            adds_residual=self.adds_residual,
        )

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The linear layers by the names of the projections; plain MLPs have no gate."""
        linears = {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}
        return {name: linear for name, linear in linears.items() if linear is not None}

    def folded(self, width: int | None = None) -> MLPWeights:
        """The same function as the weights of a plain MLP: α multiplied into down.

        width: neurons, at least those there are; what is missing is filled up with neurons of
        zeros, which say exactly 0 whatever the activation. So layers of different widths fit an
        architecture that has one.
        """
        missing = 0 if width is None else width - sum(self.sizes)
        if missing < 0:
            raise UserError(f"{sum(self.sizes)} neurons do not fit into a width of {width}.")

        def padded(tensor: Tensor, *pad: int) -> Tensor:
            return F.pad(tensor.detach(), pad) if missing else tensor.detach()

        def rows(linear: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
            if linear is None:
                return None, None
            bias = linear.bias
            return (
                padded(linear.weight, 0, 0, 0, missing),
                None if bias is None else padded(bias, 0, missing),
            )

        gate, gate_bias = rows(self.gate_proj)
        up, up_bias = rows(self.up_proj)
        down = self.down_proj.weight.detach()
        if (self.alpha != 1).any():
            down = down * self.alpha.detach().index_select(0, self.branch_of_neuron)
        return MLPWeights(
            gate=gate,
            up=up,
            down=padded(down, 0, missing),
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=None if self.down_proj.bias is None else self.down_proj.bias.detach(),
            activation=self.act_fn,
            adds_residual=self.adds_residual,
        )

    def extra_repr(self) -> str:
        return f"branches={self.branches}, keep={len(self.sizes)}, d_ff={sum(self.sizes)}"


class LoopedMLP(nn.Module):
    """The paper's module: one small MLP per branch, run in a Python loop and summed.

    For tests and the benchmark, which compare the fused module with it. Weights are views of
    the BranchedMLP's.
    """

    def __init__(self, fused: BranchedMLP) -> None:
        super().__init__()
        pieces = [
            [None] * len(fused.sizes) if linear is None else _split(linear, fused.sizes)
            for linear in (fused.gate_proj, fused.up_proj)
        ]
        downs = fused.down_proj.weight.detach().split(fused.sizes, dim=1)
        self.gates = nn.ModuleList(pieces[0])
        self.ups = nn.ModuleList(pieces[1])
        self.downs = nn.ModuleList(_linear(down, None) for down in downs)
        self.down_bias = fused.down_proj.bias
        self.act_fn = fused.act_fn
        self.alpha = fused.alpha

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.zeros_like(x)
        for b in range(len(self.downs)):
            y = y + self.branch(b, x)
        if self.down_bias is not None:
            y = y + self.down_bias
        return y if residual is None else y + residual

    def branch(self, b: int, x: Tensor) -> Tensor:
        """α_b times the output of branch b."""
        gate, up = self.gates[b], self.ups[b](x)
        return self.alpha[b] * self.downs[b](
            self.act_fn(up) if gate is None else self.act_fn(gate(x)) * up
        )


@lru_cache(maxsize=64)
def _branch_of_neuron(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(d_ff,) int32: the branch each neuron belongs to; one tensor for all layers alike."""
    with torch.inference_mode(False):  # or it could never be part of a backward pass
        counts = torch.tensor(sizes)
        return torch.repeat_interleave(torch.arange(len(sizes)), counts).int().to(device)


def _split(linear: nn.Linear, sizes: tuple[int, ...]) -> list[nn.Linear]:
    weights = linear.weight.detach().split(sizes)
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.detach().split(sizes)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear around existing tensors; a Parameter stays the very same Parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _parameter(weight)
    linear.bias = None if bias is None else _parameter(bias)
    return linear


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
