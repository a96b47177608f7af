"""Downcycling: a dense model is made sparse, and then trained further.

ExpertWeaver (arXiv 2602.15521) trains on from the experts it finds. The question is what these are
worth beside experts at random, and how far both stay behind the dense model, trained likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import MAX_TOKENS, SAMPLE_TOKENS, Calibration
from ..core.conversion import Progress, convert
from ..core.descent import descend
from ..core.errors import UserError
from ..core.mlps import read_mlps
from ..core.recovery.samples import reading_order
from ..core.recovery.soft import SoftlyRouted
from ..core.routed import RoutedMLP
from ..core.spec import ConversionSpec
from .domains import DOMAINS, Domain
from .training import Course, batch_of, mean_loss, next_token_loss, trainable

# Of 64 experts 2 are shared, and 14 of the others run: the paper's E64-A14-S2.
SPARSE = {"experts": 64, "active": 16 / 64, "shared": 2 / 64, "router": "centroid"}
STARTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "ExpertWeaver": {"method": "expertweaver"} | SPARSE,
    "random": {"method": "random"} | SPARSE,
}
RATES = (3e-4, 1e-3, 3e-3)  # of which each start has its best
TUNED = 4  # which is tried on one step of so many
KEPT_BACK = 16  # and judged by one training sample of so many
LOOKS = 8  # at the held-out text, beside the first
LOOKED_AT = 24  # samples of each domain, at most


@dataclass(frozen=True)
class Texts:
    """What is read, the same from every start."""

    reading: Tensor  # (steps, batch, length) int64, of all domains in an order that is drawn
    calibration: Calibration  # of the same text
    kept_back: Tensor  # (samples, length), of the same documents, to choose the rate by
    held_out: dict[str, Tensor]  # (samples, length), by domain

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        domains: Mapping[str, Domain],
        length: int,
        steps: int,
        seed: int,
    ) -> Texts:
        train, kept_back, test = [], [], {}
        for name, domain in domains.items():
            samples, test[name] = domain.parts(tokenizer, length)
            border = len(samples) - max(1, len(samples) // KEPT_BACK)
            train.append(samples[:border])
            kept_back.append(samples[border:])
        every, generator = torch.cat(train), torch.Generator().manual_seed(seed)
        order = reading_order(len(every), steps, batch_of(length), generator)
        drawn = torch.randperm(len(every), generator=generator)[: MAX_TOKENS // length]
        looked_at = {name: samples[:LOOKED_AT] for name, samples in test.items()}
        return cls(every[order], Calibration(every[drawn]), torch.cat(kept_back), looked_at)


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    on_progress: Progress,
    domains: Mapping[str, Domain] = DOMAINS,
    length: int = SAMPLE_TOKENS,
) -> list[dict[str, Any]]:
    """Points of three curves: held-out loss over tokens trained on, from each of STARTS.

    All weights are trained, in float32, to predict the next token: of the dense model, and of two
    sparse ones made of it, whose routers learn by a straight-through gradient and whose experts
    count 1 when chosen, as everywhere here. All read the same samples in the same order, each at
    its best of RATES, tried on the first steps. `model` is unchanged.

    In a row: start, rate, step, tokens; loss in nats per token, in the mean over the domains and
    of each; seconds of training so far. Raises UserError for a model whose MLPs have no gates, and
    for texts that are too short.
    """
    if any(mlp.weights.gate is None for mlp in read_mlps(model)):
        raise UserError(
            "downcycling groups neurons by their gates, and the MLPs of this model have none."
        )
    texts, dense = Texts.of(tokenizer, domains, length, steps, seed), trainable(model)
    trial = texts.reading[: max(1, steps // TUNED)]
    course = Course(on_progress, len(STARTS) * (len(RATES) * len(trial) + steps))
    rows = []
    for name, fields in STARTS.items():
        start = dense if fields is None else sparse(dense, fields, texts.calibration, seed)
        losses = {rate: _tried(start, trial, rate, texts.kept_back, course) for rate in RATES}
        rate = min(losses, key=losses.__getitem__)
        on_step = course.part(f"training from {name}")
        for point in curve(start, texts.reading, rate, texts.held_out, on_step):
            rows.append({"start": name, "rate": rate} | point | {"seed": seed})
    return rows


def sparse(
    dense: PreTrainedModel, fields: Mapping[str, Any], calibration: Calibration, seed: int
) -> PreTrainedModel:
    """A routed conversion in memory of its own, whose routers can be trained."""
    spec = ConversionSpec(**fields, seed=seed)
    model = copy.deepcopy(convert(dense, spec, calibration))
    for module in model.modules():
        if isinstance(module, RoutedMLP) and module.chooses:
            module.__class__ = SoftlyRouted
    return model


def train(
    start: PreTrainedModel,
    reading: Tensor,
    rate: float,
    on_step: Callable[[int, PreTrainedModel], None],
) -> PreTrainedModel:
    """A copy of `start` after a step on each batch of `reading` (steps, batch, length) int64.
    on_step(done, the copy) is called before the first step and after each."""
    model = copy.deepcopy(start)

    def loss(step: int) -> Tensor:
        ids = reading[step].to(model.device)
        return next_token_loss(model(ids, use_cache=False).logits, ids)

    descend(model.parameters(), loss, len(reading), rate, on_step=lambda n: on_step(n, model))
    return model


def curve(
    start: PreTrainedModel,
    reading: Tensor,
    rate: float,
    texts: Mapping[str, Tensor],
    on_step: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The held-out loss before training, LOOKS times on the way, and after it."""
    steps, points = len(reading), []
    looked_at = {round(steps * look / LOOKS) for look in range(LOOKS + 1)}
    began, looking = monotonic(), 0.0

    def look(step: int, model: PreTrainedModel) -> None:
        nonlocal looking
        on_step(step)
        if step not in looked_at:
            return
        before = monotonic()
        losses = {name: mean_loss(model, samples) for name, samples in texts.items()}
        points.append(
            {"step": step, "tokens": step * reading[0].numel()}
            | {"loss": sum(losses.values()) / len(losses)}
            | losses
            | {"seconds": round(before - began - looking, 1)}
        )
        looking += monotonic() - before

    train(start, reading, rate, look)
    return points


def _tried(
    start: PreTrainedModel, trial: Tensor, rate: float, kept_back: Tensor, course: Course
) -> float:
    """The loss on text that is kept back, after a short training; infinite where it went astray."""
    on_step = course.part(f"trying a rate of {rate:g}")
    try:
        model = train(start, trial, rate, lambda step, model: on_step(step))
    except UserError:
        return float("inf")
    return mean_loss(model, kept_back)
