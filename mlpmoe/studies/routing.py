"""How a token finds the copy of its domain: told, by a map in each layer, by its whole context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.routed import RoutedMLP
from ..core.routed.routers import LinearRouter, fit_router
from ..core.wide import wide_sum
from ..measure.text.graphs import CACHE

TOGETHER = 4  # samples in a pass


class Told(nn.Module):
    """A router that chooses the expert it was told, for every token: set `expert`."""

    macs = 0

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts, self.expert = experts, 0

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, experts): 1 for the expert, 0 for others."""
        scores = x.new_zeros(len(x), self.experts)
        scores[:, self.expert] = 1
        return scores


class ByContext(nn.Module):
    """A router of all layers that knows the text so far: Bayes' rule for independent tokens.

    Score of a domain at a token = Σ log p(token | domain) over the context up to this token, for
    domains that are equally likely before. Branch-Train-Merge (arXiv 2208.03306) has this posterior
    from its experts' own probabilities, for which all of them have to run; here the probabilities
    are how often single tokens occur in the training text, plus one.

    texts: of each domain, int64 of any shape. `reads(model)` lets it see what the model is given.
    """

    macs = 0

    def __init__(self, texts: Sequence[Tensor], vocabulary: int) -> None:
        super().__init__()
        counts = torch.stack([torch.bincount(t.flatten(), minlength=vocabulary) for t in texts])
        chances = (counts + 1).double() / (counts + 1).sum(1, keepdim=True)
        self.register_buffer("table", chances.log().float())  # (domains, vocabulary)
        self._said: list[Tensor] = []  # a list, for twins of the model to have the same one

    def reads(self, model: PreTrainedModel) -> None:
        """Take note of the tokens of every forward pass of `model`, which has this router."""
        model.get_decoder().register_forward_pre_hook(self._read, with_kwargs=True)

    def scores(self, ids: Tensor) -> Tensor:
        """(samples, tokens, domains) of ids (samples, tokens)."""
        return self.table[:, ids].cumsum(-1).movedim(0, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, domains), of the pass that is under way. x: (tokens, d_model)."""
        return self._said[0].flatten(0, 1)

    def _read(self, decoder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else given[0]
        scores, cache = self.scores(ids), named.get(CACHE)
        if cache is not None and cache.get_seq_length():  # what came before was read before
            scores = scores + self._said[0][:, -1:]
        self._said[:] = [scores]


@torch.no_grad()
def fit_by_layer(
    model: PreTrainedModel, told: Told, texts: Sequence[Tensor]
) -> dict[str, LinearRouter]:
    """For each MLP, by its path: the linear map of its input that tells the domains apart best, by
    ridge regression on their one-hot codes.

    model: whose router is `told`, so that every text is seen as its own copy makes it. texts: of
    each domain, (samples, tokens) int64. Holds the inputs of all layers.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(
            lambda module, given, path=path: seen[path].append(given[0].flatten(0, -2))
        )
        for path, module in _experts(model).items()
    ]
    for expert, samples in enumerate(texts):
        told.expert = expert
        for some in samples.split(TOGETHER):
            model.get_decoder()(some.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    counts = torch.tensor([samples.numel() for samples in texts])
    domain = torch.arange(len(texts)).repeat_interleave(counts).to(model.device)
    wanted = F.one_hot(domain, len(texts)).float()
    return {path: fit_router(torch.cat(x), wanted) for path, x in seen.items()}


@torch.no_grad()
def share_of_expert(model: PreTrainedModel, expert: int, samples: Tensor) -> float:
    """Which share of the tokens runs that expert, in the mean over the layers."""
    found = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, given: found.append(
                wide_sum(module.select(given[0].flatten(0, -2))[:, expert])
            )
        )
        for module in _experts(model).values()
    ]
    for some in samples.split(TOGETHER):
        model.get_decoder()(some.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return float(sum(found)) / samples.numel() / len(handles)


def _experts(model: nn.Module) -> dict[str, RoutedMLP]:
    return {path: m for path, m in model.named_modules() if isinstance(m, RoutedMLP)}
