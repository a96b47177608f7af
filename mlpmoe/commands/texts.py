"""The texts that commands measure and calibrate on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import MAX_TOKENS, SAMPLE_TOKENS, Calibration, check_disjoint
from ..core.errors import UserError
from ..core.files import read_limited
from ..measure.quality.encoding import EncodedText, choose_window, context_length, encode_protocol
from ..models import (
    CALIBRATIONS,
    TEXTS,
    decode_text,
    default_calibration,
    default_text,
    named_calibration,
    named_text,
    text_digest,
)
from .terminal import progress

MOST_TEXT = 2**28  # bytes of a file; what is usually measured on has some 10 MB at most


@dataclass(frozen=True)
class EvaluationText:
    """What perplexity is measured on."""

    name: str  # of the list, or of the file
    content: str
    window: int | None = None  # tokens, as asked for
    stride: int | None = None
    protocol: str = "documents"  # or "stream": joined and cut, as most published figures are
    most_windows: int | None = None  # of a stream

    @property
    def stream(self) -> bool:
        return self.protocol == "stream"

    @property
    def digest(self) -> str:
        return text_digest(self.content)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[EncodedText, int, int]:
        """The text as tokens, with window and stride."""
        window, stride = self.window, self.window
        if not self.stream:
            window, stride = choose_window(model, self.window, self.stride)
        encoded = encode_protocol(
            tokenizer, self.content, self.protocol, context_length(model), self.most_windows,
            self.window,
        )  # fmt: skip
        return encoded, encoded.window or window, encoded.window or stride


def evaluation_text(arguments: argparse.Namespace) -> EvaluationText:
    """The text of --text: one that has a name, or a file. A name wins: a file that is called like
    one is written with its folder, such as ./c4."""
    chosen = arguments.text or default_text(arguments.model)
    entry = TEXTS.get(chosen)
    protocol = arguments.protocol or (entry.protocol if entry else "documents")
    if protocol == "stream" and arguments.stride not in (None, arguments.window):
        raise UserError(
            "a stream is cut into windows without overlap: leave out --stride, or choose "
            "--protocol documents."
        )
    if entry:
        progress(f"reading {entry.label}")
        name, content = chosen, named_text(chosen)
    else:
        path = Path(chosen)
        if not path.exists() and path.name == chosen and not path.suffix:
            raise UserError(
                f"there is no file {chosen}, and no text of that name: {', '.join(TEXTS)}."
            )
        name, content = path.name, read_text(path)
    return EvaluationText(
        name, content, arguments.window, arguments.stride, protocol,
        entry.most_windows if entry else None,
    )  # fmt: skip


def in_windows(window: int, stride: int) -> str:
    """How a text is scored, in numbers."""
    overlap = "without overlap" if stride == window else f"every {stride:,}"
    return f"windows of {window:,} tokens {overlap}"


@dataclass(frozen=True)
class CalibrationText:
    """What methods may look at."""

    name: str  # of the list, or of the file
    content: str
    nsamples: int | None = None  # as asked for; None: as many as are usual
    seqlen: int = SAMPLE_TOKENS  # tokens per sample

    @property
    def digest(self) -> str:
        """Tells apart what methods saw: the text, and how much of it where that is not usual."""
        if (self.nsamples, self.seqlen) == (None, SAMPLE_TOKENS):
            return text_digest(self.content)
        return text_digest(f"{self.nsamples} x {self.seqlen}\0{self.content}")

    def encode(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Calibration:
        """The text as samples. UserError where they do not fit the model, or the text does not
        hold as many as were asked for."""
        context = context_length(model)
        if context and self.seqlen > context:
            raise UserError(
                f"seqlen is {self.seqlen:,}, but the model's context has {context:,} tokens."
            )
        tokens = MAX_TOKENS if self.nsamples is None else self.nsamples * self.seqlen
        made = Calibration.from_text(tokenizer, self.content, tokens, self.seqlen)
        if self.nsamples is not None and len(made.samples) < self.nsamples:
            raise UserError(
                f"the calibration text {self.name} makes {len(made.samples):,} samples of "
                f"{self.seqlen:,} tokens, not {self.nsamples:,}. Ask for fewer or shorter ones, or "
                "give a longer text."
            )
        return made


def calibration_text_for(arguments: argparse.Namespace, evaluation: str) -> CalibrationText:
    """The text of --calibration: one that has a name, or a file. UserError if it shares a passage
    with the evaluation text."""
    chosen = arguments.calibration or default_calibration(arguments.model)
    named = chosen in CALIBRATIONS
    content = named_calibration(chosen) if named else read_text(Path(chosen))
    check_disjoint(content, evaluation)
    name = chosen if named else Path(chosen).name
    return CalibrationText(name, content, arguments.nsamples, arguments.seqlen)


def run_setting(
    name: str,
    model: PreTrainedModel,
    text: EvaluationText,
    seen: CalibrationText | None,
    window: int,
    stride: int,
) -> dict[str, Any]:
    """What tells the runs of a file apart beside their specs: see `RunsFile`."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": f"{text.name} {text.digest}",
        "calibration": f"{seen.name} {seen.digest}" if seen else None,
        "protocol": text.protocol,
        "window": window,
        "stride": stride,
    }


def read_text(path: Path) -> str:
    """The text of a file, UTF-8 or marked UTF-16. Raises UserError for more than MOST_TEXT bytes,
    OSError and UnicodeError, with messages for a person."""
    content = read_limited(path, MOST_TEXT)
    try:
        return decode_text(content)
    except UserError as error:
        raise UnicodeError(f"{path}: {error}") from error
