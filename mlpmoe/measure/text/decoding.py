"""Decoding with a key-value cache, on every transformers release that we allow."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...core.kernels.decoder import CompiledDecoder, decodes
from .graphs import CACHE, GraphDecoder, records


class Reader:
    """A model that reads on: a prompt, then token by token, in compiled kernels where they compute
    what the model does, or on a GPU as a graph.

    capacity: tokens that it may read, prompt included. compiled: False for torch alone.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, compiled: bool = True) -> None:
        self.model, self._cache = model, None
        self._decoder: CompiledDecoder | GraphDecoder | None = None
        if compiled and decodes(model):
            self._decoder = CompiledDecoder(model, capacity)
        elif compiled and records(model):
            self._decoder = GraphDecoder(model, capacity)

    def restart(self) -> None:
        """Forget what was read, for another text of at most the same capacity."""
        self._cache = None
        if self._decoder is not None:
            self._decoder.position = 0

    def read(self, ids: Tensor) -> Tensor:
        """(1, tokens) -> logits after the last of them, (1, vocabulary)."""
        decoder = self._decoder
        if decoder is not None and decoder.position:
            for token in ids[0] if isinstance(decoder, GraphDecoder) else ids[0].tolist():
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
