"""What a conversion leaves of each branch, counted: no model runs for it.

A static fade by magnitude is counted without being made, so that it follows a slider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.mlps import DenseMLP
from ...core.spec import ConversionSpec
from ...core.static.branched import branch_sizes
from ...core.static.fade import MagnitudeCounts
from ...core.static.pipeline import faded_projections
from ...core.static.schedule import branch_sparsities
from ...measure.cost.magnitudes import (
    Magnitudes,
    branch_sums,
    branch_weights,
    branched_mlps,
    magnitudes,
    neuron_sums,
)
from ...measure.cost.parameters import ParameterReport, parameter_report
from ...measure.words import joined
from .asked import Conversion, spec_of
from .recent import Recent

RESULTS_HELD = 512
COUNTS_HELD = 6  # projections whose magnitudes are counted, each for one B and order


@dataclass(frozen=True)
class Zeros:
    """Sparsity that fade was asked for and what it did, over the kept branches."""

    what: str  # is zeroed: "gate and up", "neurons", ...
    requested: float | None  # the mean of s_i over the neurons, or n/m; None if layers differ
    realised: float  # more where several weights equal the threshold


class Structure:
    """The parameters of one model and of its conversions. Nothing is counted twice."""

    def __init__(
        self,
        model: PreTrainedModel,
        mlps: list[DenseMLP],
        converted: Callable[[Conversion], PreTrainedModel],
    ) -> None:
        self.model, self.mlps, self.converted = model, mlps, converted
        self._reports, self._sums = Recent(RESULTS_HELD), Recent(RESULTS_HELD)
        self._zeros, self._histograms = Recent(RESULTS_HELD), Recent(RESULTS_HELD)
        self._dense_sums = Recent(2 * 3 * len(mlps))
        self._counts = Recent(COUNTS_HELD)

    @cached_property
    def _dense_nonzero(self) -> dict[int, int]:
        return {id(p): int(torch.count_nonzero(p)) for p in self.model.parameters()}

    @cached_property
    def dense(self) -> ParameterReport:
        """The parameters of the dense model."""
        return parameter_report(self.model, lambda tensor: self._dense_nonzero.get(id(tensor)))

    def known_report(self, asked: Conversion) -> ParameterReport | None:
        """`report`, if it was asked for before."""
        return self._reports.get(asked)

    def report(self, asked: Conversion) -> ParameterReport:
        """The parameters after conversion."""
        return self._reports.get_or_make(asked, lambda: self._report(asked))

    def _report(self, asked: Conversion) -> ParameterReport:
        if spec_of(asked).routed:
            return parameter_report(self.converted(asked))
        model, sums = self._looked_at(asked), self.sums(asked)
        known = dict(self._dense_nonzero)
        for layer, mlp in enumerate(branched_mlps(model)):
            for name, linear in mlp.projections.items():
                known[id(linear.weight)] = int(sums[name][layer].sum())
        return parameter_report(model, lambda tensor: known.get(id(tensor)))

    def sums(self, asked: Conversion) -> dict[str, Tensor]:
        """`branch_sums` of what is not zero in the converted model; tensors of the dense model are
        counted once."""
        return self._sums.get_or_make(asked, lambda: self._sum(asked))

    def _sum(self, asked: Conversion) -> dict[str, Tensor]:
        sums = branch_sums(self._looked_at(asked), "nonzero", self._neuron_sums)
        for name in self._counted(asked):
            for layer, branches in enumerate(self._magnitude_counts(asked, name)):
                for branch, share in enumerate(_sparsities(spec_of(asked).at(layer))):
                    _, counts = branches[branch].left(share)
                    sums[name][layer, branch] = float(counts.sum())
        return sums

    def _neuron_sums(self, weight: Tensor, projection: str, quantity: str) -> Tensor:
        place = (weight.data_ptr(), weight.stride())
        dense = self._dense_places.get(place)
        if dense is None:
            return neuron_sums(weight, projection, quantity)
        whole = self._dense_sums.get_or_make(
            (place, quantity), lambda: neuron_sums(dense, projection, quantity)
        )
        return whole[: weight.shape[1 if projection == "down" else 0]]  # the first neurons

    @cached_property
    def _dense_places(self) -> dict[tuple, Tensor]:
        """Where the projections of the dense model lie in memory: what a conversion leaves as it
        is lies there too."""
        names = [name for name in ("gate", "up", "down") if self._has(name)]
        tensors = [getattr(mlp.weights, name) for mlp in self.mlps for name in names]
        return {(tensor.data_ptr(), tensor.stride()): tensor for tensor in tensors}

    def _has(self, projection: str) -> bool:
        return getattr(self.mlps[0].weights, projection) is not None

    def unfaded(self, asked: Conversion) -> Conversion:
        """A conversion of the same shape that is made at once: without a fade that only zeroes
        weights in place."""
        if not _fades_in_place(asked):
            return asked
        names = ("branches", "order", "seed", "keep", "compensation", "spared")
        return ConversionSpec(**{name: getattr(asked, name) for name in names})

    def _counted(self, asked: Conversion) -> tuple[str, ...]:
        """The projections whose fade is counted without being made: those of 16 bits."""
        weights = self.mlps[0].weights
        if not _fades_in_place(asked) or weights.up.dtype.itemsize != 2:
            return ()
        return faded_projections(weights, asked)

    def get_ready_to_fade(self, asked: Conversion) -> None:
        """Count the magnitudes of these branches, so that a fade of them follows its slider."""
        faded = replace(spec_of(self.whole(asked)), fade=1.0)
        if not faded.needs_calibration:
            for name in self._counted(faded):
                self._magnitude_counts(faded, name)

    def _looked_at(self, asked: Conversion) -> PreTrainedModel:
        """What holds all that is not counted otherwise."""
        return self.converted(self.unfaded(asked) if self._counted(asked) else asked)

    def _magnitude_counts(
        self, asked: ConversionSpec, projection: str
    ) -> list[list[MagnitudeCounts]]:
        """Of every layer and branch, kept or not."""

        def count() -> list[list[MagnitudeCounts]]:
            mlps = branched_mlps(self.converted(whole))
            return [[MagnitudeCounts(w) for w in branch_weights(m, projection)] for m in mlps]

        whole = self.whole(asked)
        return self._counts.get_or_make((whole, projection), count)

    def histogram(
        self, asked: Conversion, layer: int, projection: str, bins: int, upper: float
    ) -> Magnitudes:
        """`magnitudes` of a conversion, binned once per layer and branches."""
        return self._histograms.get_or_make(
            (asked, layer, projection, bins, upper),
            lambda: self._histogram(asked, layer, projection, bins, upper),
        )

    def _histogram(
        self, asked: Conversion, layer: int, projection: str, bins: int, upper: float
    ) -> Magnitudes:
        if projection not in self._counted(asked):
            return magnitudes(self._looked_at(asked), layer, projection, bins, upper)
        branches = self._magnitude_counts(asked, projection)[layer]
        faded = list(zip(branches, _sparsities(spec_of(asked).at(layer)), strict=False))
        left = [branch.left(share) for branch, share in faded]
        counts = [np.histogram(v, bins, (0.0, upper), weights=many)[0] for v, many in left]
        return Magnitudes(
            edges=torch.linspace(0, upper, bins + 1, dtype=torch.float32),
            counts=torch.from_numpy(np.stack(counts)).long(),
            zeros=torch.tensor(
                [
                    branch.ends[-1] - many.sum()
                    for branch, (_, many) in zip(branches, left, strict=False)
                ]
            ),
            thresholds=tuple(branch.threshold(share) for branch, share in faded),
        )

    def whole(self, asked: Conversion) -> Conversion:
        """The same branches with nothing removed."""
        spec = spec_of(asked)
        spec = ConversionSpec(
            branches=spec.branches, order=spec.order, seed=spec.seed, spared=spec.spared
        )
        return replace(asked, spec=spec) if spec.needs_calibration else spec

    def left(self, asked: Conversion) -> Tensor:
        """The share of each branch's non-zero weights that the conversion leaves; (layers, B), 0
        to 1."""
        left, whole = (
            torch.stack(list(self.sums(s).values())).sum(0) for s in (asked, self.whole(asked))
        )
        return left / whole.clamp(min=1e-30)

    def zeros(self, asked: Conversion) -> Zeros | None:
        """What fade asks for and what it does, over all layers but spared ones; None without."""
        spec = spec_of(asked)
        if not spec.fades or len(spec.spared_layers) == len(self.mlps):
            return None
        return self._zeros.get_or_make(asked, lambda: self._count_zeros(asked))

    def _count_zeros(self, asked: Conversion) -> Zeros:
        spec = spec_of(asked)
        every = branched_mlps(self._looked_at(asked))
        layers = [layer for layer in range(len(every)) if layer not in spec.spared_layers]
        mlps = [every[layer] for layer in layers]
        kept = [
            sum(branch_sizes(self.mlps[layer].weights.d_ff, spec.branches)[: len(mlp.sizes)])
            for layer, mlp in zip(layers, mlps, strict=True)
        ]
        d_ff = min(mlp.weights.d_ff for mlp in self.mlps)
        requested = _requested(spec, d_ff)
        if spec.fade_unit == "neuron":
            return Zeros("neurons", requested, 1 - sum(sum(m.sizes) for m in mlps) / sum(kept))
        names = [name for name in spec.projections if self._has(name)]
        weights = sum(mlp.projections[name].weight.numel() for mlp in mlps for name in names)
        left = sum(float(self.sums(asked)[name][layers].sum()) for name in names)
        return Zeros(joined(names), requested, 1 - left / weights)


def _fades_in_place(asked: Conversion) -> bool:
    """Whether weights are zeroed by their magnitudes alone."""
    if not isinstance(asked, ConversionSpec) or asked.routed:
        return False
    return asked.fade > 0 and asked.fade_unit == "weight" and asked.fade_score == "magnitude"


def _sparsities(spec: ConversionSpec) -> list[float]:
    """Of each kept branch."""
    shares = branch_sparsities(spec.branches, spec.fade, spec.fade_schedule, spec.fade_exponent)
    return list(shares[: spec.kept])


def _requested(spec: ConversionSpec, d_ff: int) -> float | None:
    """The share that fade is asked to remove, in the mean over the kept neurons; None if layers
    share it out."""
    if spec.shares_out:
        return None
    if spec.pattern:
        return spec.pattern[0] / spec.pattern[1]
    sizes = branch_sizes(d_ff, spec.branches)[: spec.kept]
    asked = sum(size * share for size, share in zip(sizes, _sparsities(spec), strict=True))
    return asked / sum(sizes)
