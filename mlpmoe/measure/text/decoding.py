"""Decoding with a key-value cache, on every transformers release that we allow."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from inspect import signature

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...core.kernels.decoder import CompiledDecoder, decodes

# transformers 5.24 renamed the argument and the output, and warns of the old name
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)


class Reader:
    """A model that reads on: a prompt, then token by token, in compiled kernels where they compute
    what the model does.

    capacity: tokens that it may read, prompt included. compiled: False for torch alone.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, compiled: bool = True) -> None:
        self.model, self._cache = model, None
        self._decoder = None
        if compiled and decodes(model):
            self._decoder = CompiledDecoder(model, capacity)

    def read(self, ids: Tensor) -> Tensor:
        """(1, tokens) -> logits after the last of them, (1, vocabulary)."""
        decoder = self._decoder
        if decoder is not None and decoder.position:
            for token in ids[0].tolist():
                logits = decoder.step(token)
            return logits
        logits, cache = read_on(self.model, ids, self._cache)
        if decoder is None:
            self._cache = cache
        else:
            decoder.take([(layer.keys, layer.values) for layer in cache.layers])
        return logits


def read_on(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """Read `ids` (1, tokens) after what `cache` holds (None: nothing). Returns the logits after the
    last of them (1, vocabulary) and the cache for the next step."""
    last = {"logits_to_keep": 1} if _keeps_logits(type(model)) else {}
    out = model(ids, use_cache=True, **{CACHE: cache}, **last)
    return out["logits"][:, -1], out.get(CACHE)


@lru_cache
def _keeps_logits(kind: type[PreTrainedModel]) -> bool:
    """Whether the head can be asked for the last token only."""
    return "logits_to_keep" in signature(kind.forward).parameters
