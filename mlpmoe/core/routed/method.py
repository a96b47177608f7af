"""RoutedMethod: what tells one published way of routing from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..activations import LayerActivations
from ..mlps import MLPWeights
from ..registry import Choice
from .partition import Partition

if TYPE_CHECKING:
    from ..spec import ConversionSpec


@dataclass(frozen=True)
class Request:
    """What a method is given to make the experts of one MLP."""

    weights: MLPWeights
    spec: ConversionSpec
    experts: int  # of equal size; spec.experts where d_ff allows it
    layer: LayerActivations | None  # None: no calibration text
    generator: torch.Generator  # seeded, the same for every layer

    @property
    def size(self) -> int:
        """Neurons per expert."""
        return self.weights.d_ff // self.experts


@dataclass(frozen=True)
class Method(Choice):
    """A method of conversion, and its settings."""

    _: KW_ONLY
    # of the spec, that it uses
    fields: tuple[str, ...] = ("experts", "active", "shared", "router", "selection", "progressive")


@dataclass(frozen=True)
class RoutedMethod(Method):
    """A method by its parts: how neurons become experts, or what else is chosen for each token;
    and its authors' choices."""

    _: KW_ONLY
    source: str  # where it is described
    partition: Callable[[Request], Partition] | None  # None: makes no experts, see `build`
    defaults: dict[str, Any]  # of the spec fields that are None until the method is known
    routers: tuple[str, ...] = ("centroid", "similarity", "regression", "oracle")
    calibrated: bool = True  # whether making the experts needs a calibration text
    layer_adaptive: bool = False  # whether it has a rule for the shared share of each layer
    # of one MLP, where there are no experts
    build: Callable[[MLPWeights, ConversionSpec, LayerActivations | None], nn.Module] | None = None
    # What an active share leaves of an MLP's multiply-adds, routers aside, and the active share
    # that leaves so much. The number: of its matrices, 3 with a gate, 2 without.
    compute_share: Callable[[float, int], float] = lambda active, matrices: active
    active_share: Callable[[float, int], float] = lambda compute, matrices: compute
    # Routers that choose once for all tokens: what they leave out is not stored either
    fixed: tuple[str, ...] = ()
    family: str = "routed"  # with whom it is compared: see `family_of` of the runs
