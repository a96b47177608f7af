"""Figures that others have published, for the plot of trade-offs: a layer of its own, since they
are of other models, texts and measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from ...models import assets_folder


@dataclass(frozen=True)
class Published:
    """One published result; shares are of the dense model, None where nothing was said."""

    method: str
    model: str
    text: str
    source: str
    dense: float  # perplexity
    perplexity: float
    nonzero_share: float | None = None
    mlp_nonzero_share: float | None = None
    mlp_macs_share: float | None = None

    @property
    def ratio(self) -> float:
        return self.perplexity / self.dense

    @property
    def about(self) -> str:
        return (
            f"{self.method}, {self.model}: perplexity {self.dense:g} to {self.perplexity:g} on "
            f"{self.text} ({self.source}). Not to be ranked with runs of this page."
        )


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    path = assets_folder() / "sweeps" / "published.json"
    return tuple(Published(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
