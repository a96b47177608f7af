"""Training on this machine: where it is kept, and how long it may take on a page for visitors."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path

from .names import serves_visitors
from .packaged import cache_folder

MINUTES_VARIABLE = "MLPMOE_TRAINING_MINUTES"
MINUTES_FOR_VISITORS = 10.0


def recovery_folder() -> Path:
    """Where training is kept while it runs: who asks for the same again goes on from there."""
    return cache_folder() / "recovery"


def host_training_seconds() -> float | None:
    """How long one training on the page may take; None: as long as it wants.

    MLPMOE_TRAINING_MINUTES decides, with 0 for no limit. By default there is none for
    whoever started the page, and MINUTES_FOR_VISITORS where it serves others.
    """
    usual = MINUTES_FOR_VISITORS if serves_visitors() else 0.0
    try:
        minutes = float(os.environ.get(MINUTES_VARIABLE, "").strip() or usual)
    except ValueError:
        minutes = usual
    return 60 * minutes if 0 < minutes < inf else None
