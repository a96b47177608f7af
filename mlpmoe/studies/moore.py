"""Several tasks in one model: experts of rank one that are weighed by task (MoORE) beside LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import SAMPLE_TOKENS
from ..core.conversion import Progress
from ..core.descent import descend
from ..core.errors import UserError
from ..core.recovery.samples import BATCH_TOKENS, reading_order
from ..core.stopping import stoppable
from ..measure.quality.perplexity import Perplexity, compare
from .adapters import PROJECTIONS, Adapted, kinds_of
from .domains import DOMAINS
from .training import Course, held_out, mean_loss, next_token_loss

RATES = (3e-3, 1e-2, 3e-2)
REFLECTIONS, WIDTH = 6, 16
UNSEEN = "stories"  # what the demo model knows already
TRIED_SHARE = 4  # a rate is tried for one of so many steps, and judged on one of so many samples
MOST_TRIED = 32  # samples of a domain
TEST_TOKENS = 8192  # of a domain that are measured


@dataclass(frozen=True)
class _Text:
    """One domain, as the study uses it."""

    name: str
    task: int | None  # its number; None: not trained on
    train: Tensor  # (samples, tokens) int64
    test: Tensor  # (samples, tokens)


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int = 0,
    on_progress: Progress = lambda message, share: None,
    *,
    rates: Sequence[float] = RATES,
    unseen: str = UNSEEN,
    projections: Sequence[str] = PROJECTIONS,
    reflections: int = REFLECTIONS,
    width: int = WIDTH,
    length: int = SAMPLE_TOKENS,
) -> list[dict[str, Any]]:
    """Train adapters of `model` on the text of all domains but one, and measure all of them.

    Three kinds of as many trained numbers (LoRA's rank is rounded up): MoORE, one LoRA for all
    text, and a LoRA for each task, which knows the task as MoORE does. Each is trained on all tasks
    together and, from its beginning again, on one after the other. Both read about as many samples
    of a task, BATCH_TOKENS tokens in a step, in an order that is the same for all kinds. The loss
    is that of the next token. Each kind takes the rate that does best where a quarter of the steps
    is trained, together, on the first three quarters of each text and judged on what follows; the
    text that is measured plays no part. The domain that is not trained on counts as no task.

    The model is unchanged. length: tokens of a sample. on_progress(message, share done) may raise
    to end it. Returns a row for the dense model and for every kind and state of training, as
    `_row` has it; deterministic on a CPU but for seconds. Raises UserError for values out of range.
    """
    texts = _texts(tokenizer, unseen, length)
    tasks = [text for text in texts if text.task is not None]
    few = steps // TRIED_SHARE if len(rates) > 1 else 0
    if steps < TRIED_SHARE or not rates or min(rates) <= 0:
        raise UserError(f"give at least {TRIED_SHARE} steps, and rates above 0.")
    kinds = kinds_of(model, len(tasks), seed, projections, reflections, width)
    course = Course(on_progress, len(kinds) * (len(rates) * few + 2 * steps))
    with stoppable(course.again):
        course.part("measuring the dense model")(0)
        dense = [held_out(model, text.test) for text in texts]
        rows = [_row("dense", "nothing", 0, None, 0.0, texts, dense, dense)]
        for name, make in kinds.items():
            adapted, losses = make(), []
            for tried in rates if few else ():
                said = course.part(f"{name}, trying rate {tried:g}")
                losses.append(_try(adapted, tasks, few, tried, seed, said))
            rate = rates[losses.index(min(losses))] if few else rates[0]
            for sequence in ([tasks], [[text] for text in tasks]):
                adapted.reset()
                seconds, seen = 0.0, []
                for part in sequence:
                    seen.append(" and ".join(text.name for text in part))
                    now, begun = steps // len(sequence), monotonic()
                    on_step = course.part(f"{name}, on {seen[-1]}")
                    train(adapted, [(t.task, t.train) for t in part], now, rate, seed, on_step)
                    seconds += monotonic() - begun
                    found = [held_out(adapted.on(text.task), text.test) for text in texts]
                    order = ", then ".join(seen)
                    count = adapted.parameters
                    rows.append(_row(name, order, count, rate, seconds, texts, dense, found))
    return rows


def train(
    adapted: Adapted,
    texts: Sequence[tuple[int, Tensor]],
    steps: int,
    rate: float,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the adapters on samples (samples, tokens) of some tasks, BATCH_TOKENS tokens in a step
    that the tasks share evenly; the loss of each step, in nats per token."""
    each = [max(1, BATCH_TOKENS // (ids.shape[1] * len(texts))) for _, ids in texts]
    orders = [
        reading_order(len(ids), steps, count, torch.Generator().manual_seed(seed))
        for count, (_, ids) in zip(each, texts, strict=True)
    ]

    device = adapted.trained[0].device

    def loss(step: int) -> Tensor:
        read = zip(orders, texts, strict=True)
        batches = [(task, ids[order[step]]) for order, (task, ids) in read]
        parts = [
            next_token_loss(adapted.on(task)(batch.to(device), use_cache=False).logits, batch)
            for task, batch in batches
        ]
        return torch.stack(parts).mean()

    return descend(adapted.trained, loss, steps, rate, on_step=on_step)


def _texts(tokenizer: PreTrainedTokenizerBase, unseen: str, length: int) -> list[_Text]:
    """The domains in their order, with that which is not trained on at the end."""
    if unseen not in DOMAINS:
        raise UserError(f"no domain is called {unseen!r:.60}: {', '.join(DOMAINS)}.")
    found = []
    names = [*(name for name in DOMAINS if name != unseen), unseen]
    for task, name in enumerate(names):
        ids, test = DOMAINS[name].parts(tokenizer, length)
        test = test[: max(1, TEST_TOKENS // length)]
        found.append(_Text(name, None if name == unseen else task, ids, test))
    return found


def _try(
    adapted: Adapted,
    tasks: Sequence[_Text],
    steps: int,
    rate: float,
    seed: int,
    on_step: Callable[[int], None],
) -> float:
    """How well a rate does, as a loss in nats per token; infinite where training fails."""
    adapted.reset()
    apart = {text.task: max(1, len(text.train) // TRIED_SHARE) for text in tasks}
    first = [(text.task, text.train[: -apart[text.task]]) for text in tasks]
    try:
        train(adapted, first, steps, rate, seed, on_step)
    except UserError:  # the loss was not finite
        return inf
    rests = {text.task: text.train[-apart[text.task] :][:MOST_TRIED] for text in tasks}
    losses = [mean_loss(adapted.on(task), rest) for task, rest in rests.items()]
    found = sum(losses) / len(losses)
    return found if isfinite(found) else inf


def _row(
    adapter: str,
    trained: str,
    parameters: int,
    rate: float | None,
    seconds: float,
    texts: Sequence[_Text],
    dense: Sequence[Perplexity],
    found: Sequence[Perplexity],
) -> dict[str, Any]:
    """adapter, what it was trained on, how many parameters, at which rate (None: dense), for how
    many seconds; perplexity by domain; and, for the text that was not trained on, what is
    `forgotten`: the ratio to dense, with its standard error."""
    row = {
        "adapter": adapter,
        "trained on": trained,
        "parameters": parameters,
        "rate": rate,
        "seconds": round(seconds, 1),
    }
    for text, before, after in zip(texts, dense, found, strict=True):
        row[text.name] = after.value
        if text.task is None:
            change = compare(before, after)
            row |= {"forgotten": change.ratio, "forgotten_stderr": change.stderr}
    return row
