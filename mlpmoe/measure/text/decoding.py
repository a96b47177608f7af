"""One step of decoding with a key-value cache, on every transformers release that we allow."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the argument and the output, and warns of the old name
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)


def read_on(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """Read `ids` (1, tokens) after what `cache` holds (None: nothing). Returns the logits after the
    last of them (1, vocabulary) and the cache for the next step."""
    out = model(ids, use_cache=True, **{CACHE: cache})
    return out["logits"][:, -1], out.get(CACHE)
