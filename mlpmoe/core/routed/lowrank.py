"""Low rank: of each matrix, seen as a sum of rank-one directions, only some are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..static.branched import BranchedMLP
from ..static.compensation import Moments, refit
from ..stopping import may_stop
from ..wide import wide_sum
from .low_rank_mlp import Factors, LowRankMLP
from .method import RoutedMethod

PLAIN, TOKEN = "directions", "directions-token"
TOKENS = 256  # of the calibration text, by which the directions to compute are counted
TRIED = 16  # numbers of them


def build(weights: MLPWeights, spec, layer: LayerActivations | None) -> nn.Module:
    """The module for one MLP; the dense MLP with all of its multiply-adds, for which a matrix in
    one piece is better than one in two.

    MoORE (arXiv 2506.14436) takes the singular directions of a matrix as rank-one experts and
    trains a router, and a rotation of the inputs, that weigh them by task and token; all of them
    run, so nothing is saved. Here nothing is trained, directions are left out, and those that stay
    count as they are: with "directions" and "directions-text" the same for every token (that is the
    truncated SVD, plain or as SVD-LLM, arXiv 2403.07378, whitens it), with "directions-token" the
    largest |σ_i v_iᵀx| of each token.

    Every matrix (m, n) has the active share of its m·n multiply-adds. Rank r takes r (m + n).
    """
    if spec.active == 1:
        return BranchedMLP(weights, (weights.d_ff,))
    seen = None if layer is None else _inputs(layer, spec)
    like = weights.up.detach()

    def factors(matrix: Tensor, bias: Tensor | None, seen: _Seen | None) -> Factors:
        return _factors(matrix, bias, seen, spec, like)

    gate = None if weights.gate is None else factors(weights.gate, weights.gate_bias, seen)
    up = factors(weights.up, weights.up_bias, seen)
    made = LowRankMLP(gate, up, up, weights.activation, weights.adds_residual)
    matrix, bias = weights.down, weights.down_bias
    if layer is not None:
        matrix, bias, seen = _hidden(weights, made, layer, spec)
    made.down = factors(matrix, bias, seen)
    return made


@dataclass(frozen=True)
class _Seen:
    """What a matrix reads on the calibration text."""

    moment: Tensor | None  # (n, n) float64; None: every direction of the input counts alike
    mean: Tensor | None  # (n,) float64, that is made up for: see `_factors`
    some: Tensor | None  # (tokens, n), where tokens choose


def _inputs(layer: LayerActivations, spec) -> _Seen:
    """Of gate and up."""
    moment, mean = None, None
    if spec.router != PLAIN:
        moment = layer.input_moment
    if spec.compensation != "none":
        mean = (wide_sum(layer.inputs(), 0) / layer.tokens).cpu()
        moment = None if moment is None else moment - torch.outer(mean, mean)
    return _Seen(moment, mean, _some(layer, spec))


def _hidden(
    weights: MLPWeights, made: LowRankMLP, layer: LayerActivations, spec
) -> tuple[Tensor, Tensor | None, _Seen]:
    """Of down: its matrix, its bias or with a compensation the mean output that is wanted, and
    what it reads. made: with gate and up."""
    some = _some(layer, spec)
    some = None if some is None else made.hidden(some)
    if spec.compensation == "none":
        moment = None
        if spec.router != PLAIN:
            mean, moment = layer.moments
            moment = moment + torch.outer(mean, mean)
        return weights.down, weights.down_bias, _Seen(moment, None, some)
    found = layer.regression(weights.d_ff, lambda x: made.hidden(x).float())
    moments = Moments(*found)
    down = weights.down.detach().cpu().double()
    if spec.compensation == "refit":
        down = refit(down, moments)
    # `_factors` adds what the matrix says of the mean
    bias = moments.target - down @ moments.mean
    moment = None if spec.router == PLAIN else moments.covariance
    return down, bias, _Seen(moment, moments.mean, some)


def _some(layer: LayerActivations, spec) -> Tensor | None:
    return layer.spread(TOKENS) if spec.router == TOKEN else None


def _factors(
    matrix: Tensor, bias: Tensor | None, seen: _Seen | None, spec, like: Tensor
) -> Factors:
    """The directions of a matrix that its budget allows, stored like another tensor. With a mean
    of its inputs, what is left out of that is in the bias: z is of x less the mean."""
    matrix, (m, n) = matrix.detach().cpu().double(), matrix.shape
    bias = None if bias is None else bias.detach().cpu().double()
    seen = seen or _Seen(None, None, None)
    first, second = directions(matrix, seen.moment)
    centre = 0 if seen.mean is None else first @ seen.mean  # (directions,)
    computed = kept = max(1, round(spec.active * m * n / (m + n)))
    if spec.router == TOKEN:
        z = seen.some.cpu().double() @ first.T - centre
        computed, kept = computed_and_kept(z, m, n, spec.active)
    first, second, offset = first[:computed], second[:computed], None
    if seen.mean is not None:
        said = matrix @ seen.mean
        bias = said if bias is None else bias + said
        if kept < computed:
            offset = -centre[:computed]
        else:  # which comes to the same, and needs no offset
            bias = bias - centre[:computed] @ second

    def stored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(like).contiguous()

    return Factors(stored(first), stored(second), kept, stored(offset), stored(bias))


def directions(matrix: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """first (q, n) and second (q, m) of a matrix (m, n), which is secondᵀ first; float64, CPU.
    q = min(m, n), and the first r directions are its best approximation of rank r.

    Best for inputs of this second moment (n, n): then the rows of second are the principal axes of
    the outputs, which is what SVD-LLM comes to, with no need to invert the moment. None: of all
    inputs, the plain SVD, with first_i = σ_i v_i and second_i = u_i.
    """
    rest, basis = matrix.detach().cpu().double(), None
    if len(rest) > rest.shape[1]:
        basis, rest = torch.linalg.qr(rest)  # the outputs lie in the span of n columns
    may_stop()
    outputs = rest @ rest.T if moment is None else rest @ moment @ rest.T
    axes = torch.linalg.eigh(outputs).eigenvectors.flip(1)  # ascending before
    may_stop()
    return axes.T @ rest, axes.T if basis is None else (basis @ axes).T


def computed_and_kept(z: Tensor, m: int, n: int, share: float) -> tuple[int, int]:
    """How many directions of a matrix (m, n) to compute for every token, and how many of these to
    use, so that both take this share of its multiply-adds and the output changes least.

    z: (tokens, min(m, n)) of the calibration text. The more are computed, which costs n each, the
    fewer can be used, at m each. If every token used the same ones, both numbers would be equal.
    """
    budget, squares = share * m * n, z.square()
    least = max(1, round(budget / (m + n)))
    most = max(least, min(z.shape[1], int((budget - m) / n)))
    tried = []
    for step in range(TRIED):
        may_stop()
        computed = round(least + (most - least) * step / (TRIED - 1))
        left = int((budget - computed * n) / m)
        kept = max(1, min(computed, left)) if computed > least else computed
        held = squares[:, :computed].topk(kept, dim=1, sorted=False).values.sum()
        tried.append((-float(held), computed, kept))
    _, computed, kept = min(tried)
    return computed, kept


METHOD = RoutedMethod(
    label="Low rank",
    about="Each weight matrix (m × n) becomes the product of two narrow ones, of width r: r(m + n) "
    "multiply-adds in place of mn. That saves while r is small; at full rank the two would cost "
    "more than the matrix itself.",
    source="this project, after MoORE (arXiv 2506.14436), which trains; SVD-LLM (arXiv 2403.07378)",
    partition=None,
    defaults={"router": "directions-text"},
    routers=(PLAIN, "directions-text", TOKEN),
    fields=("active", "router", "progressive"),
    calibrated=False,
    build=build,
    fixed=(PLAIN, "directions-text"),
    family="directions",
)
