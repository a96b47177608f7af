"""Allocation: one budget for all layers, or more for those whose output suffers more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..activations import LayerActivations
from ..errors import SpecError
from ..spec import MAX_FADE, ConversionSpec
from ..stopping import may_stop
from .pipeline import build_static

ERROR_TOKENS = 4096  # on which a layer's output error is measured
KEEP_LEVELS = 16  # values of K tried, about, where there are more branches
FADE_STEPS = 4  # strengths tried below and above the mean one, in equal steps


def candidates(spec: ConversionSpec) -> list[ConversionSpec]:
    """What a layer may get, from the least to the most: K where branches are dropped, else fade.
    Whether the model is converted progressively is no matter of a layer."""
    uniform = replace(spec, allocation="uniform", progressive=False)
    if spec.kept < spec.branches:
        step = max(1, spec.branches // KEEP_LEVELS)
        first = (spec.kept - 1) % step + 1
        return [replace(uniform, keep=keep) for keep in range(first, spec.branches + 1, step)]
    if spec.fade:
        step = min(spec.fade, MAX_FADE - spec.fade) / FADE_STEPS
        steps = range(FADE_STEPS, -FADE_STEPS - 1, -1)
        return [replace(uniform, fade=spec.fade + i * step) for i in steps]
    return [uniform]


@torch.no_grad()
def error_curve(spec: ConversionSpec, layer: LayerActivations) -> Tensor:
    """(candidates,): mean squared error of the layer's output under each candidate, relative to
    the variance of that output.

    Fade is judged by Wanda's score in place of SparseGPT's, and before compensation: it is the
    comparison of layers that counts, and fits for every strength would take minutes.
    """
    if spec.kept == spec.branches:
        score = "wanda" if spec.fade_score == "sparsegpt" else spec.fade_score
        spec = replace(spec, fade_score=score, compensation="none", progressive=False)
    samples = -(-ERROR_TOKENS // layer.x.shape[1])
    step = -(-len(layer.x) // samples)
    x = layer.x[::step]
    dense = build_static(layer.weights, ConversionSpec(branches=1), layer)
    wanted = dense(x).float()
    scale = wanted.flatten(0, -2).var(0).sum().clamp(min=1e-30)
    errors = []
    for candidate in candidates(spec):
        may_stop()
        try:
            made = build_static(layer.weights, candidate, layer)
        except SpecError:  # it would leave no neuron
            errors.append(scale.new_tensor(float("inf")))
            continue
        errors.append((made(x).float() - wanted).square().sum(-1).mean() / scale)
    return torch.stack(errors).cpu().double()


def share_out(spec: ConversionSpec, curves: Sequence[Tensor]) -> list[ConversionSpec]:
    """The candidate of each layer with the least sum of squared errors, at the same mean budget.

    curves: per layer, from `error_curve`. Squared, for a layer that is lost altogether costs more
    than many that suffer a little. Exact, by dynamic programming over the layers.
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
            options[level, level:] = best[: total + 1 - level] + curve[level] ** 2
        best, chosen = options.min(0)
        taken.append(chosen)
    result, left = [], total
    for chosen in reversed(taken):
        level = int(chosen[left])
        result.append(choices[level])
        left -= level
    return result[::-1]
