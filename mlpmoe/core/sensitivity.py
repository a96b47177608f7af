"""Sensitivity: how the loss of a model depends on what each of its MLPs says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import Calibration
from .errors import not_finite
from .mlps import DenseMLP
from .stopping import may_stop, stop_between_modules

TOKENS = 8192  # of the calibration text, at most: gradients take three times a forward pass
BATCH = 2**25  # logits held at a time


def sensitivities(
    model: PreTrainedModel,
    mlps: Sequence[DenseMLP],
    calibration: Calibration,
    report: Callable[[float], None] = lambda share: None,
) -> list[Tensor]:
    """Of each MLP, (d_model, d_model) float64 on the CPU: the mean of g gᵀ over tokens, with g the
    gradient of the summed loss of the next tokens with respect to the output of the MLP.

    M is the Fisher information: a change δ of that output, if it does not hang on the token, costs
    about ½ δᵀ M δ nats per token of KL divergence. Next tokens are drawn from the model itself,
    always the same way: the text's own make early layers look 2.5 times as sensitive and the last
    1.1 times (SmolLM2-135M), and shares by them are worse. One backward pass over the first TOKENS
    tokens of the calibration text; no parameter of `model` gets a gradient. report: told which
    share of the text is done.
    """
    samples = calibration.samples[: max(1, TOKENS // calibration.samples.shape[1])]
    step = max(1, BATCH // (model.config.get_text_config().vocab_size * samples.shape[1]))
    twin, probes = _probed(model, mlps)
    generator = torch.Generator().manual_seed(0)
    found = [torch.zeros((mlp.weights.d_model,) * 2, dtype=torch.float64) for mlp in mlps]
    for start in range(0, len(samples), step):
        report(start / len(samples))
        ids = samples[start : start + step].to(model.device)
        with torch.enable_grad():
            logits = twin(ids, use_cache=False).logits.flatten(0, 1).float()
            probabilities = logits.detach().softmax(-1).cpu()
            if not probabilities.isfinite().all():
                raise not_finite("this model", model.dtype)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            may_stop()
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, [probe.added for probe in probes])
        del logits, loss, probabilities
        for total, gradient in zip(found, gradients, strict=True):
            g = gradient.flatten(0, -2).float()
            total += (g.T @ g).cpu()
    return [total / samples.numel() for total in found]


class _Probe(nn.Module):
    """An MLP that adds zeros to its output, by which the gradient is found."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.added: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        said = self.mlp(*inputs)
        self.added = torch.zeros_like(said, requires_grad=True)
        return said + self.added


def _probed(model: PreTrainedModel, mlps: Sequence[DenseMLP]) -> tuple[nn.Module, list[_Probe]]:
    """A twin of the model over the same tensors, with a probe for each MLP."""
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    probes = []
    for mlp in mlps:
        probes.append(_Probe(copy.deepcopy(mlp.module, dict(memo))))
        memo[id(mlp.module)] = probes[-1]
    twin = copy.deepcopy(model, memo).eval()
    stop_between_modules(twin)
    return twin, probes
