"""convert(): walk the layers of a model and run the stages on each MLP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .branched import BranchedMLP, LoopedMLP, branch_sizes, keep_neurons
from .calibration import Calibration, LayerActivations, visit_layers
from .compensation import CALIBRATED, refit
from .errors import SpecError, UnsupportedModelError
from .fade import fade, fade_sparsities
from .mlps import DenseMLP, MLPWeights, read_mlps
from .order import ORDERS, permute
from .routed import ROUTED_TYPES, build_routed
from .routed.expertweaver import AUTO, variation
from .spec import MAX_TAU, ConversionSpec

Progress = Callable[[str, float], None]

# MLP modules whose reading was compared with their own forward. The comparison depends on the
# module's code, not on the spec, so once per module is enough.
_proven: WeakSet[nn.Module] = WeakSet()

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    spec: ConversionSpec,
    calibration: Calibration | None = None,
    on_progress: Progress | None = None,
) -> PreTrainedModel:
    """A new model whose MLPs are replaced by what `spec` asks for; `model` is unchanged.

    A static conversion shares every tensor with `model` except those that a stage changed and the
    new α (layers · K scalars); training the one therefore trains the other. A routed one holds
    its own MLP weights, sorted by expert. Each MLP's reading is first proved against the original
    module on random input. calibration: text that methods may look at, where `spec` needs it.
    on_progress(message, share) is told what is being done. Raises UnsupportedModelError if the
    model cannot be split, SpecError if the spec does not fit it or the calibration is missing.
    """
    return convert_all(model, [spec], calibration, on_progress)[0]


@torch.no_grad()
def convert_all(
    model: PreTrainedModel,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | None = None,
    on_progress: Progress | None = None,
) -> list[PreTrainedModel]:
    """`convert` for several specs, with as few passes over the calibration text as possible: one
    for all, one more for all whose τ is found from the whole model, and one for each that is
    calibrated progressively."""
    mlps = read_mlps(model)
    for spec in specs:
        spec.check_fits(min(mlp.weights.d_ff for mlp in mlps))
        if spec.needs_calibration and calibration is None:
            raise SpecError(
                f"{spec.to_flags()} needs a calibration text: give one to look at activations on."
            )
    for mlp in mlps:
        _prove(mlp)
    report = on_progress or (lambda message, share: None)
    specs = _with_tau(model, mlps, specs, calibration, report)
    made: dict[int, list[nn.Module]] = {}
    together = []
    for index, spec in enumerate(specs):
        if not spec.needs_calibration:
            # Layers side by side: NumPy, which finds the fade thresholds, lets other threads run.
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                made[index] = list(pool.map(lambda m, s=spec: convert_mlp(m.weights, s), mlps))
        elif not spec.progressive:
            together.append(index)
    for group in (together, *([i] for i, spec in enumerate(specs) if spec.progressive)):
        if group:
            made |= _calibrated(model, mlps, specs, group, calibration, report)
    return [_replaced(model, mlps, made[index]) for index in range(len(specs))]


def _calibrated(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    specs: Sequence[ConversionSpec],
    group: Sequence[int],
    calibration: Calibration,
    report: Progress,
) -> dict[int, list[nn.Module]]:
    """One pass over the calibration text for the specs of `group`; modules by spec and layer."""
    made: dict[int, list[nn.Module]] = {index: [] for index in group}

    def visit(layer: int, activations: LayerActivations) -> nn.Module | None:
        report("calibrating", layer / len(mlps))
        for index in group:
            made[index].append(convert_mlp(activations.weights, specs[index], activations))
        return made[group[0]][-1] if specs[group[0]].progressive else None

    visit_layers(model, mlps, calibration, visit)
    return made


def _with_tau(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    specs: Sequence[ConversionSpec],
    calibration: Calibration | None,
    report: Progress,
) -> list[ConversionSpec]:
    """The specs with τ filled in where it is the median over all neurons of the model."""
    profiles = {spec.profile for spec in specs if _needs_tau(spec)}
    if not profiles:
        return list(specs)
    values: dict[str, list[Tensor]] = {profile: [] for profile in profiles}

    def visit(layer: int, activations: LayerActivations) -> None:
        report("profiling", layer / len(mlps))
        for profile, found in values.items():
            found.append(variation(activations.gate_means(profile)))

    visit_layers(model, mlps, calibration, visit)
    medians = {profile: float(torch.cat(found).median()) for profile, found in values.items()}
    return [
        replace(spec, tau=min(medians[spec.profile], MAX_TAU)) if _needs_tau(spec) else spec
        for spec in specs
    ]


def _needs_tau(spec: ConversionSpec) -> bool:
    return spec.shared == AUTO and spec.tau is None


def _replaced(
    model: PreTrainedModel, mlps: Sequence[DenseMLP], modules: Sequence[nn.Module]
) -> PreTrainedModel:
    replacements = {}
    for mlp, new in zip(mlps, modules, strict=True):
        # copied, since the activation in it is a module of the dense model
        replacements[mlp.module] = _with_modules_replaced(new, {}).train(mlp.module.training)
    return _with_modules_replaced(model, replacements)


def convert_mlp(
    weights: MLPWeights, spec: ConversionSpec, layer: LayerActivations | None = None
) -> nn.Module:
    """The stages, in order, on one MLP; `layer`: its activations, where the spec needs them.

    Static: order, split, keep, fade, compensate. Keeping before fading gives the same weights as
    the reverse and saves the work on branches that are dropped. Routed: see `build_routed`.
    """
    if spec.routed:
        return build_routed(weights, spec, spec.routed, layer)
    sizes = branch_sizes(weights.d_ff, spec.branches)[: spec.kept]
    kept = _kept(weights, spec, sum(sizes), layer)
    faded, thresholds = fade(kept, sizes, fade_sparsities(spec.branches, spec.fade)[: spec.kept])
    return BranchedMLP(faded, sizes, spec.alpha, spec.branches, thresholds)


def _kept(
    weights: MLPWeights, spec: ConversionSpec, count: int, layer: LayerActivations | None
) -> MLPWeights:
    """The first `count` neurons in the order of the spec, and what makes up for the others."""
    score = ORDERS[spec.order]
    compensate = spec.compensation in CALIBRATED and count < weights.d_ff
    if score is None and not compensate:
        return keep_neurons(weights, count)
    order = torch.arange(weights.d_ff) if score is None else score(layer)
    first = order[:count]
    kept = permute(weights, first)
    if compensate:
        down, bias = refit(weights, first, order[count:], layer, spec.compensation)
        kept = replace(kept, down=down, down_bias=bias)
    return kept


@torch.no_grad()
def loop_over_branches(model: PreTrainedModel) -> PreTrainedModel:
    """The same converted model with the paper's loop in place of the fused modules.

    For tests and the benchmark; shares all tensors with `model`.
    """
    fused = [module for module in model.modules() if isinstance(module, BranchedMLP)]
    return _with_modules_replaced(model, {module: LoopedMLP(module) for module in fused})


def mlp_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The MLP modules of a dense or converted model, one per layer, in order."""
    converted = [
        m for m in model.modules() if isinstance(m, (BranchedMLP, LoopedMLP, *ROUTED_TYPES))
    ]
    return converted or [mlp.module for mlp in read_mlps(model)]


def twin_of(model: _Module) -> _Module:
    """A second module tree over the same tensors: hooks on it leave the first alone."""
    return _with_modules_replaced(model, {})


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
