"""The losses of a window, with logits for a few positions at a time.

The logits of a window of 2,048 tokens over a vocabulary of 262,144 have 2.1 GB in float32; those
of the tokens that are context only are never needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.calibration import check_tokens
from ...core.errors import not_finite
from ...core.one_device import check_one_device
from ...core.stopping import stoppable_twin

LOGITS_AT_ONCE = 2**24  # numbers; a few copies of them in float32 are all that is allocated
PROBE_TOKENS = 4
MIXED = 0.02  # of the largest logit; 16 bits round to 0.8 %

# Classes of models -> whether the logits of hidden states, taken apart, are those of the whole
# forward pass. It depends on their code, not on their weights.
_splits: dict[type, bool] = {}


class _Given(nn.Module):
    """Stands in for a decoder: returns what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """Losses in nats of ids[first:], each predicted from all ids before it; (tokens - first,)
    float32 on the CPU. Work may stop between the modules of the model. UserError for tokens that
    have no row in the model, and where float16 has no numbers for what it computes; in a wider
    dtype, infinite losses are those of a broken model. UnsupportedModelError for a model that is
    spread over several devices.
    """
    check_one_device(model)
    check_tokens(model, ids)
    losses = _token_losses(stoppable_twin(model), ids.to(model.device), first)
    if model.dtype == torch.float16 and not losses.isfinite().all():
        raise not_finite("this model", model.dtype)
    return losses


def _token_losses(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    if not _can_split(model, ids):
        logits = model(ids[None], use_cache=False).logits[0, first - 1 : -1]
        return torch.cat([_losses(*part) for part in _parts(logits, ids[first:])])
    output = model.base_model(ids[None], use_cache=False)
    hidden = output.last_hidden_state[:, first - 1 : -1]
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config(decoder=True).vocab_size)
    pieces = zip(hidden.split(rows, dim=1), ids[first:].split(rows), strict=True)
    return torch.cat([_losses(_logits(model, output, h)[0], y) for h, y in pieces])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu()


def _parts(logits: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    return list(zip(logits.split(rows), targets.split(rows), strict=True))


def _logits(model: PreTrainedModel, output: Any, hidden: Tensor) -> Tensor:
    """What the model makes of these hidden states, by its own code: scaled, capped or as it is."""
    given = copy.copy(output)
    given["last_hidden_state"] = hidden
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _Given(given)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return head(ids, use_cache=False).logits


def _can_split(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether decoder and head give the same one after the other as together, proved once for
    each class of models on a few tokens."""
    if "forward" in vars(model):  # a forward that was hooked: see accelerate
        return False
    kind = type(model)
    if kind not in _splits:
        whole = model(ids[None, :PROBE_TOKENS], use_cache=False).logits
        if not whole.isfinite().all():
            return False  # of this broken model; the next one of its class may prove it
        _splits[kind] = _splits_exactly(model, ids[None, :PROBE_TOKENS], whole)
    return _splits[kind]


def _splits_exactly(model: PreTrainedModel, ids: Tensor, whole: Tensor) -> bool:
    try:
        output = model.base_model(ids, use_cache=False)
        hidden = output.last_hidden_state
        again = _logits(model, output, hidden)
        apart = [_logits(model, output, h) for h in hidden.split(1, dim=1)]
    except Exception:  # an architecture of another shape: its logits are taken whole
        return False
    if not (again.shape == whole.shape and torch.equal(again, whole)):
        return False
    # Single rows round otherwise; what mixes the logits of several tokens makes more of a change.
    difference = (torch.cat(apart, dim=1) - whole).abs().max()
    return bool(difference <= MIXED * whole.abs().max())
