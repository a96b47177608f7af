"""The calibration text of a recovery: what is trained on, in which order, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from ..errors import SpecError

BATCH_TOKENS = 512  # of a step, at most unless a sample is longer
HELD_OUT_SHARE = 16  # one of so many rows is never trained on
MOST_HELD_OUT = 4096  # tokens


@dataclass(frozen=True)
class Samples:
    """Calibration text in two parts, and the order of the first."""

    train: Tensor  # (rows, tokens) int64
    held_out: Tensor  # (rows, tokens), spread evenly over the text
    order: Tensor  # (steps, rows of a step): which of `train` each step reads

    @classmethod
    def of(
        cls, calibration: Calibration, steps: int, seed: int, context: int | None = None
    ) -> Samples:
        """A row is as many consecutive samples as a step reads, or as fit into `context` tokens.
        Raises SpecError if the text does not hold one batch beside what is kept apart."""
        rows = joined(calibration.samples, min(BATCH_TOKENS, context or BATCH_TOKENS))
        count, length = rows.shape
        held_out = max(1, min(MOST_HELD_OUT // length, count // HELD_OUT_SHARE))
        batch = max(1, BATCH_TOKENS // length)
        train = count - held_out
        if train < batch:
            raise SpecError(
                f"recover needs {(batch + held_out) * length:,} calibration tokens, a batch and "
                f"some to validate on; the text has {calibration.samples.numel():,}."
            )
        apart = (torch.arange(held_out) * count + count // 2) // held_out
        kept = torch.ones(count, dtype=torch.bool)
        kept[apart] = False
        order = reading_order(train, steps, batch, torch.Generator().manual_seed(seed))
        return cls(rows[kept], rows[apart], order)


def joined(samples: Tensor, most: int) -> Tensor:
    """Rows of consecutive samples, of `most` tokens at most unless a sample is longer; a token that
    every sample begins with, such as a BOS, only at their beginning.

    What a conversion costs grows with the length of the context, so 128 tokens say too little of
    it: SmolLM2 at 75 %, 60 steps, 1.301 times the dense perplexity with rows of 512.
    """
    count, length = samples.shape
    begins = int((samples[:, 0] == samples[0, 0]).all())
    together = max(1, (most - begins) // (length - begins))
    rows = samples[: count // together * together].unflatten(0, (-1, together))
    if not begins:
        return rows.flatten(1)
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:].flatten(1)], dim=1)


def reading_order(count: int, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """(steps, batch) int64: which of `count` samples each step reads. All are read once, in an
    order that is drawn, before any is read again."""
    epochs = -(-steps * batch // count)
    drawn = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    return torch.cat(drawn)[: steps * batch].view(steps, batch)
