"""Kinds of text that branches are trained on, each in two parts that share no document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.calibration import DOCUMENT_SEPARATOR, SAMPLE_TOKENS, Calibration
from ..core.errors import UserError
from ..models import assets_folder, named_calibration, named_text

WHOLE = 2**40  # tokens: more than any text has
TEST_SHARE = 5  # one scene of so many, the last ones


@dataclass(frozen=True)
class Domain:
    """A kind of text: what is trained on, and what is only measured on."""

    label: str
    train: Callable[[], str]
    test: Callable[[], str]  # other documents

    def parts(
        self, tokenizer: PreTrainedTokenizerBase, length: int = SAMPLE_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """(samples, length) int64 each: the text to train on, and the text to measure on.

        The documents of a part follow each other and are cut into samples, each of which begins
        as the tokenizer begins a text; a rest that fills none is left out. Raises UserError for a
        part of less than eight samples.
        """
        return self._samples(tokenizer, self.train, length), self._samples(
            tokenizer, self.test, length
        )

    def _samples(
        self, tokenizer: PreTrainedTokenizerBase, read: Callable[[], str], length: int
    ) -> Tensor:
        try:
            return Calibration.from_text(tokenizer, read(), WHOLE, length).samples
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from None


def _scenes(test: bool) -> Callable[[], str]:
    """The first scenes of the dialogues, or the last ones."""

    def read() -> str:
        text = (assets_folder() / "texts" / "dialogue.txt").read_text(encoding="utf-8")
        scenes = text.split(DOCUMENT_SEPARATOR)
        border = len(scenes) - len(scenes) // TEST_SHARE
        return DOCUMENT_SEPARATOR.join(scenes[border:] if test else scenes[:border])

    return read


DOMAINS: dict[str, Domain] = {
    "stories": Domain(
        "stories", lambda: named_calibration("stories"), lambda: named_text("stories")
    ),
    "prose": Domain("prose", lambda: named_calibration("prose"), lambda: named_text("prose")),
    "dialogue": Domain("dialogue", _scenes(test=False), _scenes(test=True)),
}
