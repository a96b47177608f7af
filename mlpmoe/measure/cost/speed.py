"""Speed of several models as ratios within one run: timings of one run share its noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from time import perf_counter

import torch
from transformers import PreTrainedModel

from ...core.conversion import convert, mlp_modules
from ...core.kernels.arrays import allowed
from ...core.kernels.decoder import decodes
from ...core.spec import ConversionSpec
from ...core.stopping import may_stop
from ..text.decoding import Reader

ROUNDS = 7
PROMPT = 16  # tokens read before any are written
LEAST_ROUNDS = 3  # before a ratio and its quartiles say anything


def time_in_turn(actions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each action in each round, (actions, rounds), as `rounds_in_turn` takes them."""
    return [list(times) for times in zip(*rounds_in_turn(actions, rounds), strict=True)]


def rounds_in_turn(
    actions: Sequence[Callable[[], object]],
    rounds: int,
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[float, ...]]:
    """Seconds of each action, round by round.

    Actions take turns and every second round runs backwards, so a drift of the machine's speed
    hits all alike. One round beforehand warms up and is not counted. Each action runs within
    `turn()`; waiting for that is not timed.
    """
    for round_ in range(-1, rounds):
        seconds = [0.0] * len(actions)
        order = range(len(actions))
        for index in order if round_ % 2 == 0 else reversed(order):
            with turn():
                start = perf_counter()
                actions[index]()
                seconds[index] = perf_counter() - start
        if round_ >= 0:
            yield tuple(seconds)


@dataclass(frozen=True)
class Ratio:
    """How long something takes relative to a baseline: median and quartiles over the rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @property
    def measurable(self) -> bool:
        """Whether 1, no difference, lies outside the quartiles."""
        return not self.low <= 1 <= self.high


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Time relative to a baseline, round by round."""
    low, middle, high = quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)
    return Ratio(middle, low, high)


@torch.inference_mode()
def forward(model: PreTrainedModel, tokens: int) -> None:
    """One forward pass over a sequence of `tokens` tokens."""
    ids = torch.arange(tokens, device=model.device)[None] % model.config.vocab_size
    model(ids, use_cache=False)
    wait(model)


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: int) -> None:
    """A prompt of `tokens` tokens, another one each time: experts get other numbers of them."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    Reader(model, tokens, compiled=False).read(ids)
    wait(model)


@torch.inference_mode()
def run_mlps(model: PreTrainedModel, tokens: int) -> None:
    """The MLPs alone, each on `tokens` random vectors, others each time."""
    for mlp in mlp_modules(model):
        weight = next(mlp.parameters())
        mlp(torch.randn(1, tokens, model.config.hidden_size, device=weight.device).to(weight.dtype))
    wait(model)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokens: int,
    prompt: int = PROMPT,
    compiled: bool = True,
    reader: Reader | None = None,
) -> None:
    """Read `prompt` tokens, then write `tokens` tokens one by one, greedily, with the cache. It may
    stop before each of them. compiled: False for torch alone. reader: one to use again."""
    current = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size
    if reader is None:
        reader = Reader(model, prompt + tokens, compiled)
    else:
        reader.restart()
    for _ in range(tokens):
        may_stop()
        current = reader.read(current).argmax(-1, keepdim=True)
    wait(model)


def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """`decode` to be timed again and again; on a GPU by one reader, which records its graph in the
    first round."""
    if model.device.type == "cpu":
        return partial(decode, model, tokens)
    return partial(decode, model, tokens, reader=Reader(model, PROMPT + tokens))


@dataclass(frozen=True)
class SpeedReport:
    """Writing speed of two models, batch 1, measured in turn, and of the dense one without the
    compiled kernels that both of them have."""

    dense: float  # tokens per second, median
    converted: float  # tokens per second: the dense median times the ratio
    speedup: Ratio  # converted / dense, as speeds: above 1 is faster
    plain: float | None = None  # dense tokens per second in torch alone, if `dense` is not that


def decode_speed(
    dense: PreTrainedModel, converted: PreTrainedModel, tokens: int = 16, rounds: int = ROUNDS
) -> SpeedReport:
    """Measure how fast the two models write, `tokens` tokens in each of `rounds` rounds."""
    *_, report = decode_rounds(dense, converted, tokens, rounds)
    return report


def decode_rounds(
    dense: PreTrainedModel, converted: PreTrainedModel, tokens: int = 16, rounds: int = ROUNDS
) -> Iterator[SpeedReport | None]:
    """`decode_speed` round by round: what is known after each, None before LEAST_ROUNDS. Whoever
    takes the rounds may do something else between them."""
    alike = with_kernels(dense)
    actions = [decoding(alike, tokens), decoding(converted, tokens)]
    if allowed() and dense.device.type == "cpu":
        actions.append(lambda: decode(dense, tokens, compiled=False))
    seconds: list[list[float]] = [[] for _ in actions]
    for spent in rounds_in_turn(actions, rounds):
        for times, new in zip(seconds, spent, strict=True):
            times.append(new)
        if len(seconds[0]) < LEAST_ROUNDS:
            yield None
            continue
        speedup = ratio(*seconds[:2])
        base, *plain = (tokens / median(times) for times in (seconds[0], *seconds[2:]))
        yield SpeedReport(base, base * speedup.median, speedup, *plain)


def with_kernels(dense: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the kernels that a converted one has: itself where it is decoded as a
    whole, else split into a single branch, which changes nothing."""
    if not allowed() or dense.device.type != "cpu" or decodes(dense):
        return dense
    return convert(dense, ConversionSpec(branches=1))


def wait(model: PreTrainedModel) -> None:
    """For what a GPU, of whatever make, still has to do."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
