"""convert(): walk the layers of a model and run the stages on each MLP."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from threading import Lock
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .activations import LayerActivations
from .calibration import Calibration, check_tokens, warn_of_few_tokens
from .errors import SpecError, UnsupportedModelError, not_finite
from .mlps import DenseMLP, MLPWeights, read_mlps
from .one_device import check_one_device
from .recovery.recover import recover
from .recovery.report import RecoveryReport
from .routed import ROUTED_TYPES, build_routed
from .routed.expertweaver import AUTO, variation
from .sensitivity import sensitivities
from .spec import MAX_TAU, ConversionSpec
from .static.allocation import cost_curve, share_out
from .static.branched import BranchedMLP, LoopedMLP
from .static.pipeline import build_static
from .stopping import may_stop, stoppable
from .visiting import Observed, visit_layers

Progress = Callable[[str, float], None]
OnLook = Callable[[RecoveryReport], None]

# MLP modules whose reading was compared with their own forward. The comparison depends on the
# module's code, not on the spec, so once per module is enough.
_proven: WeakSet[nn.Module] = WeakSet()

_SPEC = "mlpmoe_spec"  # attribute of a converted model
_RECOVERY = "mlpmoe_recovery"  # of one that was trained

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    spec: ConversionSpec,
    calibration: Calibration | None = None,
    on_progress: Progress | None = None,
    state: Path | None = None,
    recover_seconds: float | None = None,
    on_look: OnLook | None = None,
) -> PreTrainedModel:
    """A new model whose MLPs are replaced by what `spec` asks for; `model` is unchanged.

    A static conversion shares every tensor with `model` except those that a stage changed and the
    new α (layers · K scalars); training the one therefore trains the other, and moving the one
    would move parts of the other, so move `model` before. A routed one holds its own MLP weights,
    sorted by expert. Each MLP's reading is first proved against the original module on random
    input. calibration: text that methods may look at, where `spec` needs it.
    on_progress(message, share) is told what is being done and which share of the layers was begun
    before, again and again, one call at a time but maybe from several threads; what it raises ends
    the work within a layer and comes out of here. state, recover_seconds, on_look: of training
    after it, a folder from which it goes on after it was ended, a limit of time (with which
    `spec_of` tells the steps that fitted in), and who is told of its looks; see `recover`. Raises
    UnsupportedModelError if the model cannot be split or lies on several devices, SpecError if the
    spec does not fit it or the calibration is missing. Warns (CalibrationWarning) where a fit has
    too few calibration tokens.
    """
    if calibration is not None:
        warn_of_few_tokens(model, [spec], calibration)
    how = state, recover_seconds, on_look
    return convert_all(model, [spec], calibration, on_progress, *how)[0]


@torch.no_grad()
def convert_all(
    model: PreTrainedModel,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None = None,
    on_progress: Progress | None = None,
    state: Path | None = None,
    recover_seconds: float | None = None,
    on_look: OnLook | None = None,
) -> list[PreTrainedModel]:
    """`convert` for several specs, with as few passes over the calibration text as possible: one
    for all, one more if something is found from the whole model first, and one for each that is
    calibrated progressively. With what was `observed` on the text, only these last ones."""
    if isinstance(calibration, Calibration):
        check_tokens(model, calibration.samples)
    report = _Report(on_progress, "converting")
    train = partial(
        recover, on_progress=report, state=state, seconds=recover_seconds, on_look=on_look
    )
    with stoppable(report.again):
        return _convert_all(model, specs, calibration, report, train)


def _convert_all(
    model: PreTrainedModel,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None,
    report: _Report,
    train: Callable[..., RecoveryReport],
) -> list[PreTrainedModel]:
    mlps = read_mlps(model)
    for spec in specs:
        spec.check_fits(min(mlp.weights.d_ff for mlp in mlps), len(mlps))
        if spec.needs_calibration and calibration is None:
            raise SpecError(
                f"{spec.to_flags()} needs a calibration text: give one to look at activations on."
            )
    for mlp in mlps:
        may_stop()
        _prove(mlp)
    learnt = _learnt(model, mlps, specs, calibration, report)
    by_layer = _by_layer(model, mlps, specs, calibration, report, learnt)
    made: dict[int, list[nn.Module]] = {}
    together = []
    for index, spec in enumerate(specs):
        if not spec.converts_by_text:
            made[index] = _side_by_side(mlps, by_layer[index], report)
        elif not spec.progressive:
            together.append(index)
    for group in (together, *([i] for i, spec in enumerate(specs) if spec.progressive)):
        if group:
            first = specs[group[0]]
            corrected = first.progressive and (not first.routed or first.compensation == "refit")
            how = first.progressive, corrected, learnt
            made |= _calibrated(model, mlps, by_layer, group, calibration, report, *how)
    converted = [_replaced(model, mlps, made[index]) for index in range(len(specs))]
    for new, spec in zip(converted, specs, strict=True):
        setattr(new, _SPEC, spec)
        if spec.recovers and set(range(len(mlps))) - set(spec.spared_layers):
            text = calibration.calibration if isinstance(calibration, Observed) else calibration
            recovery = train(model, new, spec, text)
            setattr(new, _RECOVERY, recovery)
            setattr(new, _SPEC, recovery.done(spec))
    return converted


class _Report:
    """Tells what is being done, and the same again wherever work may stop."""

    def __init__(self, on_progress: Progress | None, message: str) -> None:
        self.on_progress, self.last = on_progress, (message, 0.0)
        self._lock, self._ended = Lock(), None

    def __call__(self, message: str, share: float) -> None:
        self.last = message, share
        self.again()

    def again(self) -> None:
        if self.on_progress is None:
            return
        with self._lock:
            if self._ended is not None:  # said in another thread, for all of them
                raise self._ended
            try:
                self.on_progress(*self.last)
            except BaseException as ended:
                self._ended = ended
                raise


def _side_by_side(
    mlps: Sequence[DenseMLP], specs: Sequence[ConversionSpec], report: _Report
) -> list[nn.Module]:
    """Each MLP converted with its spec, several at a time: NumPy, which finds the fade thresholds,
    lets other threads run. What ends one keeps the others from being begun."""
    begun = count()

    def make(mlp: DenseMLP, spec: ConversionSpec) -> nn.Module:
        report("converting", next(begun) / len(mlps))
        return convert_mlp(mlp.weights, spec)

    contexts = [copy_context() for _ in mlps]  # a thread has none of its maker's
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda c, *one: c.run(make, *one), contexts, mlps, specs))


def recovery_of(model: PreTrainedModel) -> RecoveryReport | None:
    """What training did after the conversion of `model`; None if there was none."""
    return getattr(model, _RECOVERY, None)


def spec_of(model: PreTrainedModel) -> ConversionSpec | None:
    """What `model` was converted with; None for a dense model."""
    return getattr(model, _SPEC, None)


def _calibrated(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    by_layer: Sequence[Sequence[ConversionSpec]],
    group: Sequence[int],
    calibration: Calibration | Observed,
    report: _Report,
    progressive: bool,
    corrected: bool,
    learnt: Sequence[Tensor] | None,
) -> dict[int, list[nn.Module]]:
    """One pass over the calibration text for the specs of `group`; modules by spec and layer."""
    made: dict[int, list[nn.Module]] = {index: [] for index in group}

    def visit(layer: int, activations: LayerActivations) -> nn.Module | None:
        report("calibrating", layer / len(mlps))
        for index in group:
            spec = by_layer[index][layer]
            made[index].append(convert_mlp(activations.weights, spec, activations))
        return made[group[0]][-1] if progressive else None

    visit_layers(model, mlps, calibration, visit, progressive, corrected, learnt)
    return made


def _learnt(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None,
    report: _Report,
) -> list[Tensor] | None:
    """The sensitivities of the layers, if one of the specs looks at them."""
    if not any(spec.looks_at_loss for spec in specs):
        return None
    observed = isinstance(calibration, Observed)
    if observed and calibration.layers[0].sensitivity is not None:
        return [layer.sensitivity for layer in calibration.layers]
    text = calibration.calibration if observed else calibration
    found = sensitivities(model, mlps, text, lambda share: report("weighing the layers", share))
    if observed:
        calibration.learn(found)
    return found


def _by_layer(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None,
    report: _Report,
    learnt: Sequence[Tensor] | None,
) -> list[list[ConversionSpec]]:
    """Each spec as one per layer, with what is found from all layers that are not spared filled
    in: τ where it is the median over their neurons, and K or fade where they share it out."""
    values: dict[ConversionSpec, list[Tensor]] = {spec: [] for spec in specs if _needs_tau(spec)}
    curves = {spec: [] for spec in specs if spec.shares_out}

    def visit(layer: int, activations: LayerActivations) -> None:
        report("profiling", layer / len(mlps))
        for spec, found in values.items():
            if spec.at(layer) is spec:
                found.append(variation(activations.gate_means(spec.profile)))
        for spec, found in curves.items():
            if spec.at(layer) is spec:
                found.append(cost_curve(spec, activations))

    if values or curves:
        visit_layers(model, mlps, calibration, visit, sensitivities=learnt)
    result = []
    for spec in specs:
        by_layer = [spec.at(layer) for layer in range(len(mlps))]
        converted = [layer for layer, own in enumerate(by_layer) if own is spec]
        choices = [spec] * len(converted)
        if converted and _needs_tau(spec):
            tau = min(float(torch.cat(values[spec]).median()), MAX_TAU)
            choices = [replace(spec, tau=tau)] * len(converted)
        elif spec.shares_out:
            choices = share_out(spec, curves[spec])
        for layer, choice in zip(converted, choices, strict=True):
            by_layer[layer] = choice
        result.append(by_layer)
    return result


def _needs_tau(spec: ConversionSpec) -> bool:
    return spec.shared == AUTO and spec.tau is None


def observe(
    model: PreTrainedModel, calibration: Calibration, on_progress: Progress | None = None
) -> Observed:
    """The activations of all MLPs of `model`, to convert many times without another pass. Holds
    the inputs of all layers: layers · tokens · d_model numbers. on_progress: see `convert`."""
    check_tokens(model, calibration.samples)
    mlps, layers = read_mlps(model), []
    report = _Report(on_progress, "calibrating")

    def visit(layer: int, activations: LayerActivations) -> None:
        report("calibrating", layer / len(mlps))
        layers.append(activations)

    with stoppable(report.again):
        visit_layers(model, mlps, calibration, visit)
    return Observed(calibration, layers)


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
    """What `spec` makes of one MLP; `layer`: its activations, where the spec needs them."""
    if spec.routed:
        return build_routed(weights, spec, spec.routed, layer)
    return build_static(weights, spec, layer)


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
    """A second module tree over the same tensors: hooks on it leave the first alone. Raises
    UnsupportedModelError for a model that is spread over several devices."""
    check_one_device(model)
    return _with_modules_replaced(model, {})


def _with_modules_replaced(model: _Module, replacements: Mapping[nn.Module, nn.Module]) -> _Module:
    """A copy of the module tree with some modules swapped; tensors are shared, not copied.

    deepcopy takes what its memo holds instead of copying it.
    """
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    for module in model.modules():  # has a dozen of these for hooks, and deepcopy is slow with them
        empty = (x for x in vars(module).values() if type(x) is OrderedDict and not x)
        memo.update((id(each), OrderedDict()) for each in empty)
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
        if not all(p.isfinite().all() for p in mlp.module.parameters()):
            raise UnsupportedModelError(
                f"{mlp.name} holds infinite or undefined weights; they are damaged."
            )
        raise not_finite(mlp.name, up.dtype)
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
