"""Words tinted by how much likelier or unlikelier they became: one scale, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

from ...measure.quality.tokens import TokenChange
from ..plots.style import DAMAGE

LEAST = 0.1  # nats; less is not coloured
SATURATED = 0.98  # of the tokens that became unlikelier lie below the darkest shade
SHADES = len(DAMAGE)


@dataclass(frozen=True)
class Tint:
    """Shades for the changes of one text, in equal steps up to a quantile of them."""

    deepest: float  # nats, from where a token has the last shade

    @classmethod
    def of(cls, changes: Sequence[TokenChange]) -> Tint:
        worse = sorted(c.change for c in changes if isfinite(c.change) and c.change >= LEAST)
        deepest = worse[min(len(worse) - 1, int(SATURATED * len(worse)))] if worse else 0.0
        return cls(max(1.0, deepest))

    def shade(self, change: float) -> int:
        """Which step of the scale; undefined losses are as far as can be."""
        share = min(1.0, change / self.deepest) if isfinite(change) else 1.0
        return min(SHADES - 1, int(share * SHADES))

    def spans(
        self, tokens: Sequence[TokenChange], more: Callable[[int], str] = lambda _: ""
    ) -> str:
        """The text as HTML. more: further attributes of the token of this number."""
        return "".join(
            self._span(token, more(number)) for number, token in enumerate(tokens) if token.text
        )

    def _span(self, token: TokenChange, more: str) -> str:
        text = escape(token.text)
        if abs(token.change) < LEAST:
            return f"<i{more}>{text}</i>" if more else text
        hint = f"{nats(token.change)}, dense {token.dense:.2f}"
        kind = "better" if token.change < 0 else f"worse d{self.shade(token.change)}"
        return f'<i class="{kind}" title="{hint}"{more}>{text}</i>'

    def legend(self) -> str:
        """The steps, with the change from which each begins."""
        steps = "".join(
            f'<i class="worse d{step}">+{max(LEAST, step * self.deepest / SHADES):.1f}</i>'
            for step in range(SHADES)
        )
        return (
            f'<p class="loss-scale">became unlikelier, in nats from {steps}'
            "<span>likelier: <u>underlined</u></span></p>"
        )


def nats(change: float) -> str:
    if not isfinite(change):
        return "undefined"
    return f"{change:+.2f} nats".replace("-", "−")
