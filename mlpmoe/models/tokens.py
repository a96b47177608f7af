"""A tokenizer and a model that belong together: each token has its row in the embedding."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import ModelError, shorten

PROBE = "Once upon a time, 3 cats didn't sleep."  # what a tokenizer is tried on
# Tokens that no text is made of: they fill up a batch, or stand where images and sounds will be.
# Gemma 3 of 1 B, which reads text only, has the one for images of its larger siblings.
NO_TEXT = re.compile(r"pad|image|img|vision|video|audio", re.IGNORECASE)


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Take away the tokens that no text is made of and that the model has no row for. Raise
    ModelError if there are others, or if the tokenizer makes nothing of text."""
    rows = model.get_input_embeddings().num_embeddings
    beyond = {text: token for text, token in tokenizer.get_vocab().items() if token >= rows}
    if beyond and tokenizer.is_fast:
        added = tokenizer.get_added_vocab()
        idle = {text for text in beyond if text in added and NO_TEXT.search(text)}
        if idle == beyond.keys():
            take_away(tokenizer, idle)
            beyond = {}
    if beyond:
        first = min(beyond, key=beyond.get)
        raise ModelError(
            f"The tokenizer of {name} does not fit its weights: {len(beyond)} of its tokens, from "
            f"{beyond[first]} ({shorten(first)}), {'has' if len(beyond) == 1 else 'have'} no row "
            f"in the embedding, which has {rows:,}."
        )
    if not tokenizer(PROBE)["input_ids"]:
        raise ModelError(f"The tokenizer of {name} makes nothing of a plain sentence.")


def take_away(tokenizer: PreTrainedTokenizerFast, added: Collection[str]) -> None:
    """Let a tokenizer forget tokens that were added to its vocabulary: they become plain text."""
    if not added:
        return
    for name, value in dict(tokenizer.special_tokens_map).items():
        if isinstance(value, str) and value in added:
            setattr(tokenizer, name, None)
    named = tokenizer.init_kwargs.get("model_specific_special_tokens")  # are written and come back
    for name in [name for name, value in (named or {}).items() if str(value) in added]:
        del named[name]
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [
        each for each in described["added_tokens"] if each["content"] not in added
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
