"""Kinds of text that a study trains on, each in two parts that share no document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.calibration import SAMPLE_TOKENS, Calibration
from ..models import named_calibration, named_text

WHOLE = 2**40  # tokens: more than any text has


@dataclass(frozen=True)
class Domain:
    """A kind of text: what is trained on, and what is only measured on."""

    label: str
    train: Callable[[], str]
    test: Callable[[], str]

    def parts(
        self, tokenizer: PreTrainedTokenizerBase, length: int = SAMPLE_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """(samples, length) int64 each: to train on, and to measure on."""
        train, test = (
            Calibration.from_text(tokenizer, read(), WHOLE, length).samples
            for read in (self.train, self.test)
        )
        return train, test


def _spoken(first: int, last: int) -> Callable[[], str]:
    """Lines of stories that begin with somebody speaking, from so many hundredths to so many."""

    def read() -> str:
        lines = named_calibration("stories").splitlines()
        spoken = [line for line in lines if line.startswith('"')]
        return "\n".join(spoken[len(spoken) * first // 100 : len(spoken) * last // 100])

    return read


DOMAINS: dict[str, Domain] = {
    "stories": Domain(
        "stories", lambda: named_calibration("stories"), lambda: named_text("stories")
    ),
    "prose": Domain("prose", lambda: named_calibration("prose"), lambda: named_text("prose")),
    "dialogue": Domain("dialogue", _spoken(0, 80), _spoken(80, 100)),
}
