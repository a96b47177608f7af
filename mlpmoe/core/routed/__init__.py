"""Routed methods: one file per method, and one module that runs what they make."""

from .build import build_routed
from .cmoe import METHOD as CMOE
from .coactivation import METHOD as COACTIVATION
from .expertweaver import METHOD as EXPERTWEAVER
from .method import RoutedMethod
from .moefication import METHOD as MOEFICATION
from .neurons import METHOD as NEURONS
from .routed_mlp import ROUTED_TYPES, NeuronMLP, RoutedMLP
from .splits import CONTIGUOUS, RANDOM

ROUTED_METHODS: dict[str, RoutedMethod] = {
    "expertweaver": EXPERTWEAVER,
    "cmoe": CMOE,
    "moefication": MOEFICATION,
    "coactivation": COACTIVATION,
    "contiguous": CONTIGUOUS,
    "random": RANDOM,
    "neurons": NEURONS,
}

__all__ = [
    "ROUTED_METHODS",
    "ROUTED_TYPES",
    "NeuronMLP",
    "RoutedMLP",
    "RoutedMethod",
    "build_routed",
]
