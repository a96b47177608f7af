"""The calibration text: what methods may look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError

SAMPLE_TOKENS = 128  # long windows average the differences between samples away
MAX_TOKENS = 32_768
MIN_SAMPLES = 8
DOCUMENT_SEPARATOR = "<|endoftext|>"  # as published text collections write it
SHARED_LINE = 60  # characters; a line of this length in two texts is no accident


@dataclass(frozen=True)
class Calibration:
    """A text that a method may look at, as samples of equal length."""

    samples: Tensor  # (samples, tokens) int64

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        tokens: int = MAX_TOKENS,
        length: int = SAMPLE_TOKENS,
    ) -> Calibration:
        """The first `tokens` tokens of `text` in samples of `length` tokens.

        Documents are separated by `<|endoftext|>`. Every sample begins as the tokenizer begins a
        text (with its BOS, if it has one). Raises UserError if the text is too short.
        """
        ids: list[int] = []
        for document in text.split(DOCUMENT_SEPARATOR):
            if document.strip():
                ids += tokenizer(document.strip(), verbose=False)["input_ids"]
        start = ids[:1] if ids and ids[0] in tokenizer.all_special_ids else []
        found, ids = len(ids), ids[len(start) :]  # every sample gets its own
        step = length - len(start)
        count = min(len(ids) // step, max(MIN_SAMPLES, tokens // length))
        if count < MIN_SAMPLES:
            raise UserError(
                f"the calibration text has {found:,} tokens; at least {MIN_SAMPLES * length:,} "
                "are needed."
            )
        body = torch.tensor(ids[: count * step]).view(count, step)
        return cls(torch.cat([torch.tensor(start).long().expand(count, len(start)), body], dim=1))


def check_disjoint(calibration: str, evaluation: str) -> None:
    """Raise UserError if the two texts share a line of some length: a method that was allowed to
    look at the evaluation text would be measured too well."""
    if not calibration.strip():
        return
    seen = set(_long_lines(calibration))
    same = calibration.split() == evaluation.split()
    if same or any(line in seen for line in _long_lines(evaluation)):
        raise UserError(
            "the calibration text and the evaluation text share a passage. Calibrate on other "
            "text than is measured."
        )


def _long_lines(text: str) -> Iterator[str]:
    lines = (" ".join(line.split()).lower() for line in text.splitlines())
    return (line for line in lines if len(line) >= SHARED_LINE)
