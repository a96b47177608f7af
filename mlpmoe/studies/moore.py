"""Several tasks in one model: experts of rank one that are weighed by task (MoORE) beside LoRA."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import SAMPLE_TOKENS
from ..core.descent import descend
from ..core.errors import UserError
from ..core.recovery.samples import BATCH_TOKENS, drawn_order
from ..core.stopping import stoppable
from ..measure.notation import difference, number
from ..measure.quality.encoding import EncodedText
from ..measure.quality.perplexity import Perplexity, PerplexityChange, compare, measure
from .adapters import PROJECTIONS, Adapted, kinds_of
from .domains import DOMAINS

NAME = "moore"
HELP = "several tasks in one model: MoORE beside LoRA; nothing runs faster"
TITLE = "Perplexity of each text, and its change from the dense model"
RATES = (3e-3, 1e-2, 3e-2)
REFLECTIONS, WIDTH = 6, 16
STEPS = 100
UNSEEN = "stories"  # what the demo model knows already
TRIED_SHARE = 4  # a rate is tried for one of so many steps, and judged on one of so many samples
MOST_TRIED = 32  # samples of a domain
TEST_TOKENS = 8192  # of a domain that are measured

Progress = Callable[[str, float], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `study`, by the same names."""

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split(",")))

    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split("-"))

    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--rates", type=numbers, default=RATES, metavar="RATES",
        help="learning rates to choose from for each adapter, with commas "
        f"(default: {','.join(f'{rate:g}' for rate in RATES)})",
    )  # fmt: skip
    parser.add_argument(
        "--unseen", default=UNSEEN, choices=tuple(DOMAINS), metavar="NAME",
        help="the text that is not trained on, to see what is forgotten: {} (default: {})".format(
            ", ".join(DOMAINS), UNSEEN
        ),
    )  # fmt: skip
    parser.add_argument(
        "--projections", type=names, default=PROJECTIONS, metavar="NAMES",
        help="matrices with an adapter, such as up-down (default: gate-up-down)",
    )  # fmt: skip
    parser.add_argument(
        "--reflections", type=int, default=REFLECTIONS, metavar="K",
        help="of the inputs of each matrix, an even number (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--width", type=int, default=WIDTH, metavar="N",
        help="of the router by token; 0: routed by task alone (default: %(default)s)",
    )  # fmt: skip


@dataclass(frozen=True)
class _Text:
    """One domain, as the study uses it."""

    name: str
    task: int | None  # its number; None: not trained on
    train: Tensor  # (samples, tokens) int64
    test: EncodedText


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Progress | None = None,
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
    report = _Report(on_progress, len(kinds) * (len(rates) * few + 2 * steps))
    with stoppable(report.again):
        report("measuring the dense model")
        dense = [measure(model, text.test) for text in texts]
        rows = [_row("dense", "nothing", 0, None, 0.0, texts, dense, dense)]
        for name, make in kinds.items():
            adapted, losses = make(), []
            for tried in rates if few else ():
                said = report.steps(f"{name}, trying rate {tried:g}", few)
                losses.append(_try(adapted, tasks, few, tried, seed, said))
            rate = rates[losses.index(min(losses))] if few else rates[0]
            for course in ([tasks], [[text] for text in tasks]):
                adapted.reset()
                seconds, seen = 0.0, []
                for part in course:
                    seen.append(" and ".join(text.name for text in part))
                    now, begun = steps // len(course), monotonic()
                    on_step = report.steps(f"{name}, on {seen[-1]}", now)
                    train(adapted, [(t.task, t.train) for t in part], now, rate, seed, on_step)
                    seconds += monotonic() - begun
                    found = [measure(adapted.on(text.task), text.test) for text in texts]
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
        drawn_order(len(ids), steps, count, seed)
        for count, (_, ids) in zip(each, texts, strict=True)
    ]

    def loss(step: int) -> Tensor:
        parts = [
            _loss(adapted.on(task), ids[order[step]])
            for order, (task, ids) in zip(orders, texts, strict=True)
        ]
        return torch.stack(parts).mean()

    return descend(adapted.trained, loss, steps, rate, on_step=on_step)


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[list[str]], str]:
    """The rows of a study for `print_table`, and how its columns are aligned."""
    names = list(rows[0]["texts"])
    lines = [["adapter", "trained on", "numbers", "rate", "seconds", *names]]
    for row in rows:
        dense, cells = row["rate"] is None, []
        if not dense:
            cells = [f"{row['parameters']:,}", f"{row['rate']:g}", f"{row['seconds']:.0f}"]
        lines.append([row["adapter"], row["trained"], *(cells or [""] * 3)])
        for found in row["texts"].values():
            change = PerplexityChange(found["ratio"], found["stderr"], found["measurable"])
            shown = number(found["perplexity"])
            lines[-1].append(shown if dense else f"{shown} ({difference(change)})")
    return lines, "<<>>>" + ">" * len(names)


class _Report:
    """Tells how far a study is, and the same again wherever it may stop."""

    def __init__(self, on_progress: Progress | None, whole: int) -> None:
        self.on_progress, self.whole = on_progress, whole
        self.planned, self.last = 0, ("", 0.0)

    def __call__(self, message: str, done: int = 0) -> None:
        self.last = message, done / self.whole
        self.again()

    def steps(self, message: str, steps: int) -> Callable[[int], None]:
        """To be told of each of the next steps, counted from 0."""
        before, self.planned = self.planned, self.planned + steps
        return lambda step: self(message, before + step)

    def again(self) -> None:
        if self.on_progress:
            self.on_progress(*self.last)


def _texts(tokenizer: PreTrainedTokenizerBase, unseen: str, length: int) -> list[_Text]:
    """The domains in their order, with that which is not trained on at the end."""
    if unseen not in DOMAINS:
        raise UserError(f"no domain is called {unseen!r:.60}: {', '.join(DOMAINS)}.")
    found = []
    names = [*(name for name in DOMAINS if name != unseen), unseen]
    for task, name in enumerate(names):
        ids, test = DOMAINS[name].parts(tokenizer, length)
        documents = tuple(test[: max(1, TEST_TOKENS // length)])
        encoded = EncodedText(documents, tuple(map(torch.zeros_like, documents)), length)
        found.append(_Text(name, None if name == unseen else task, ids, encoded))
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
    losses = []
    with torch.no_grad():
        for text in tasks:
            rest = text.train[-apart[text.task] :][:MOST_TRIED]
            parts = [_loss(adapted.on(text.task), ids[None]) for ids in rest]
            losses.append(float(torch.stack(parts).mean()))
    found = sum(losses) / len(losses)
    return found if isfinite(found) else inf


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean loss of the next token over samples (samples, tokens), in nats."""
    ids = ids.to(model.device)
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


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
    """adapter, trained (on what), parameters that are trained, rate (None: dense), seconds of
    training, and texts: of each domain perplexity, its ratio to dense with stderr, and whether the
    difference is measurable."""
    measured = {}
    for text, before, after in zip(texts, dense, found, strict=True):
        changed = compare(before, after)
        measured[text.name] = {
            "perplexity": after.value,
            "ratio": changed.ratio,
            "stderr": changed.stderr,
            "measurable": changed.measurable,
        }
    return {
        "adapter": adapter,
        "trained": trained,
        "parameters": parameters,
        "rate": rate,
        "seconds": seconds,
        "texts": measured,
    }
