"""Routers: a score for every expert and token, from the MLP's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import PRODUCT_ROWS, LayerActivations
from ..mlps import MLPWeights
from ..registry import Choice
from ..static.order import permute
from ..stopping import may_stop
from ..wide import wide_device, wide_sum
from .partition import Partition

RIDGE = 1e-3  # of the mean variance of the input


class LinearRouter(nn.Module):
    """Scores = x Wᵀ + b, in float32; with `normalise`, of x scaled to length 1.

    weight: (experts, d_model). bias: (experts,) or None. `forward`: (tokens, d_model) ->
    (tokens, experts).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, normalise: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = None if bias is None else nn.Parameter(bias.float())
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = F.normalize(x, dim=-1) if self.normalise else x
        return F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())

    @property
    def linear(self) -> tuple[Tensor, Tensor | None, bool]:
        """Weight, bias and `normalise`: all there is to it."""
        return self.weight, self.bias, self.normalise

    @property
    def macs(self) -> int:
        return self.weight.numel()


class RepresentativeRouter(nn.Module):
    """CMoE's router: one neuron stands for each expert, score = |h| of it (section 3.4).

    Its rows of gate and up are scaled to length 1, x is not. Softmax over experts, as published;
    it changes no order.
    """

    def __init__(self, weights: MLPWeights, neurons: Tensor) -> None:
        super().__init__()
        up, up_bias = _unit_rows(weights.up, weights.up_bias, neurons)
        self.up, self.up_bias = nn.Parameter(up), _parameter(up_bias)
        self.gate = self.gate_bias = None
        if weights.gate is not None:
            gate, gate_bias = _unit_rows(weights.gate, weights.gate_bias, neurons)
            self.gate, self.gate_bias = nn.Parameter(gate), _parameter(gate_bias)
        self.act_fn = weights.activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()

        def project(matrix: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, matrix.float(), None if bias is None else bias.float())

        up = project(self.up, self.up_bias)
        if self.gate is None:
            return self.act_fn(up).abs().softmax(-1)
        return (self.act_fn(project(self.gate, self.gate_bias)) * up).abs().softmax(-1)

    @property
    def macs(self) -> int:
        return self.up.numel() * (1 if self.gate is None else 2)


