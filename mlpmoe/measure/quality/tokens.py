"""Where a text breaks: the change of loss token by token, and the sentences that suffer most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import UserError
from .encoding import EncodedText, Window, scored_tokens
from .head import token_losses
from .perplexity import Perplexity

# of a sentence; closing quotes and brackets belong to it
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*$")
ENDING = 40  # characters of a sentence that are searched for its end
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
LONGEST = 64  # tokens that are waited for, to complete a character


@dataclass(frozen=True)
class TokenChange:
    """One predicted token; both figures in nats."""

    text: str  # as it stands in the document; the texts of a document joined are the document
    change: float  # loss of the converted model minus loss of the dense one; nan if both are inf
    dense: float  # loss of the dense model
    document: int
    position: int  # in the document, the first predicted token is 1


@dataclass(frozen=True)
class Sentence:
    """Neighbouring tokens of one document."""

    tokens: tuple[TokenChange, ...]

    @property
    def total(self) -> float:
        return sum(token.change for token in self.tokens)

    @property
    def mean(self) -> float:
        """Change of the loss per token, in nats."""
        return self.total / len(self.tokens)


def token_changes(
    dense: Perplexity,
    converted: Perplexity,
    text: EncodedText,
    parts: Sequence[Window],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenChange]:
    """Every token after the first of its document with what the conversion does to its loss, in
    order. parts: the windows of `text` that were measured. A token that only serves as context,
    the first of a window, changes by 0.

    Where a character is spread over several tokens, its text stands at the token that completes it;
    the others have none. The context that opens a document (its first token, if that is a word) is
    left out. Infinite and undefined losses are passed on. Raises UserError if the perplexities
    have another number of tokens than this text.
    """
    if not dense.tokens == converted.tokens == scored_tokens(parts):
        raise UserError("these perplexities were not measured on this text.")
    losses = [torch.zeros(2, len(document)) for document in text.documents]
    done = 0
    for part in parts:
        at = slice(part.start + part.first, part.start + len(part.ids))
        for row, measured in enumerate((dense, converted)):
            losses[part.document][row, at] = measured.losses[done : done + part.scored]
        done += part.scored
    changes = []
    for number, document in enumerate(text.documents):
        pieces = _pieces(document.tolist(), tokenizer)
        before_after = losses[number][:, 1:].T.tolist()
        for position, (piece, (before, after)) in enumerate(
            zip(pieces, before_after, strict=True), 1
        ):
            changes.append(TokenChange(piece, after - before, before, number, position))
    return changes


@torch.inference_mode()
def text_changes(
    models: tuple[PreTrainedModel, PreTrainedModel],
    ids: Sequence[int],
    first: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenChange]:
    """The tokens of ids[first:], each predicted from all before it, with what the second model
    makes of their losses against the first. Special tokens have no text. `position` counts from
    the beginning of `ids`."""
    if first >= len(ids):
        return []
    before, after = (token_losses(model, torch.tensor(ids), first).tolist() for model in models)
    pieces = list(_pieces(ids, tokenizer))[first - 1 :]
    return [
        TokenChange(piece, b - a, a, 0, position)
        for position, (piece, a, b) in enumerate(zip(pieces, before, after, strict=True), first)
    ]


def sentences(changes: Sequence[TokenChange]) -> list[Sentence]:
    """The tokens as sentences: cut after . ! ? before white space, at line breaks, and between
    documents. White space that is a token of its own, blank lines too, stays with the sentence
    before it."""
    return [
        Sentence(tuple(tokens))
        for _, document in groupby(changes, key=lambda token: token.document)
        for tokens in _cut(document)
    ]


def worst(found: Sequence[Sentence], count: int, least_tokens: int = 3) -> list[Sentence]:
    """The sentences whose loss per token grew most, the worst first; undefined losses of a broken
    model count as worst. Sentences of fewer tokens are passed over."""

    def damage(sentence: Sentence) -> float:
        return float("inf") if isnan(sentence.mean) else sentence.mean

    long = [sentence for sentence in found if len(sentence.tokens) >= least_tokens]
    return sorted(long, key=damage, reverse=True)[:count]


def _cut(document: Iterable[TokenChange]) -> Iterator[list[TokenChange]]:
    """The tokens of one document as lists, one per sentence."""
    current: list[TokenChange] = []
    waiting: list[TokenChange] = []  # without text: they belong to the token that completes them
    said, gap = "", ""  # the end of the current sentence, and the white space after it
    for token in document:
        waiting.append(token)
        word = token.text.strip()
        if word:
            before, after = token.text.split(word)
            gap += before
            if said and gap and ("\n" in gap or _END.search(said)):
                yield current
                current, said = [], ""
            said = (said + (gap if said else "") + word)[-ENDING:]
            gap = after
        else:
            gap += token.text
        if token.text:
            current, waiting = current + waiting, []
    yield current + waiting


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text that each token but the first adds to the document.

    Tokens are decoded together with those of the piece before: what a token says may depend on
    them (leading spaces, characters of several bytes). Those begin with a whole character, since
    some tokenizers decode bytes in a row either all or not at all."""
    shown = _decoded(ids[:1], tokenizer)
    # Half a character as context counts to the first piece.
    start, done = 0, int(not shown.endswith(HALF_A_CHARACTER))
    shown = shown.rstrip(HALF_A_CHARACTER)
    for end in range(2, len(ids) + 1):
        text = _decoded(ids[start:end], tokenizer)
        half = text.endswith(HALF_A_CHARACTER) and end < len(ids)
        if half and end - done < LONGEST:
            yield ""
            continue
        if not text.startswith(shown):  # the document ends with half a character
            text, shown = _decoded(ids[done:end], tokenizer), ""
        held = int(half)  # the last character may still become another
        yield text[len(shown) : len(text) - held]
        start, done = done, end
        shown = _decoded(ids[start:done], tokenizer)
        shown = shown[: len(shown) - held]


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
