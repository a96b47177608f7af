"""How much a model runs for each token once it was trained, where thresholds decide that."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..routed import ROUTED_TYPES, InputMLP
from ..routed.input_mlp import Stages
from ..wide import widened
from .student import frozen_twin

TOKENS = 4096  # that are counted on, at most
TOGETHER = 512  # of these


@torch.no_grad()
def recount(model: PreTrainedModel, samples: Tensor) -> None:
    """Bring `active` of all modules that choose by a threshold up to date, in place.

    samples: (samples, tokens) int64. Scores change with the weights they come from, and so does
    how many of them lie above a threshold; what a token costs is told from this number.
    """
    modules = {name: m for name, m in model.named_modules() if _by_threshold(m)}
    if not modules:
        return
    twin, found = frozen_twin(model), defaultdict(list)
    for name in modules:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: found[name].append(_running(module, inputs[0]))
        )
    length = samples.shape[1]
    for some in samples[: max(1, TOKENS // length)].split(max(1, TOGETHER // length)):
        twin.get_decoder()(some.to(model.device), use_cache=False)
    for name, module in modules.items():
        mean = widened(torch.cat(found[name])).mean(0).tolist()
        module.active = Stages(*mean) if isinstance(module, InputMLP) else mean[0]


def _by_threshold(module: nn.Module) -> bool:
    if isinstance(module, InputMLP):
        return module.thresholds is not None
    return isinstance(module, ROUTED_TYPES) and getattr(module, "threshold", None) is not None


def _running(module: nn.Module, x: Tensor) -> Tensor:
    """(tokens, 1), or of an InputMLP (tokens, stages): how many each token runs."""
    x = x.reshape(-1, x.shape[-1])
    if not isinstance(module, InputMLP):
        return module.select(x).sum(1, keepdim=True)
    counts = {stage: x.new_full((len(x),), n) for stage, n in module.active._asdict().items()}

    def choose(stage: str, scores: Tensor) -> Tensor:
        chosen = module.choose(stage, scores)
        counts[stage] = chosen.sum(1)
        return chosen

    module.run(x, choose)
    return torch.stack([counts[stage].float() for stage in Stages._fields], dim=1)
