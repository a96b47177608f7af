"""Exact parameter counts, of the whole model and of its MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...core.conversion import mlp_modules
from ...core.routed import ROUTED_TYPES


@dataclass(frozen=True)
class ParameterReport:
    """Counts of scalars; tensors that are tied or shared within the model count once."""

    total: int  # stored parameters, α included
    nonzero: int  # of these, not equal to zero
    mlp_total: int
    mlp_nonzero: int
    active_per_token: int  # parameters that a token meets, on average; zeros count
    macs_per_token: int  # multiply-adds in weight matrices, head included, embedding look-up not
    mlp_macs_per_token: int


def parameter_report(
    model: PreTrainedModel, known_nonzero: Callable[[Tensor], int | None] | None = None
) -> ParameterReport:
    """Count the parameters of a dense or converted model.

    Multiply-adds leave out attention scores, which depend on the context length. A static
    conversion runs all that it stores, so active_per_token equals total; of a routed one, neurons
    that a token does not choose are left out, and routers count. An average over tokens is that
    on the calibration text. `known_nonzero(parameter)` may give a count that the caller
    remembers; None has the parameter counted.
    """
    mlps = mlp_modules(model)
    nonzero = {}
    for parameter in model.parameters():
        known = known_nonzero(parameter) if known_nonzero else None
        count = torch.count_nonzero(parameter) if known is None else known
        nonzero[id(parameter)] = int(count)
    total = sum(p.numel() for p in model.parameters())
    mlp_parameters = list({id(p): p for mlp in mlps for p in mlp.parameters()}.values())
    routed = [mlp for mlp in mlps if isinstance(mlp, ROUTED_TYPES)]
    inside = {id(module) for mlp in mlps for module in mlp.modules()}
    elsewhere = _macs(module for module in model.modules() if id(module) not in inside)
    mlp_macs = sum(
        mlp.macs_per_token if isinstance(mlp, ROUTED_TYPES) else _macs(mlp.modules())
        for mlp in mlps
    )
    return ParameterReport(
        total=total,
        nonzero=sum(nonzero.values()),
        mlp_total=sum(p.numel() for p in mlp_parameters),
        mlp_nonzero=sum(nonzero[id(p)] for p in mlp_parameters),
        active_per_token=total - round(sum(mlp.idle_parameters for mlp in routed)),
        macs_per_token=elsewhere + round(mlp_macs),
        mlp_macs_per_token=round(mlp_macs),
    )


def _macs(modules: Iterable[nn.Module]) -> int:
    return sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear | Conv1D))
