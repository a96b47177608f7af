"""The texts that commands measure and calibrate on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import check_disjoint
from ..core.errors import UserError
from ..measure.encoding import (
    EncodedText,
    choose_window,
    context_length,
    encode_protocol,
)
from ..models import (
    CALIBRATIONS,
    TEXTS,
    assets_folder,
    decode_text,
    named_calibration,
    named_text,
    text_digest,
)
from .terminal import progress


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
    chosen = arguments.text or "stories"
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


def calibration_text_for(arguments: argparse.Namespace, evaluation: str) -> tuple[Path, str]:
    """Path, or name, and content of the calibration text. UserError if it shares a passage with
    the evaluation text."""
    chosen = arguments.calibration or assets_folder() / "texts" / "calibration.txt"
    text = named_calibration(chosen) if chosen in CALIBRATIONS else read_text(Path(chosen))
    check_disjoint(text, evaluation)
    return Path(chosen), text


def read_text(path: Path) -> str:
    """The text of a file, UTF-8 or marked UTF-16. Raises OSError and UnicodeError with messages
    for a person."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}.") from error
    except UserError as error:
        raise UnicodeError(f"{path}: {error}") from error
