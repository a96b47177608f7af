"""The calibration text of a recovery: what is trained on, in which order, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from ..errors import SpecError

BATCH_TOKENS = 512  # of a step
HELD_OUT_SHARE = 16  # one of so many samples is never trained on
MOST_HELD_OUT = 32  # samples


def parts(count: int, length: int) -> tuple[int, int]:
    """How many of `count` samples of `length` tokens are never trained on, and how many a step
    reads."""
    held_out = max(1, min(MOST_HELD_OUT, count // HELD_OUT_SHARE))
    return held_out, max(1, BATCH_TOKENS // length)


@dataclass(frozen=True)
class Samples:
    """Calibration samples in two parts, and the order of the first."""

    train: Tensor  # (samples, tokens) int64
    held_out: Tensor  # (samples, tokens), the last ones of the text
    order: Tensor  # (steps, samples of a step): which of `train` each step reads

    @classmethod
    def of(cls, calibration: Calibration, steps: int, seed: int) -> Samples:
        """The order is drawn epoch after epoch, each sample once in each. Raises SpecError if the
        text does not hold one batch beside what is kept apart."""
        count, length = calibration.samples.shape
        held_out, batch = parts(count, length)
        train = count - held_out
        if train < batch:
            raise SpecError(
                f"recover needs {(batch + held_out) * length:,} calibration tokens, a batch and "
                f"some to validate on; the text has {count * length:,}."
            )
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * batch // train)
        drawn = [torch.randperm(train, generator=generator) for _ in range(epochs)]
        order = torch.cat(drawn)[: steps * batch].view(steps, batch)
        return cls(calibration.samples[:train], calibration.samples[train:], order)
