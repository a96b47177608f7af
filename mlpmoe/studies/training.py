"""What studies share: a model that may be trained, its loss, how far one is, and held-out text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..core.conversion import Progress
from ..measure.quality.encoding import EncodedText
from ..measure.quality.perplexity import Perplexity, measure

BATCH_TOKENS = 512  # of a step


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32 and in memory of its own, without dropout."""
    return copy.deepcopy(model).float().eval()


def batch_of(length: int) -> int:
    """Samples of a step, of so many tokens each."""
    return max(1, BATCH_TOKENS // length)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean loss in nats of every token but the first of each sample, a scalar. logits: (samples,
    tokens, vocabulary). ids: (samples, tokens)."""
    ids = ids[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids.flatten())


def held_out(model: PreTrainedModel, samples: Tensor) -> Perplexity:
    """Perplexity on (samples, tokens) int64, each sample scored by itself, its first token not."""
    sizes = torch.zeros_like(samples)  # in bytes, which do not matter here
    return measure(model, EncodedText(tuple(samples), tuple(sizes), samples.shape[1]))


def mean_loss(model: PreTrainedModel, samples: Tensor) -> float:
    """The same as a loss in nats per token."""
    return float(held_out(model, samples).losses.double().mean())


@dataclass
class Course:
    """How far the training of several models one after the other is."""

    on_progress: Progress
    steps: int  # of all of them
    done: int = 0
    message: str = ""

    def part(self, message: str) -> Callable[[int], None]:
        """What the next training calls with the number of its steps that are done."""
        before = self.done

        def tell(step: int) -> None:
            self.message, self.done = message, before + step
            self.again()

        return tell

    def again(self) -> None:
        """Say how far it is once more, wherever it may stop."""
        self.on_progress(self.message, self.done / self.steps)
