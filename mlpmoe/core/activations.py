"""What one MLP does on a calibration text: figures that the stages of a conversion ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import gcd
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlps import MLPWeights
from .stopping import may_stop
from .wide import wide_sum, wide_zeros

T = TypeVar("T")

CHUNK = 2**22  # activations (neurons × tokens) held at a time; work may stop between
PRODUCT_ROWS = 4096  # tokens in a product of inputs with themselves, likewise


def hidden(weights: MLPWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """φ(gate x) and h, both (..., d_ff) float32, of inputs x (..., d_model). A plain MLP has no
    gate; its activation act(up x) stands in for both."""
    up = F.linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        h = weights.activation(up).float()
        return h, h
    gated = weights.activation(F.linear(x, weights.gate, weights.gate_bias))
    return gated.float(), (gated * up).float()


def _with_ones(h: Tensor) -> Tensor:
    """(tokens, d_ff + 1): h and a column of ones, whose products are sums."""
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1)


def _means(total: Tensor, mask: Tensor) -> Tensor:
    """(N, ...) float32 on the CPU: sums (N, n) over the tokens in which `mask` (tokens, N) holds,
    each by their number."""
    count = mask.sum(0).clamp(min=1).to(total.device)
    return (total / count[:, None]).float().cpu()


class LayerActivations:
    """The activations of one MLP on the calibration text: what the stages may ask of it.

    weights: of the MLP. x: (samples, tokens, d_model), its input. target: the output that a
    conversion should give, like x; None: what the MLP makes of x. sensitivity: (d_model, d_model)
    of the model's loss to that output, see sensitivity.py, where it was asked for. Activations h
    (of all neurons) are made again, piece by piece, for each question; only what is asked for is
    kept. Figures per neuron are float32 on the CPU, whatever the model is; sums run in float64.
    """

    def __init__(
        self,
        weights: MLPWeights,
        x: Tensor,
        target: Tensor | None = None,
        sensitivity: Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.x = x
        self.target = target
        self.sensitivity = sensitivity
        self._memory: dict[object, object] = {}

    def remembered(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once: several conversions may ask the same."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def inputs(self) -> Tensor:
        """(tokens, d_model) float32."""
        return self.x.flatten(0, 1).float()

    def spread(self, count: int) -> Tensor:
        """(count or fewer, d_model): x of tokens that are evenly spaced over the text and over the
        places in a sample: the first one is like no other."""
        step = -(-self.tokens // count)
        while gcd(step, self.x.shape[1]) > 1:
            step += 1
        return self.x.flatten(0, 1)[::step]

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which samples, then φ(gate x) and h of their tokens: (samples, tokens, d_ff) float32."""
        for where in self._some_samples():
            may_stop()
            found = hidden(self.weights, self.x[where])
            may_stop()
            yield where, *found

    def _some_samples(self) -> Iterator[slice]:
        """The samples, so many at a time that their activations are not too large."""
        step = max(1, CHUNK // (self.x.shape[1] * self.weights.d_ff))
        for first in range(0, self.x.shape[0], step):
            yield slice(first, min(first + step, self.x.shape[0]))

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One pass: gate means per sample, signed and absolute; Σh, Σ|h|, Σh²."""
        samples, d_ff = self.x.shape[0], self.weights.d_ff
        signed, absolute = self.x.new_empty((2, samples, d_ff), dtype=torch.float32)
        sums = wide_zeros(3, d_ff, device=self.x.device)
        for where, gated, h in self.pieces():
            signed[where], absolute[where] = gated.mean(1), gated.abs().mean(1)
            flat = h.flatten(0, 1)
            for total, values in zip(sums, (flat, flat.abs(), flat.square()), strict=True):
                total += wide_sum(values, 0)
        return signed.cpu(), absolute.cpu(), *sums.cpu()

    def gate_means(self, profile: str) -> Tensor:
        """(samples, d_ff): mean over the tokens of a sample of φ(gate x), "signed" or "absolute"
        (ExpertWeaver, section 3.1)."""
        return self._sums[0 if profile == "signed" else 1]

    @cached_property
    def mean(self) -> Tensor:
        """(d_ff,): mean of h."""
        return (self._sums[2] / self.tokens).float()

    @cached_property
    def mean_size(self) -> Tensor:
        """(d_ff,): mean of |h|."""
        return (self._sums[3] / self.tokens).float()

    @cached_property
    def variance(self) -> Tensor:
        """(d_ff,): variance of h."""
        mean = self._sums[2] / self.tokens
        return (self._sums[4] / self.tokens - mean.square()).clamp(min=0).float()

    @property
    def covariance(self) -> Tensor:
        """(d_ff, d_ff): covariance of h."""
        return self.moments[1]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(d_ff,) and (d_ff, d_ff): mean and covariance of h, float64, from one pass."""
        sums = wide_zeros(self.weights.d_ff + 1, self.weights.d_ff + 1, device=self.x.device)
        for _, h in self._flat_pieces():
            h = _with_ones(h)
            sums += (h.T @ h).to(sums.device)
        sums = (sums / self.tokens).cpu()
        mean = sums[:-1, -1]
        return mean, sums[:-1, :-1] - torch.outer(mean, mean)

    @cached_property
    def input_moment(self) -> Tensor:
        """(d_model, d_model): mean of x xᵀ, float64."""
        total = wide_zeros(self.weights.d_model, self.weights.d_model, device=self.x.device)
        for x in self.inputs().split(PRODUCT_ROWS):
            may_stop()
            total += (x.T @ x).to(total.device)
        return (total / self.tokens).cpu()

    def regression(
        self, n: int, activations: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of what `activations` makes of the same inputs, (tokens, d_model) -> (tokens, n) float32:
        mean (n,), covariance (n, n), covariance (n, d_model) with the wanted output; and the mean
        of that output; float64."""
        d_model = self.weights.d_model
        # [h 1]ᵀ [h 1 y], summed over the tokens: one product holds all that is asked for
        sums = wide_zeros(n + 1, n + 1 + d_model, device=self.x.device)
        for where, y in self.outputs():
            may_stop()
            left = _with_ones(activations(self.x[where].flatten(0, 1)))
            sums += (left.T @ torch.cat([left, y], dim=1)).to(sums.device)
        sums = (sums / self.tokens).cpu()
        mean, target = sums[:n, n], sums[n, n + 1 :]
        covariance = sums[:n, :n] - torch.outer(mean, mean)
        return mean, covariance, sums[:n, n + 1 :] - torch.outer(mean, target), target

    @cached_property
    def own_regression(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`regression` of this MLP's own h."""
        return self.regression(self.weights.d_ff, lambda x: hidden(self.weights, x)[1])

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """Which samples, and the output that an MLP in this place should give for their tokens:
        (tokens, d_model) float32."""
        if self.target is not None:
            for where in self._some_samples():
                yield where, self.target[where].flatten(0, 1).float()
            return
        down, bias = self.weights.down.detach().float(), self.weights.down_bias
        for where, _, h in self.pieces():
            yield where, F.linear(h.flatten(0, 1), down, None if bias is None else bias.float())

    @cached_property
    def down_norms(self) -> Tensor:
        """(d_ff,): length of each neuron's column of down."""
        return self.weights.down.detach().float().norm(dim=0).cpu()

    def markers(self, count: int) -> Tensor:
        """(tokens, d_ff) bool: the `count` largest |h| of each token, with x and the rows of gate
        and up scaled to length 1 (CMoE; the scaling is in its code only)."""
        w = self.weights
        rows = [None if m is None else F.normalize(m, dim=-1) for m in (w.gate, w.up)]
        scaled = LayerActivations(
            MLPWeights(*rows, w.down, None, None, None, w.activation), F.normalize(self.x, dim=-1)
        )
        markers = torch.zeros((self.tokens, w.d_ff), dtype=torch.bool, device=self.x.device)
        for where, h in scaled._flat_pieces():
            markers[where].scatter_(1, h.abs().topk(min(count, w.d_ff), dim=1).indices, True)
        return markers.cpu()

    def sizes(self, count: int) -> Tensor:
        """(count or fewer, d_ff): |h| of tokens evenly spaced over the text."""
        step = -(-self.tokens // count)
        return torch.cat(
            [h[-where.start % step :: step].abs().cpu() for where, h in self._flat_pieces()]
        )

    def mass(self, groups: Tensor, weight: Tensor | None = None) -> Tensor:
        """(tokens, N): Σ |h_i|·weight_i over the neurons of each group; groups (N, m)."""
        mass = self.x.new_empty((self.tokens, len(groups)), dtype=torch.float32)
        member = None
        if groups.numel() > self.weights.d_ff:  # they overlap: then a product copies less
            member = mass.new_zeros(len(groups), self.weights.d_ff)
            member.scatter_(1, groups.to(mass.device), 1)
        for where, h in self._flat_pieces():
            size = h.abs_() if weight is None else h.abs_().mul_(weight.to(h.device))
            if member is not None:
                mass[where] = size @ member.T
            else:
                mass[where] = size[:, groups.flatten()].unflatten(1, groups.shape).sum(-1)
        return mass

    def mean_where(self, mask: Tensor, groups: Tensor) -> Tensor:
        """(N, m): mean of h over the tokens in which `mask` (tokens, N) holds; 0 without any."""
        total = wide_zeros(*groups.shape, device=self.x.device)
        for where, h in self._flat_pieces():
            grouped = h[:, groups.flatten()].unflatten(1, groups.shape)
            total += torch.einsum("tn,tnm->nm", mask[where].float(), grouped).to(total.device)
        return _means(total, mask)

    def mean_squares(self, mask: Tensor) -> Tensor:
        """(N, d_ff): mean of h² over the tokens in which `mask` (tokens, N) holds; 0 if none."""
        total = wide_zeros(mask.shape[1], self.weights.d_ff, device=self.x.device)
        for where, h in self._flat_pieces():
            total += (mask[where].T.float() @ h.square_()).to(total.device)
        return _means(total, mask)

    def idle_mean(self, chosen: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(d_ff,): mean of h over the tokens for which a neuron is not chosen; 0 without any.
        chosen: of x (tokens, d_model) and φ(gate x) (tokens, d_ff), bool (tokens, d_ff)."""
        total, count = wide_zeros(2, self.weights.d_ff, device=self.x.device)
        for where, gated, h in self.pieces():
            idle = ~chosen(self.x[where].flatten(0, 1), gated.flatten(0, 1))
            total += wide_sum(h.flatten(0, 1) * idle, 0)
            count += idle.sum(0).to(count.device)
        return (total / count.clamp(min=1)).float().cpu()

    def _flat_pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Which tokens, and their h (tokens, d_ff)."""
        length = self.x.shape[1]
        for where, _, h in self.pieces():
            yield slice(where.start * length, where.stop * length), h.flatten(0, 1)
