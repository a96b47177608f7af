"""Exact parameter counts, of the whole model and of its MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.conversion import mlp_modules


@dataclass(frozen=True)
class ParameterReport:
    """Counts of scalars; tensors that are tied or shared within the model count once."""

    total: int  # stored parameters, α included
    nonzero: int  # of these, not equal to zero
    mlp_total: int
    mlp_nonzero: int
    active_per_token: int  # parameters of the modules that run for a token; zeros count
    macs_per_token: int  # multiply-adds in weight matrices, head included, embedding look-up not
    mlp_macs_per_token: int


def parameter_report(
    model: PreTrainedModel, known_nonzero: Callable[[Tensor], int | None] | None = None
) -> ParameterReport:
    """Count the parameters of a dense or converted model.

    Multiply-adds leave out attention scores, which depend on the context length. A static
    conversion runs all that it stores, so active_per_token equals total. `known_nonzero(parameter)`
    may give a count that the caller remembers; None has the parameter counted.
    """
    mlps = mlp_modules(model)
    nonzero = {}
    for parameter in model.parameters():
        known = known_nonzero(parameter) if known_nonzero else None
        count = torch.count_nonzero(parameter) if known is None else known
        nonzero[id(parameter)] = int(count)
    total = sum(p.numel() for p in model.parameters())
    mlp_parameters = list({id(p): p for mlp in mlps for p in mlp.parameters()}.values())
    return ParameterReport(
        total=total,
        nonzero=sum(nonzero.values()),
        mlp_total=sum(p.numel() for p in mlp_parameters),
        mlp_nonzero=sum(nonzero[id(p)] for p in mlp_parameters),
        active_per_token=total,
        macs_per_token=_macs(model.modules()),
        mlp_macs_per_token=_macs(module for mlp in mlps for module in mlp.modules()),
    )


def _macs(modules: Iterable[nn.Module]) -> int:
    return sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear | Conv1D))
