"""Windows for losses that a test makes up."""

from __future__ import annotations

import torch

from mlpmoe.measure.quality.encoding import Window


def parts_of(*tokens: int, size: int = 1) -> list[Window]:
    """A window that scores so many tokens for each number, a block of its own, of `size` bytes."""
    return [
        Window(torch.zeros(n + 1, dtype=torch.long), 1, i, 0, size, i, 0)
        for i, n in enumerate(tokens)
    ]
