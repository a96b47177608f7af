"""Where a text breaks: the change of loss token by token, and the sentences that suffer most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan

from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError
from .perplexity import EncodedText, Perplexity

# of a sentence; closing quotes and brackets belong to it
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*$")
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenChange:
    """One predicted token; both figures in nats."""

    text: str  # as it stands in the document; the texts of a document joined are the document
    change: float  # loss of the converted model minus loss of the dense one
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
    dense: Perplexity, converted: Perplexity, text: EncodedText, tokenizer: PreTrainedTokenizerBase
) -> list[TokenChange]:
    """Every predicted token with what the conversion does to its loss, in order.

    Where a character is spread over several tokens, its text stands at the token that completes it.
    The context that opens a document (its first token, if that is a word) is left out. Raises
    UserError if the perplexities are not of this text.
    """
    if not dense.tokens == converted.tokens == text.scored_tokens:
        raise UserError("these perplexities were not measured on this text.")
    changes, done = [], 0
    for number, document in enumerate(text.documents):
        count = len(document) - 1
        losses = (measured.losses[done : done + count] for measured in (dense, converted))
        pieces = _pieces(document.tolist(), tokenizer)
        for position, (piece, before, after) in enumerate(
            zip(pieces, *(some.tolist() for some in losses), strict=True), 1
        ):
            changes.append(TokenChange(piece, after - before, before, number, position))
        done += count
    return changes


def sentences(changes: Sequence[TokenChange]) -> list[Sentence]:
    """The tokens as sentences: cut after . ! ? before white space, at line breaks, and between
    documents."""
    found: list[Sentence] = []
    current: list[TokenChange] = []
    for token in changes:
        if current and (_ended(current, token) or token.document != current[-1].document):
            found.append(Sentence(tuple(current)))
            current = []
        current.append(token)
    return [*found, Sentence(tuple(current))] if current else found


def worst(found: Sequence[Sentence], count: int, least_tokens: int = 3) -> list[Sentence]:
    """The sentences whose loss per token grew most, the worst first; undefined losses of a broken
    model count as worst. Sentences of fewer tokens are passed over."""

    def damage(sentence: Sentence) -> float:
        return float("inf") if isnan(sentence.mean) else sentence.mean

    long = [sentence for sentence in found if len(sentence.tokens) >= least_tokens]
    return sorted(long, key=damage, reverse=True)[:count]


def _ended(current: Sequence[TokenChange], following: TokenChange) -> bool:
    before = "".join(token.text for token in current[-4:])
    if "\n" in current[-1].text:
        return True
    if before != before.rstrip():  # the white space came with the token before
        return bool(_END.search(before.rstrip()))
    begins = following.text[:1].isspace() and following.text.strip()
    return bool(begins and _END.search(before))


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text that each token but the first adds to the document.

    Tokens are decoded together with a few before them: what a token says may depend on those
    (leading spaces, characters of several bytes)."""
    start, shown = 0, len(_decoded(ids[:1], tokenizer))
    for end in range(2, len(ids) + 1):
        text = _decoded(ids[start:end], tokenizer)
        if text.endswith(HALF_A_CHARACTER) and end < len(ids) and end - start < 24:
            yield ""
            continue
        yield text[shown:]
        # go on from this token alone, as long as it does not change what follows
        start, shown = end - 1, len(_decoded(ids[end - 1 : end], tokenizer))


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
