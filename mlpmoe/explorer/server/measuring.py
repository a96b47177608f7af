"""Measuring a conversion so that it can be stopped at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .asked import Conversion
from .background import in_thread
from .loaded import LoadedModel


def measuring(loaded: LoadedModel, asked: Conversion, text: str) -> Iterator[str]:
    """Convert and measure, yielding what is being done, at least four times a second; `loaded`
    knows the run then. Closing the iterator ends it between two modules of a model, or two
    steps of a stage."""
    yield from loaded.convert(asked)

    def work(report: Any) -> None:
        for step in loaded.evaluate(asked, text):
            report("perplexity", step.dense.tokens / step.total)
        report("counting parameters")
        loaded.run(asked, text)

    yield from in_thread(work)
