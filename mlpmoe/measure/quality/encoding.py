"""A text as tokens, and the windows in which a model reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import DOCUMENT_SEPARATOR
from ...core.checks import check_characters
from ...core.errors import UserError
from ...core.mlps import context_length

DEFAULT_WINDOW = 1024  # tokens; less if the model's context is shorter
STREAM_WINDOW = 2048  # tokens, of most published figures on WikiText-2 and C4
PROTOCOLS = ("documents", "stream")


@dataclass(frozen=True)
class EncodedText:
    """A text as token documents, ready to be scored."""

    documents: tuple[Tensor, ...]  # each (tokens,) int64; the first token is context only
    sizes: tuple[Tensor, ...]  # UTF-8 bytes that begin with each token; each (tokens,) int64
    # tokens per window, if documents are windows already, each to be scored in one pass
    window: int | None = None

    def beginnings(self, numbers: Iterable[int], tokens: int) -> EncodedText:
        """The first tokens of some of the documents, `tokens` at most of each, as a text."""
        chosen = list(numbers)
        return EncodedText(
            tuple(self.documents[n][:tokens] for n in chosen),
            tuple(self.sizes[n][:tokens] for n in chosen),
        )


@dataclass(frozen=True)
class Window:
    """What is run in one pass to score a part of a text."""

    ids: Tensor  # (tokens,) int64
    first: int  # index of the first scored token, at least 1; all that follow are scored too
    document: int
    start: int  # position of the first token in the document
    size: int  # UTF-8 bytes of the scored tokens
    # number of the text it is a part of, and position in that: of its document, or of the stream
    # that was cut into windows
    text: int
    place: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def encode_protocol(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: str,
    context: int | None = None,
    most_windows: int | None = None,
    window: int | None = None,
) -> EncodedText:
    """Encode a text as its protocol, one of PROTOCOLS, has it: `encode_text` or `encode_stream`,
    which alone uses the other arguments."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol must be {' or '.join(PROTOCOLS)}, not {protocol!r:.60}.")
    if protocol == "stream":
        return encode_stream(tokenizer, text, context, most_windows, window)
    return encode_text(tokenizer, text)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Cut `text` into documents at lines of `<|endoftext|>` and encode each by itself.

    Each document begins as the tokenizer begins a text (with its BOS, if it has one); where it
    adds none, the first token of a document serves as context and is not scored. Raises
    UserError if there is nothing to predict.
    """
    documents, sizes = [], []
    for document in text.split(DOCUMENT_SEPARATOR):
        document = document.strip()
        ids, size = _encode(tokenizer, document) if document else ([], [])
        if len(ids) < 2:
            continue
        documents.append(torch.tensor(ids))
        sizes.append(torch.as_tensor(size))
    if not documents:
        raise UserError("the text is too short to measure: give it at least a sentence.")
    return EncodedText(tuple(documents), tuple(sizes))


def encode_stream(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context: int | None = None,
    most_windows: int | None = None,
    window: int | None = None,
) -> EncodedText:
    """Encode a text in one go and cut it into windows without overlap, as most published figures
    on WikiText-2 and C4 are taken (SparseGPT and CMoE: 2,048 tokens; Wanda: the model's context).

    context: tokens that the model can look at. window: tokens; by default STREAM_WINDOW, or the
    context where that is shorter. The first token of a window is context only; what does not fill
    a window is left out, as is what follows the first `most_windows`. Raises UserError for a
    window out of range, and if the text fills no window.
    """
    if window is None:
        window = min(STREAM_WINDOW, context or STREAM_WINDOW)
    _check_window(window, context)
    ids, sizes = (torch.as_tensor(v, dtype=torch.long) for v in _encode(tokenizer, text))
    fit = len(ids) // window * window
    windows = ids[:fit].view(-1, window)[:most_windows]
    if not len(windows):
        raise UserError(
            f"the text has {len(ids):,} tokens; at least one window of {window:,} is needed."
        )
    return EncodedText(tuple(windows), tuple(sizes[:fit].view(-1, window)[:most_windows]), window)


def choose_window(
    model: PreTrainedModel, window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Window and stride, in tokens, with the defaults of `perplexity` filled in; UserError if they
    do not fit the model or each other."""
    limit = context_length(model)
    if window is None:
        window = min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    _check_window(window, limit)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"stride must lie between 1 and the window of {window}, not {stride}.")
    return window, stride


def windows(
    model: PreTrainedModel, text: EncodedText, window: int | None = None, stride: int | None = None
) -> list[Window]:
    """What is run to score a text, in its order.

    Each window holds at most `window` tokens and starts `stride` after the one before; what it
    shares with that one is context and not scored again. Without overlap (stride = window) the
    first token of each window is context only; with a shorter stride every token but the first of
    a document is scored once, with at least window - stride tokens before it (where the text has
    them). A text that consists of windows (`encode_stream`) is scored window by window, whatever
    is asked for here.
    """
    if text.window:
        window = stride = text.window
    else:
        window, stride = choose_window(model, window, stride)
    found = []
    for number, (document, sizes) in enumerate(zip(text.documents, text.sizes, strict=True)):
        for start, first, end in _spans(len(document), window, stride):
            size = int(sizes[start + first : end].sum())
            at = (0, number * window) if text.window else (number, start)
            found.append(Window(document[start:end], first, number, start, size, *at))
    return found


def scored_tokens(parts: Iterable[Window]) -> int:
    """How many tokens these windows score."""
    return sum(part.scored for part in parts)


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, first scored token (from the start) and end of each window over a document."""
    scored = 1  # tokens of this document that need no (more) scoring
    for start in range(0, length, stride):
        end = min(start + window, length)
        first = max(scored - start, 1)
        if start + first < end:
            yield start, first, end
        scored = end
        if end == length:
            break


def _check_window(window: int, limit: int | None) -> None:
    if limit and not 2 <= window <= limit:
        raise UserError(
            f"window must lie between 2 and the model's context of {limit} tokens, not {window}."
        )
    if window < 2:
        raise UserError(f"window must be at least 2 tokens, not {window}.")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Sequence[int]]:
    """Token ids, and the UTF-8 bytes that begin with each: of a character that is spread over
    several tokens all bytes count at the first. A tokenizer's own marks have none."""
    check_characters(text)
    encoding = tokenizer(text, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoding["input_ids"]
    if not ids:
        return ids, []
    if tokenizer.is_fast:
        # Marks lie at (0, 0), and end where the text before them ends.
        ends = np.fromiter(accumulate((end for _, end in encoding["offset_mapping"]), max), int)
        ends[-1] = len(text)
        characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        size = np.ones(len(characters), int)
        for limit in (0x80, 0x800, 0x10000):
            size += characters >= limit
        bytes_before = np.concatenate([[0], size.cumsum()])[ends]
    else:  # it does not say where its tokens lie: their share
        share = np.arange(1, len(ids) + 1) / len(ids)
        bytes_before = np.rint(share * len(text.encode())).astype(int)
    return ids, np.diff(bytes_before, prepend=0)