class OracleRouter(nn.Module):
    """What a router could know at best: Σ |h_i|·‖down_i‖ of every expert, from computing them all.

    An upper bound for a given partition. It saves nothing and cannot be deployed. weights: of the
    routed neurons, expert by expert.
    """

    macs = 0  # counted as if the answer came for free: it is a bound

    def __init__(self, weights: MLPWeights, experts: int) -> None:
        super().__init__()
        self.experts, self.act_fn = experts, weights.activation
        for name in ("gate", "up", "gate_bias", "up_bias"):  # buffers move with the model
            self.register_buffer(name, getattr(weights, name), persistent=False)
        self.register_buffer("size", weights.down.float().norm(dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            h = self.act_fn(h)
        else:
            h = self.act_fn(F.linear(x, self.gate, self.gate_bias)) * h
        return (h.float().abs() * self.size).unflatten(-1, (self.experts, -1)).sum(-1)


@dataclass(frozen=True)
class RouterChoice(Choice):
    """A kind of router, and how it is made."""

    _: KW_ONLY
    # None: it scores single neurons, inputs or directions, see the method's own file
    make: Callable[[MLPWeights, Partition, LayerActivations | None], nn.Module] | None


def centroid(
    weights: MLPWeights, partition: Partition, layer: LayerActivations | None
) -> LinearRouter:
    """The mean of each expert's gate rows, not normalised (ExpertWeaver, section 3.3); of its up
    rows where the MLP has no gate."""
    rows, bias = _first_rows(weights)
    mean_bias = None if bias is None else bias.float()[partition.experts].mean(1)
    return LinearRouter(rows.float()[partition.experts].mean(1), mean_bias)


def similarity(
    weights: MLPWeights, partition: Partition, layer: LayerActivations | None
) -> LinearRouter:
    """Nearest mean of normalised gate rows to the normalised input (MoEfication, section 3.3)."""
    rows, _ = _first_rows(weights)
    return _nearest(F.normalize(rows.float(), dim=-1)[partition.experts].mean(1))


def clusters(
    weights: MLPWeights, partition: Partition, layer: LayerActivations | None
) -> LinearRouter:
    """Nearest mean of the tokens that an expert was made for to the normalised input."""
    return _nearest(partition.centres)


def representative(
    weights: MLPWeights, partition: Partition, layer: LayerActivations | None
) -> RepresentativeRouter:
    return RepresentativeRouter(weights, partition.representatives)


def regression(weights: MLPWeights, partition: Partition, layer: LayerActivations) -> LinearRouter:
    """The linear map of the input that predicts the experts' output mass Σ |h_i|·‖down_i‖ best on
    the calibration text."""
    return fit_router(layer.inputs(), layer.mass(partition.experts, layer.down_norms))


def fit_router(x: Tensor, wanted: Tensor) -> LinearRouter:
    """The linear map of x that predicts the wanted scores best: ridge regression, in closed form.

    x: (tokens, d_model). wanted: (tokens, experts)."""
    home, x, wanted = x.device, *(t.to(wide_device(t.device)) for t in (x, wanted))
    x_mean, wanted_mean = (wide_sum(t, 0) / len(t) for t in (x, wanted))
    gram, cross = 0.0, 0.0  # (d_model, d_model), (d_model, experts)
    for some, said in zip(x.split(PRODUCT_ROWS), wanted.split(PRODUCT_ROWS), strict=True):
        may_stop()
        some = some.double() - x_mean
        gram += some.T @ some
        cross += some.T @ (said.double() - wanted_mean)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, cross).T  # (experts, d_model)
    bias = wanted_mean - weight @ x_mean
    return LinearRouter(weight.float().to(home), bias.float().to(home))


def oracle(
    weights: MLPWeights, partition: Partition, layer: LayerActivations | None
) -> OracleRouter:
    return OracleRouter(permute(weights, partition.experts.flatten()), len(partition.experts))


ROUTERS: dict[str, RouterChoice] = {
    "centroid": RouterChoice(
        "mean gate row (ExpertWeaver)", "scores experts by the mean of their gate rows",
        make=centroid,
    ),
    "similarity": RouterChoice(
        "nearest weights (MoEfication)", "scores experts by how near their gate rows are",
        make=similarity,
    ),
    "clusters": RouterChoice(
        "nearest tokens (token clusters)", "scores experts by how near the tokens are that they "
        "were made for",
        make=clusters,
    ),
    "representative": RouterChoice(
        "one neuron each (CMoE)", "scores experts by one neuron of each", make=representative
    ),
    "regression": RouterChoice(
        "fitted by least squares", "scores experts by a fit to their output",
        make=regression, calibrated=True,
    ),
    "oracle": RouterChoice(
        "oracle: a bound, saves nothing", "scores experts by their output itself, a bound",
        make=oracle,
    ),
    "gate": RouterChoice(
        "neurons: |gate| (AbsTopK-GLU, CATS)", "scores neurons by their gate", make=None
    ),
    "gate-norm": RouterChoice(
        "neurons: |gate| × ‖down‖", "scores neurons by gate and length of down", make=None
    ),
    "inputs": RouterChoice("inputs: |x| (TEAL)", "scores inputs by their size", make=None),
    "inputs-norm": RouterChoice(
        "inputs: |x| × ‖columns‖ (WINA)", "scores inputs by size and length of their columns",
        make=None,
    ),
    "inputs-gate": RouterChoice(
        "inputs, and neurons that the gate opens",
        "scores inputs by size and length of their columns, and computes up for open gates only",
        make=None,
    ),
    "directions": RouterChoice(
        "directions: largest singular values", "keeps the directions of the largest singular "
        "values, the same for every token",
        make=None,
    ),
    "directions-text": RouterChoice(
        "directions: most of the output on the text", "keeps the directions that hold most of the "
        "output on the calibration text, the same for every token",
        make=None, calibrated=True,
    ),
    "directions-token": RouterChoice(
        "directions: largest for each token", "keeps the directions that are largest for a token",
        make=None, calibrated=True,
    ),
}  # fmt: skip


def _nearest(centres: Tensor) -> LinearRouter:
    """-|x - c|² = 2 x·c - |c|² - 1 for an x of length 1: a linear score. centres: (experts, n)."""
    return LinearRouter(2 * centres, -centres.square().sum(-1), normalise=True)


def _first_rows(weights: MLPWeights) -> tuple[Tensor, Tensor | None]:
    """Gate with its bias, or up where there is no gate: (d_ff, d_model), (d_ff,)."""
    if weights.gate is None:
        return weights.up.detach(), weights.up_bias
    return weights.gate.detach(), weights.gate_bias


def _unit_rows(
    matrix: Tensor, bias: Tensor | None, neurons: Tensor
) -> tuple[Tensor, Tensor | None]:
    rows = matrix.detach().float()[neurons]
    length = rows.norm(dim=-1).clamp(min=1e-12)
    scaled = None if bias is None else bias.detach().float()[neurons] / length
    return rows / length[:, None], scaled


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)
