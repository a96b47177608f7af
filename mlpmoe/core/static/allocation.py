"""Allocation: one budget for all layers, or more for those whose loss would cost more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import LayerActivations
from ..errors import SpecError
from ..spec import MAX_FADE, ConversionSpec
from ..stopping import may_stop
from .branched import branch_sizes
from .order import ORDERS, removal_by_loss
from .pipeline import build_static

COMPARED_TOKENS = 4096  # on which outputs of a layer are compared
KEEP_LEVELS = 16  # values of K tried, about, where there are more branches
COUNTED_LEVELS = 64  # the same where none has to be tried, see `_counted`
FADE_STEPS = 4  # strengths tried below and above the mean one, in equal steps


def candidates(spec: ConversionSpec) -> list[ConversionSpec]:
    """What a layer may get, from the least to the most: K where branches are dropped, else fade.
    Whether the model is converted progressively is no matter of a layer."""
    uniform = replace(spec, allocation="uniform", progressive=False)
    if spec.kept < spec.branches:
        step = max(1, spec.branches // (COUNTED_LEVELS if _counted(spec) else KEEP_LEVELS))
        first = (spec.kept - 1) % step + 1
        return [replace(uniform, keep=keep) for keep in range(first, spec.branches + 1, step)]
    if spec.fade:
        step = min(spec.fade, MAX_FADE - spec.fade) / FADE_STEPS
        steps = range(FADE_STEPS, -FADE_STEPS - 1, -1)
        return [replace(uniform, fade=spec.fade + i * step) for i in steps]
    return [uniform]


@torch.no_grad()
def cost_curve(spec: ConversionSpec, layer: LayerActivations) -> Tensor:
    """(candidates,) float64: what each candidate costs in this layer, comparable between layers.

    "global": the scores of the neurons that go, as FLAP standardises them, so that sharing out is
    one ranking of the neurons of all layers (arXiv 2312.11983). "sensitivity": the loss of the
    model in nats per token, to second order, see sensitivity.py. Where down is fitted again, that
    is known from dropping neurons one after the other; else the output is compared. Fade is
    judged by Wanda's score in place of SparseGPT's, and before compensation: it is the comparison
    of layers that counts, and fits for every strength would take minutes.
    """
    if spec.allocation == "global":
        score = (layer.variance * layer.down_norms.square()).double()
        score = (score - score.mean()) / score.std().clamp(min=1e-30)
        gone = F.pad(score.sort().values.cumsum(0), (1, 0))  # the lowest 0, 1, ...
        return _when_kept(spec, gone.flip(0))
    if _counted(spec):
        return _when_kept(spec, removal_by_loss(layer.weights, layer).lost)
    if spec.kept == spec.branches:
        score = "wanda" if spec.fade_score == "sparsegpt" else spec.fade_score
        spec = replace(spec, fade_score=score, compensation="none", progressive=False)
    samples = -(-COMPARED_TOKENS // layer.x.shape[1])
    step = -(-len(layer.x) // samples)
    x = layer.x[::step]
    wanted = build_static(layer.weights, ConversionSpec(branches=1), layer)(x).float()
    sensitivity = layer.sensitivity.to(wanted)
    costs = []
    for candidate in candidates(spec):
        may_stop()
        try:
            made = build_static(layer.weights, candidate, layer)
        except SpecError:  # it would leave no neuron
            costs.append(wanted.new_tensor(float("inf")))
            continue
        error = (made(x).float() - wanted).flatten(0, -2)
        costs.append(((error @ sensitivity) * error).sum(1).mean() / 2)
    return torch.stack(costs).cpu().double()


def _counted(spec: ConversionSpec) -> bool:
    """Whether one figure per neuron tells what every K costs, without trying it."""
    if spec.allocation == "global":
        return True
    fitted = spec.compensation == "refit" and ORDERS[spec.order].calibrated
    return fitted and spec.kept < spec.branches and not spec.fades


def _when_kept(spec: ConversionSpec, lost: Tensor) -> Tensor:
    """Of what is lost when 0, 1, ... d_ff neurons stay, what each candidate loses."""
    sizes = branch_sizes(len(lost) - 1, spec.branches)
    return lost[[sum(sizes[: candidate.kept]) for candidate in candidates(spec)]]


def share_out(spec: ConversionSpec, curves: Sequence[Tensor]) -> list[ConversionSpec]:
    """The candidate of each layer with the least sum of costs, at the same mean budget.

    curves: per layer, from `cost_curve`. Exact, by dynamic programming over the layers.
    """
    choices = candidates(spec)
    if len(choices) == 1:
        return choices * len(curves)
    middle = next(i for i, c in enumerate(choices) if (c.kept, c.fade) == (spec.kept, spec.fade))
    total = middle * len(curves)
    best = torch.full((total + 1,), float("inf"), dtype=torch.float64)
    best[0] = 0.0
    taken = []
    for curve in curves:
        options = torch.full((len(choices), total + 1), float("inf"), dtype=torch.float64)
        for level in range(min(len(choices), total + 1)):
            options[level, level:] = best[: total + 1 - level] + curve[level]
        best, chosen = options.min(0)
        taken.append(chosen)
    result, left = [], total
    for chosen in reversed(taken):
        level = int(chosen[left])
        result.append(choices[level])
        left -= level
    return result[::-1]
