"""A GPU that is lent for one call at a time (ZeroGPU Spaces): what is heavy runs there.

Models lie in main memory. A call gets a process of its own, forked from this one, and plain values:
which model, which spec, which tokens. It moves its copy of the model to the GPU, converts it there
and gives plain values back; nothing of it stays here. A process may serve several calls, and may be
older than a model that was loaded since: then it loads that itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import Calibration
from ...core.conversion import convert
from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...measure.quality.encoding import Window
from ...measure.quality.estimate import Losses, Plan, Score
from ...measure.quality.head import token_losses
from ...measure.text.generation import Writing, write_side_by_side
from ...models import load_checked, preflight
from ...models.host import gpu_is_lent
from .asked import Calibrated, Conversion, spec_of

AT_ONCE = 16_384  # tokens of a call
# Seconds that are asked for: to begin with, for the tokens of a text, for a calibration. Less is
# given sooner, and a visitor has a few minutes a day.
BEGINNING, TOKENS_PER_SECOND, CALIBRATION, MOST = 15, 1_000, 40, 110

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A conversion, in plain values."""

    key: str  # of the model
    spec: tuple[tuple[str, Any], ...]
    calibration: str | None  # its text

    @classmethod
    def of(cls, key: str, asked: Conversion) -> Request:
        text = asked.text if isinstance(asked, Calibrated) else None
        return cls(key, tuple(spec_of(asked).to_dict().items()), text)


@dataclass(frozen=True)
class Refusal:
    """What a person is told, from there: exceptions of the other process lose their message."""

    message: str


class _Held:
    """Models of this process, and of those that are forked from it."""

    def __init__(self) -> None:
        self.models: WeakValueDictionary[str, PreTrainedModel] = WeakValueDictionary()
        self.tokenizers: WeakValueDictionary[str, PreTrainedTokenizerBase] = WeakValueDictionary()
        self.owner = os.getpid()
        # of a forked process
        self.there: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self.made: tuple[Request, PreTrainedModel] | None = None

    def on_gpu(self, key: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """In a forked process: its model, on the GPU."""
        torch.set_num_threads(1)  # a pool of threads does not outlive a fork
        if self.there is None or self.there[0] != key:
            self.there = self.made = None
            model, tokenizer = self.models.get(key), self.tokenizers.get(key)
            if model is None or tokenizer is None:
                model, tokenizer = load_checked(preflight(key, by_host=True))
            if torch.cuda.is_available():
                model = model.to("cuda")
            self.there = key, model, tokenizer
        return self.there[1:]

    def converted(self, request: Request) -> PreTrainedModel:
        model, tokenizer = self.on_gpu(request.key)
        if self.made is None or self.made[0] != request:
            self.made = None
            text = request.calibration
            seen = None if text is None else Calibration.from_text(tokenizer, text)
            spec = ConversionSpec.from_dict(dict(request.spec))
            self.made = request, convert(model, spec, seen)
        return self.made[1]


_held = _Held()


def hold(key: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the processes that are forked from now on have this model, as long as it is in use."""
    _held.models[key], _held.tokenizers[key] = model, tokenizer


def takes(asked: Conversion) -> bool:
    """Whether a lent GPU runs this conversion. What was trained is only here."""
    return gpu_is_lent() and not spec_of(asked).recovers


def _lent(duration: Callable[..., int]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`spaces.GPU`; without that package, or elsewhere, the function itself."""
    if gpu_is_lent():
        with suppress(ImportError):
            import spaces

            return spaces.GPU(duration=duration)
    return lambda function: function


def seconds(request: Request, tokens: int) -> int:
    """That a call asks for."""
    looks = CALIBRATION if request.calibration is not None else 0
    return min(MOST, BEGINNING + tokens // TOKENS_PER_SECOND + looks)


Piece = tuple[list[int], int, bool]  # ids, the first that is scored, whether by the dense model too


@_lent(lambda request, pieces: seconds(request, sum(len(ids) for ids, *_ in pieces)))
def losses_there(
    request: Request, pieces: Sequence[Piece]
) -> Iterator[tuple[list[float] | None, list[float]] | Refusal]:
    """Losses of the dense (if asked for) and of the converted model, piece by piece."""
    try:
        converted = _held.converted(request)
        dense, _ = _held.on_gpu(request.key)
        for ids, first, both in pieces:
            found = [
                token_losses(model, torch.tensor(ids), first).tolist() if wanted else None
                for model, wanted in ((dense, both), (converted, True))
            ]
            yield found[0], found[1]
    except UserError as error:
        yield Refusal(str(error))


@_lent(lambda request, prompt, tokens, temperature, both: seconds(request, 100 * tokens))
def written_there(
    request: Request, prompt: str, tokens: int, temperature: float, both: bool
) -> Iterator[tuple[Writing, ...] | Refusal]:
    """`write_side_by_side` of the dense (if asked for) and the converted model."""
    try:
        converted = _held.converted(request)
        dense, tokenizer = _held.on_gpu(request.key)
        models = (dense, converted) if both else (converted,)
        yield from write_side_by_side(models, tokenizer, prompt, tokens, temperature)
    except UserError as error:
        yield Refusal(str(error))


def write(
    request: Request, prompt: str, tokens: int, temperature: float, both: bool
) -> Iterator[tuple[Writing, ...]]:
    """`written_there`, with what is refused there raised here."""
    for found in written_there(request, prompt, tokens, temperature, both):
        yield _accepted(found)


def scores(request: Request, plan: Plan, dense: Losses, converted: Losses) -> tuple[Score, Score]:
    """How `sharpen` scores a window with both models: the windows that follow, up to AT_ONCE
    tokens, are scored in the same call."""
    found: dict[int, tuple[Tensor | None, Tensor]] = {}  # by the identity of the window

    def fetch(part: Window) -> None:
        parts, known = _ahead(plan, part, dense, converted)
        pieces = [
            (part.ids.tolist(), part.first, not has) for part, has in zip(parts, known, strict=True)
        ]
        for one, losses in zip(parts, losses_there(request, pieces), strict=True):
            before, after = _accepted(losses)
            tensors = [None if x is None else torch.tensor(x) for x in (before, after)]
            found[id(one)] = tensors[0], tensors[1]

    def score(part: Window, side: int) -> Tensor:
        if id(part) not in found or found[id(part)][side] is None:
            fetch(part)
        return found[id(part)][side]

    return lambda part: score(part, 0), lambda part: score(part, 1)


def _ahead(
    plan: Plan, part: Window, dense: Losses, converted: Losses
) -> tuple[list[Window], list[bool]]:
    """A window and those that `sharpen` asks for next; whether dense losses are known of each."""
    look = any(part is one for one in plan.look)
    numbers = range(len(plan.look)) if look else plan.order
    windows = plan.look if look else plan.windows
    before, after = (some.look if look else some.windows for some in (dense, converted))
    begin = next(n for n, number in enumerate(numbers) if windows[number] is part)
    parts, known, tokens = [], [], 0
    for number in numbers[begin:]:
        if number in before and number in after and windows[number] is not part:
            continue
        tokens += len(windows[number].ids)
        if parts and tokens > AT_ONCE:
            break
        parts.append(windows[number])
        known.append(number in before)
    return parts, known


def _accepted(found: T | Refusal) -> T:
    if isinstance(found, Refusal):
        raise UserError(found.message)
    return found
