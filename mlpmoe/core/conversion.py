"""convert(): walk the layers of a model and run the stages on each MLP."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from .branched import BranchedMLP, LoopedMLP, branch_sizes, keep_neurons
from .errors import UnsupportedModelError
from .fade import fade, fade_sparsities
from .mlps import DenseMLP, MLPWeights, read_mlps
from .spec import ConversionSpec

# MLP modules whose reading was compared with their own forward. The comparison depends on the
# module's code, not on the spec, so once per module is enough.
_proven: WeakSet[nn.Module] = WeakSet()

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def convert(model: PreTrainedModel, spec: ConversionSpec) -> PreTrainedModel:
    """A new model whose MLPs are replaced by what `spec` asks for; `model` is unchanged.

    The new model shares every tensor with `model` except those that fade changed and the new α
    (layers · K scalars); training the one therefore trains the other. Each MLP's reading is first
    proved against the original module on random input. Raises UnsupportedModelError if the model
    cannot be split, SpecError if the spec does not fit it.
    """
    mlps = read_mlps(model)
    for mlp in mlps:
        spec.check_fits(mlp.weights.d_ff)
        _prove(mlp)
    # Layers side by side: NumPy, which finds the fade thresholds, lets other threads run.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        converted = list(pool.map(lambda mlp: convert_mlp(mlp.weights, spec), mlps))
    replacements = {}
    for mlp, new in zip(mlps, converted, strict=True):
        # copied, since the activation in it is a module of the dense model
        replacements[mlp.module] = _with_modules_replaced(new, {}).train(mlp.module.training)
    return _with_modules_replaced(model, replacements)


def convert_mlp(weights: MLPWeights, spec: ConversionSpec) -> BranchedMLP:
    """The stages, in order, on one MLP: split, keep, fade, compensate.

    Keeping before fading gives the same weights as the reverse and saves the work on branches
    that are dropped.
    """
    sizes = branch_sizes(weights.d_ff, spec.branches)[: spec.kept]
    kept = keep_neurons(weights, sum(sizes))
    faded, thresholds = fade(kept, sizes, fade_sparsities(spec.branches, spec.fade)[: spec.kept])
    return BranchedMLP(faded, sizes, spec.alpha, spec.branches, thresholds)


@torch.no_grad()
def loop_over_branches(model: PreTrainedModel) -> PreTrainedModel:
    """The same converted model with the paper's loop in place of the fused modules.

    For tests and the benchmark; shares all tensors with `model`.
    """
    fused = [module for module in model.modules() if isinstance(module, BranchedMLP)]
    return _with_modules_replaced(model, {module: LoopedMLP(module) for module in fused})


def mlp_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The MLP modules of a dense or converted model, one per layer, in order."""
    converted = [m for m in model.modules() if isinstance(m, BranchedMLP | LoopedMLP)]
    return converted or [mlp.module for mlp in read_mlps(model)]


def _with_modules_replaced(model: _Module, replacements: Mapping[nn.Module, nn.Module]) -> _Module:
    """A copy of the module tree with some modules swapped; tensors are shared, not copied.

    deepcopy takes what its memo holds instead of copying it.
    """
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    memo.update((id(old), new) for old, new in replacements.items())
    return copy.deepcopy(model, memo)


def _prove(mlp: DenseMLP) -> None:
    """Compare the fused reading of an MLP with the module itself on random input."""
    if mlp.module in _proven:
        return
    up = mlp.weights.up
    x = torch.randn(1, 4, mlp.weights.d_model, generator=torch.Generator().manual_seed(0))
    x = x.to(device=up.device, dtype=up.dtype)
    extra = (torch.zeros_like(x),) if mlp.weights.adds_residual else ()
    actual = BranchedMLP(mlp.weights, (mlp.weights.d_ff,))(x, *extra)
    # A copy, because dropout would hide the comparison and the dense model's own flags must stay
    # as they are: another thread may be using it.
    expected = _with_modules_replaced(mlp.module, {}).eval()(x, *extra)
    if not torch.isfinite(expected).all():
        raise UnsupportedModelError(
            f"{mlp.name} gives infinite or undefined numbers on ordinary input; its weights are "
            "damaged."
        )
    error = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    # about 50 rounding steps: 6e-6 in float32, 0.03 in bfloat16
    tolerance = torch.finfo(up.dtype).eps ** 0.75
    if not error <= tolerance * scale:  # also if the error is undefined
        raise UnsupportedModelError(
            f"{mlp.name} ({type(mlp.module).__name__}) computes something else than its layout "
            f"says (relative difference {error / scale:.1e}), so it cannot be split safely."
        )
    _proven.add(mlp.module)
