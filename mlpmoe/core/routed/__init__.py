"""Routed methods: one file per method, and the modules that run what they make."""

from .build import build_routed
from .cmoe import METHOD as CMOE
from .coactivation import METHOD as COACTIVATION
from .expertweaver import METHOD as EXPERTWEAVER
from .input_mlp import InputMLP
from .inputs import METHOD as INPUTS
from .method import RoutedMethod
from .moefication import METHOD as MOEFICATION
from .neurons import METHOD as NEURONS
from .routed_mlp import NeuronMLP, RoutedMLP
from .splits import CONTIGUOUS, RANDOM

ROUTED_METHODS: dict[str, RoutedMethod] = {
    "expertweaver": EXPERTWEAVER,
    "cmoe": CMOE,
    "moefication": MOEFICATION,
    "coactivation": COACTIVATION,
    "contiguous": CONTIGUOUS,
    "random": RANDOM,
    "neurons": NEURONS,
    "inputs": INPUTS,
}
ROUTED_TYPES = (RoutedMLP, NeuronMLP, InputMLP)

__all__ = [
    "ROUTED_METHODS",
    "ROUTED_TYPES",
    "InputMLP",
    "NeuronMLP",
    "RoutedMLP",
    "RoutedMethod",
    "build_routed",
]
