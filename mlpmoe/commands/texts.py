"""The texts that commands measure and calibrate on."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.calibration import check_disjoint
from ..models import assets_folder


def evaluation_text(arguments: argparse.Namespace) -> tuple[Path, str]:
    """Path and content of the text that perplexity is measured on."""
    path = arguments.text or assets_folder() / "texts" / "evaluation.txt"
    return path, read_text(path)


def calibration_text_for(arguments: argparse.Namespace, evaluation: str) -> tuple[Path, str]:
    """Path and content of the calibration text. UserError if it shares a passage with the
    evaluation text."""
    path = arguments.calibration or assets_folder() / "texts" / "calibration.txt"
    text = read_text(path)
    check_disjoint(text, evaluation)
    return path, text


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises OSError and UnicodeError with messages for a person."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnicodeError(f"{path} is not UTF-8 text (byte {error.start:,}).") from error
