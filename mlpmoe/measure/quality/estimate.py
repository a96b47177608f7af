"""Perplexity as a stream: a first estimate at once, which sharpens window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import floor, log10

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .encoding import EncodedText, Window, scored_tokens, windows
from .perplexity import Perplexity, PerplexityChange, compare, summarise

# The first look: the beginnings of a few windows. A model that sees fewer tokens is worse, and a
# conversion hurts it by another factor, so its losses are never pooled with those of windows.
LOOK_PIECES = 3
LOOK_TOKENS = 128
SETTLED_TOKENS = 4096  # at least, where the text has them


@dataclass(frozen=True)
class Evaluation:
    """What is known of a conversion on a text, against the dense model on the same tokens."""

    dense: Perplexity
    converted: Perplexity
    change: PerplexityChange
    total: int  # tokens that the whole text scores
    look: bool = False  # from pieces of at most LOOK_TOKENS tokens, not from windows
    # what was scored, in the order of the losses
    parts: Sequence[Window] = field(default=(), repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether the whole text was measured."""
        return not self.look and self.dense.tokens == self.total

    @property
    def settled(self) -> bool:
        """Whether the error is below what is shown: 0.1 % up to a doubling, then the third digit;
        and on SETTLED_TOKENS, since the perplexities themselves are shown too."""
        if self.look or self.dense.tokens < min(SETTLED_TOKENS, self.total):
            return False
        ratio = self.change.ratio
        step = 1e-3 if ratio < 2 else 10 ** (floor(log10(min(ratio, 1e9))) - 2)
        return self.complete or self.change.stderr < step / 2


@dataclass
class Losses:
    """The losses of one model on one text, as far as they are known: (scored tokens,) float32
    each, by the number of the window; and those of the first look."""

    look: dict[int, Tensor] = field(default_factory=dict)
    windows: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for known in (self.look, self.windows) for t in list(known.values()))


class Plan:
    """In which order a text is measured, so that any part of it stands for the whole."""

    def __init__(self, model: PreTrainedModel, text: EncodedText) -> None:
        self.text = text
        self.windows = windows(model, text)
        self.order = spread(len(self.windows))
        self.tokens = scored_tokens(self.windows)
        self.look: list[Window] = []
        longest = max(len(part.ids) for part in self.windows)
        if longest > LOOK_TOKENS and self.tokens > 2 * LOOK_PIECES * LOOK_TOKENS:
            at = (len(self.windows) * (2 * n + 1) // (2 * LOOK_PIECES) for n in range(LOOK_PIECES))
            self.look = [self._beginning(number) for number in dict.fromkeys(at)]

    def _beginning(self, number: int) -> Window:
        """The first LOOK_TOKENS tokens of a window."""
        part = self.windows[number]
        ids = part.ids[:LOOK_TOKENS]
        scored = slice(part.start + part.first, part.start + len(ids))
        return replace(part, ids=ids, size=int(self.text.sizes[part.document][scored].sum()))

    def evaluation(self, dense: Losses, converted: Losses) -> Evaluation | None:
        """What both models' losses come to where both are known; None without any."""
        common = sorted(dense.windows.keys() & converted.windows.keys())
        if common:
            parts = [self.windows[n] for n in common]
            found = [torch.cat([some.windows[n] for n in common]) for some in (dense, converted)]
        elif self.look and len(dense.look) == len(converted.look) == len(self.look):
            parts = self.look
            found = [torch.cat([x.look[n] for n in range(len(parts))]) for x in (dense, converted)]
        else:
            return None
        before, after = (summarise(losses, parts) for losses in found)
        change = compare(before, after)
        return Evaluation(before, after, change, self.tokens, look=not common, parts=parts)


Score = Callable[[Window], Tensor]  # losses of the scored tokens of a window
Turn = Callable[[], AbstractContextManager]


def sharpen(
    plan: Plan,
    dense: Losses,
    converted: Losses,
    score_dense: Score,
    score_converted: Score,
    turn: Turn = nullcontext,
) -> Iterator[Evaluation]:
    """Score the windows of the plan with both models in turn, what is not known yet, and yield
    what it comes to after each; the last is complete. Fills in the losses as it goes.

    turn: entered for each window, by those who share the losses with others; what others fill in
    meanwhile is not scored again.
    """
    sides = ((dense, score_dense), (converted, score_converted))
    if plan.evaluation(dense, converted) is None and plan.look:
        for losses, score in sides:
            for number, part in enumerate(plan.look):
                _fill_in(losses.look, number, part, score, turn)
        yield plan.evaluation(dense, converted)
    for number in plan.order:
        missing = any(number not in losses.windows for losses, _ in sides)
        for losses, score in sides:
            _fill_in(losses.windows, number, plan.windows[number], score, turn)
        if missing or number == plan.order[-1]:
            yield plan.evaluation(dense, converted)


def _fill_in(known: dict[int, Tensor], number: int, part: Window, score: Score, turn: Turn) -> None:
    if number in known:
        return
    with turn():
        if number not in known:
            known[number] = score(part)


def spread(count: int) -> list[int]:
    """The numbers below `count` in an order of which every beginning is spread evenly: those of
    the bit-reversal sequence (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    turned = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [number for number in turned if number < count]
