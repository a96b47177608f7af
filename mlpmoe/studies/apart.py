"""Branches trained apart, a copy for each kind of text, and put together behind a router.

Branch-Train-Merge (arXiv 2208.03306) trains whole models apart; here it is the last half of the
branches of every MLP, and what is put together is one model whose other half is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import SAMPLE_TOKENS
from ..core.conversion import Progress
from ..core.descent import descend
from ..core.recovery.samples import reading_order
from ..measure.cost.parameters import parameter_report
from .copies import Copies, Rows, average
from .domains import DOMAINS, Domain
from .routing import ByContext, Told, fit_by_layer, share_of_expert
from .training import Course, batch_of, held_out, next_token_loss, trainable

BRANCHES, SHARED = 16, 8
RATE = 2e-3  # between 1e-3, which is better for dialogue, and 3e-3, better for prose
FITTED = 64  # samples of each domain that the routers of the layers are fitted on, at most
MIXTURE = "mixture"


@dataclass(frozen=True)
class Variant:
    """A way to use the copies, and what it took to train those it has."""

    model: PreTrainedModel
    trained_tokens: int = 0
    seconds: float = 0.0
    routed: bool = False


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    on_progress: Progress,
    domains: Mapping[str, Domain] = DOMAINS,
    length: int = SAMPLE_TOKENS,
) -> list[dict[str, Any]]:
    """A row for each way to use copies of the last branches that were trained for `steps` steps
    each, in float32 and from `model`, which is unchanged.

    "seed": the model itself. "NAME only": the copy of one domain. "mixture": one copy, trained on
    the very samples of all others, mixed, for as many steps as they had together. "average": the
    mean of the copies. "experts, HOW": all copies in one model, and how a token finds its own.

    In a row: perplexity by domain, on text that was not trained on, with its standard error;
    `right`: which share of these tokens ran the copy of their domain, in the mean over domains and
    layers; parameters that are stored, and that a token meets; trained_tokens and seconds of
    training of all copies it has. Raises UserError for texts that are too short.
    """
    texts = {name: domain.parts(tokenizer, length) for name, domain in domains.items()}
    train, test = ([part[i] for part in texts.values()] for i in (0, 1))
    copies, told = Copies(trainable(model), BRANCHES, SHARED), Told(len(texts))
    readings = dict(zip((*texts, MIXTURE), _readings(train, steps, seed), strict=True))
    trained, seconds = _train(copies, readings, on_progress)
    rows = []
    for name, variant in _variants(copies, told, trained, seconds, readings, train):
        on_progress(f"measuring: {name}", 1.0)
        rows.append({"model": name} | _row(variant, told, list(texts), test) | {"seed": seed})
    return rows


def train_copy(copies: Copies, reading: Tensor, on_step: Callable[[int], None]) -> Rows:
    """The rows after a step of training on each batch of `reading` (steps, batch, length) int64."""
    rows = copies.start()

    def loss(step: int) -> Tensor:
        return next_token_loss(copies.logits(rows, reading[step]), reading[step])

    descend(rows.values(), loss, len(reading), RATE, on_step=on_step)
    return {name: tensor.detach() for name, tensor in rows.items()}


def _readings(train: Sequence[Tensor], steps: int, seed: int) -> list[Tensor]:
    """(steps, batch, length) int64 of each domain, and at last of their mixture: the same samples,
    so many steps of each together, in an order that is drawn."""
    generator, length = torch.Generator().manual_seed(seed), train[0].shape[1]
    batch = batch_of(length)
    apart = [part[reading_order(len(part), steps, batch, generator)] for part in train]
    every = torch.cat([reading.flatten(0, 1) for reading in apart])
    mixed = every[torch.randperm(len(every), generator=generator)]
    return [*apart, mixed.view(-1, batch, length)]


def _train(
    copies: Copies, readings: Mapping[str, Tensor], on_progress: Progress
) -> tuple[dict[str, Rows], dict[str, float]]:
    """A copy for each reading, and the seconds it took."""
    course = Course(on_progress, sum(map(len, readings.values())))
    trained, seconds = {}, {}
    for name, reading in readings.items():
        began = monotonic()
        trained[name] = train_copy(copies, reading, course.part(f"training on {name}"))
        seconds[name] = monotonic() - began
    return trained, seconds


def _variants(
    copies: Copies,
    told: Told,
    trained: Mapping[str, Rows],
    seconds: Mapping[str, float],
    readings: Mapping[str, Tensor],
    train: Sequence[Tensor],
) -> list[tuple[str, Variant]]:
    """All models that are compared, by their names."""
    names = [name for name in trained if name != MIXTURE]
    apart = [trained[name] for name in names]
    vocabulary = copies.seed.config.get_text_config(decoder=True).vocab_size
    by_context = ByContext(train, vocabulary).to(copies.seed.device)
    with_context = copies.experts(apart, lambda path: by_context)
    by_context.reads(with_context)
    all_told = copies.experts(apart, lambda path: told)
    by_layer = fit_by_layer(all_told, told, [part[:FITTED] for part in train])
    one = {
        name: Variant(copies.dense(rows), readings[name].numel(), seconds[name])
        for name, rows in trained.items()
    }
    cost = readings[MIXTURE].numel(), sum(seconds[name] for name in names)
    return [
        ("seed", Variant(copies.seed)),
        *((f"{name} only", one[name]) for name in names),
        (MIXTURE, one[MIXTURE]),
        ("average", Variant(copies.dense(average(apart)), *cost)),
        (
            "experts, by layer",
            Variant(copies.experts(apart, by_layer.__getitem__), *cost, routed=True),
        ),
        ("experts, by context", Variant(with_context, *cost, routed=True)),
        ("experts, told", Variant(all_told, *cost, routed=True)),
    ]


def _row(
    variant: Variant, told: Told, names: Sequence[str], test: Sequence[Tensor]
) -> dict[str, Any]:
    found, right = {}, []
    for expert, (name, samples) in enumerate(zip(names, test, strict=True)):
        told.expert = expert
        measured = held_out(variant.model, samples)
        found |= {name: measured.value, f"{name}_stderr": measured.stderr}
        if variant.routed:
            right.append(share_of_expert(variant.model, expert, samples))
    counted = parameter_report(variant.model)
    return found | {
        "right": sum(right) / len(right) if right else None,
        "parameters": counted.total,
        "parameters_per_token": counted.active_per_token,
        "trained_tokens": variant.trained_tokens,
        "seconds": round(variant.seconds, 1),
    }
