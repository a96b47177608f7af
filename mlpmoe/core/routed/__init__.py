"""Routed methods: one file per method, and the modules that run what they make."""

from .build import build_routed
from .cluster_mlp import ClusterMLP
from .cmoe import METHOD as CMOE
from .coactivation import METHOD as COACTIVATION
from .expertweaver import METHOD as EXPERTWEAVER
from .input_mlp import InputMLP
from .inputs import METHOD as INPUTS
from .low_rank_mlp import LowRankMLP
from .lowrank import METHOD as LOWRANK
from .method import RoutedMethod
from .moefication import METHOD as MOEFICATION
from .neurons import METHOD as NEURONS
from .routed_mlp import NeuronMLP, RoutedMLP
from .splits import CONTIGUOUS, RANDOM
from .tokenclusters import METHOD as TOKENCLUSTERS

ROUTED_METHODS: dict[str, RoutedMethod] = {
    "expertweaver": EXPERTWEAVER,
    "cmoe": CMOE,
    "moefication": MOEFICATION,
    "coactivation": COACTIVATION,
    "contiguous": CONTIGUOUS,
    "random": RANDOM,
    "tokenclusters": TOKENCLUSTERS,
    "neurons": NEURONS,
    "inputs": INPUTS,
    "lowrank": LOWRANK,
}
ROUTED_TYPES = (RoutedMLP, ClusterMLP, NeuronMLP, InputMLP, LowRankMLP)

__all__ = [
    "ROUTED_METHODS",
    "ROUTED_TYPES",
    "ClusterMLP",
    "InputMLP",
    "LowRankMLP",
    "NeuronMLP",
    "RoutedMLP",
    "RoutedMethod",
    "build_routed",
]
