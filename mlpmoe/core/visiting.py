"""Run a calibration text through a model and look at every MLP on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import activations
from .activations import LayerActivations
from .calibration import Calibration
from .errors import not_finite
from .mlps import DenseMLP, MLPWeights, decoder_layers
from .stopping import may_stop, stop_between_modules

DRIFT = 0.5  # of the distance between both streams; measured best of 0, ½ and 1 on a small Llama


@dataclass(frozen=True)
class Observed:
    """A calibration text with what every MLP of one model did on it."""

    calibration: Calibration
    layers: Sequence[LayerActivations]

    def learn(self, found: Sequence[Tensor]) -> None:
        """Take in the sensitivities of the layers."""
        for layer, sensitivity in zip(self.layers, found, strict=True):
            layer.sensitivity = sensitivity


Visit = Callable[[int, LayerActivations], nn.Module | None]


@torch.no_grad()
def visit_layers(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    calibration: Calibration | Observed,
    visit: Visit,
    progressive: bool = False,
    corrected: bool = False,
    sensitivities: Sequence[Tensor | None] | None = None,
) -> None:
    """Run the calibration text through `model` once and call `visit(layer, activations)` at each
    MLP, in order of the layers. What was observed before needs no run.

    The samples go through together, so that a layer is seen whole before the next: what is held
    is one layer's input. If progressive, `visit` returns a module, and the layers that follow see
    its output instead of the dense MLP's. If corrected, the samples go through twice side by
    side, dense and converted, and the wanted output of an MLP makes up for DRIFT of what they
    have come apart. sensitivities: of the layers, for their activations to tell. The head, whose
    output would be the largest tensor, does not run. UserError where the model computes infinite or
    undefined numbers, of which nothing can be learnt.
    """
    if isinstance(calibration, Observed):
        if not progressive:
            for layer, seen in enumerate(calibration.layers):
                visit(layer, seen)
            return
        calibration = calibration.calibration
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    kind = _Paired if corrected else _Visited
    for layer, mlp in enumerate(mlps):
        dense = copy.deepcopy(mlp.module, dict(memo)).eval()  # the model may be in training
        sensitivity = sensitivities[layer] if sensitivities else None
        memo[id(mlp.module)] = kind(layer, mlp.weights, dense, visit, sensitivity)
    twin = copy.deepcopy(model, memo).eval()
    stop_between_modules(twin)
    samples = calibration.samples
    if corrected:
        samples = torch.cat([samples, samples])
        for layer in decoder_layers(twin)[1]:
            (paired,) = (module for module in layer.modules() if isinstance(module, _Paired))
            layer.forward = partial(paired.run_layer, layer.forward)
    twin.get_decoder()(samples.to(model.device), use_cache=False)


class _Visited(nn.Module):
    """Stands in for an MLP during calibration."""

    def __init__(
        self, layer: int, weights: MLPWeights, dense: nn.Module, visit: Visit,
        sensitivity: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.weights, self.dense, self.visit = layer, weights, dense, visit
        self.sensitivity = sensitivity

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        batched = self.finite(x).view(-1, *x.shape[-2:]) if x.ndim > 2 else self.finite(x)[None]
        seen = LayerActivations(self.weights, batched, sensitivity=self.sensitivity)
        run = self.visit(self.layer, seen) or self.dense
        return self.in_pieces(run, x, *rest)

    def in_pieces(self, run: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        """run(x, *rest), of inputs of any shape, some samples at a time."""
        batched = [t.reshape(-1, *t.shape[-2:]) if t.ndim > 2 else t[None] for t in (x, *rest)]
        step = max(1, activations.CHUNK // (batched[0].shape[1] * self.weights.d_ff))
        pieces = zip(*(t.split(step) for t in batched), strict=True)
        return torch.cat([self.run_piece(run, piece) for piece in pieces]).view_as(x)

    def run_piece(self, run: nn.Module, piece: tuple[Tensor, ...]) -> Tensor:
        may_stop()
        return self.finite(run(*piece))

    def finite(self, values: Tensor) -> Tensor:
        """The values, if they are numbers."""
        if not values.isfinite().all():
            raise not_finite(f"layer {self.layer} of this model", values.dtype)
        return values


class _Paired(_Visited):
    """The same with two streams, of the dense model and of the converted one, in the first and
    second half of the samples. Each decoder layer runs twice: with the dense MLP for both, to see
    how far the streams are apart after it, and then with the converted one."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.converted: nn.Module | None = None

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        dense, other = zip(*(t.chunk(2) for t in (self.finite(x), *rest)), strict=True)
        said = self.in_pieces(self.dense, *dense)
        if self.converted is not None:
            return torch.cat([said, self.in_pieces(self.converted, *other)])
        answer = self.in_pieces(self.dense, *other)
        self.caught = other[0], (answer - other[1] if rest else answer).float()
        return torch.cat([said, answer])

    def run_layer(self, forward: Callable, *args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        streams = (result[0] if isinstance(result, tuple) else result).float()
        (x, wanted), (dense, other) = self.caught, streams.chunk(2)
        target = wanted + DRIFT * (dense - other).view_as(wanted)
        seen = LayerActivations(self.weights, x, target, self.sensitivity)
        self.converted = self.visit(self.layer, seen)
        return forward(*args, **kwargs)
