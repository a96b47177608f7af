"""The static pipeline on one MLP: order, split, keep, fade, compensate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import LayerActivations
from ..errors import SpecError
from ..mlps import MLPWeights
from ..spec import ConversionSpec
from .branched import BranchedMLP, branch_sizes, keep_neurons
from .compensation import COMPENSATIONS, Moments, fitted_alphas, mean_bias, refit
from .order import order_of, permute
from .schedule import branch_sparsities
from .scores import SCORES, Cut, zero_weights


@dataclass(frozen=True)
class _Stage:
    """An MLP on its way through the stages."""

    weights: MLPWeights
    sizes: tuple[int, ...]  # neurons of each kept branch
    neurons: Tensor | None  # which of the dense MLP's they are; None: the first ones, as stored

    @property
    def present(self) -> Tensor:
        """The same as numbers of neurons."""
        return torch.arange(self.weights.d_ff) if self.neurons is None else self.neurons


def build_static(
    weights: MLPWeights, spec: ConversionSpec, layer: LayerActivations | None = None
) -> BranchedMLP:
    """The stages of a static spec on one MLP; `layer`: its activations, where the spec asks.

    Branches are dropped before others are faded, which gives the same weights as the reverse and
    saves work. down is fitted again before it is faded, since a fit would fill its zeros, and
    the bias comes last. Raises SpecError for what this MLP does not allow.
    """
    stage = _keep(weights, spec, layer)
    sparsities = branch_sparsities(
        spec.branches, spec.fade, spec.fade_schedule, spec.fade_exponent
    )[: spec.kept]
    projections: tuple[str, ...] = ()
    if spec.fade_unit == "neuron":
        stage = _drop_neurons(stage, weights, spec, sparsities, layer)
    elif spec.pattern or any(sparsities):
        projections = faded_projections(weights, spec)
    kept, thresholds = stage.weights, {}

    def zero(name: str, moment: Tensor | None) -> None:
        nonlocal kept
        cut = Cut(stage.sizes, sparsities, int(name == "down"), spec.pattern)
        changed, found = zero_weights(getattr(kept, name), cut, spec.fade_score, moment)
        kept = replace(kept, **{name: changed})
        if found:
            thresholds[name] = found

    calibrated = SCORES[spec.fade_score].calibrated
    for name in projections:
        if name != "down":
            zero(name, layer.input_moment if calibrated else None)
    lost = kept.d_ff < weights.d_ff or bool(projections)
    compensation = spec.compensation if lost else "none"
    moments = None  # of h, which what follows changes no more
    if COMPENSATIONS[compensation].calibrated or (calibrated and "down" in projections):
        faded = kept.up is not stage.weights.up or kept.gate is not stage.weights.gate
        moments = Moments.of(kept, None if faded else stage.present, layer)
    if compensation == "refit":
        kept = replace(kept, down=refit(kept.down, moments))
    if "down" in projections:
        zero("down", moments.second if calibrated else None)
    if compensation in ("mean", "refit"):
        kept = replace(kept, down_bias=mean_bias(kept.down, moments))
    alpha: float | Tensor = COMPENSATIONS[spec.compensation].alpha(spec.branches, spec.kept)
    if compensation == "alpha":
        alpha = fitted_alphas(kept, stage.sizes, moments)
    return BranchedMLP(kept, stage.sizes, alpha, spec.branches, thresholds)


def _keep(weights: MLPWeights, spec: ConversionSpec, layer: LayerActivations | None) -> _Stage:
    """The neurons of the first K branches, in the order of the spec."""
    sizes = branch_sizes(weights.d_ff, spec.branches)[: spec.kept]
    count = sum(sizes)
    if spec.order == "contiguous":
        return _Stage(keep_neurons(weights, count), sizes, None)
    neurons = order_of(spec.order, weights, layer, spec.seed)[:count]
    return _Stage(permute(weights, neurons), sizes, neurons)


def _drop_neurons(
    stage: _Stage, dense: MLPWeights, spec: ConversionSpec, sparsities: Sequence[float],
    layer: LayerActivations | None,
) -> _Stage:  # fmt: skip
    """Fade by whole neurons: each branch loses the share of its neurons that rank last."""
    present = stage.present
    order = order_of(SCORES[spec.fade_score].neurons, dense, layer, spec.seed)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    left, sizes, first = [], [], 0
    for size, share in zip(stage.sizes, sparsities, strict=True):
        ranks = rank[present[first : first + size]]
        stay = size - round(share * size)
        left.append(first + ranks.argsort()[:stay].sort().values)
        sizes.append(stay)
        first += size
    chosen = torch.cat(left)
    if len(chosen) == 0:
        raise SpecError(f"fade {spec.fade:g} leaves no neuron. Lower it.")
    if len(chosen) == len(present):
        return stage
    return _Stage(permute(stage.weights, chosen), tuple(sizes), present[chosen])


def faded_projections(weights: MLPWeights, spec: ConversionSpec) -> tuple[str, ...]:
    """The projections to fade that this MLP has. SpecError if it has none of them."""
    names = spec.projections
    if weights.gate is None:
        names = tuple(name for name in names if name != "gate")
    if not names:
        raise SpecError(
            "the MLPs of this model have no gate: fade_projections must name up or down."
        )
    return names
