"""How measured numbers are written, on the page and in the terminal."""

from __future__ import annotations

from math import floor, isfinite, log10

from .cost.speed import Ratio
from .quality.perplexity import PerplexityChange
from .quality.tasks import TaskScore

NO_CHANGE = "no measurable change"
NOISY = 1.3  # quartiles of a speed ratio that lie further apart than this say nothing
NBSP = "\N{NO-BREAK SPACE}"  # between a figure and its unit


def number(value: float, digits: int = 3) -> str:
    """A figure with `digits` significant digits: 4.5, 27.1, 1,034, 2.1 × 10⁷."""
    if not isfinite(value):
        return "∞" if value > 0 else "undefined"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")  # rounded first: 0.9996 is 1.00
    exponent = int(exponent)
    if exponent >= 6 or exponent < -3:
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa} × 10{power}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def count(value: float) -> str:
    """A count in short form: 845, 12.3 k, 5.64 M, 1.24 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{value:.3g}") >= size:
            return f"{number(value / size)}{NBSP}{unit}"
    return f"{value:.0f}"


def signed_percent(share: float, digits: int = 1) -> str:
    """A change as a percentage with its sign, and a real minus."""
    text = f"{100 * share:+.{digits}f}"
    sign = "±" if float(text) == 0 else text[0].replace("-", "−")
    return f"{sign}{text[1:]}{NBSP}%"


def change(ratio: float, stderr: float) -> str:
    """A ratio with its error: "+2.5 % ± 0.4 %", or "× 6.02 ± 0.10" above a doubling."""
    if not isfinite(ratio) or ratio >= 1e5:
        return f"× {number(ratio)}"
    if ratio == 1 and stderr == 0:
        return signed_percent(0)  # the same model
    if ratio < 2:
        return f"{signed_percent(ratio - 1)} ±{NBSP}{100 * stderr:.1f}{NBSP}%"
    digits = max(0, 2 - floor(log10(ratio)))
    return f"× {ratio:,.{digits}f} ±{NBSP}{stderr:,.{digits}f}"


def difference(changed: PerplexityChange) -> str:
    """A change of perplexity, if there is one to speak of."""
    return change(changed.ratio, changed.stderr) if changed.measurable else NO_CHANGE


def speedup(ratio: Ratio) -> str:
    """A ratio of speeds with its quartiles, if they say anything."""
    if ratio.high > NOISY * ratio.low:
        return "too noisy to tell"
    if not ratio.measurable:
        return NO_CHANGE
    return f"× {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def scores(score: TaskScore) -> tuple[str, str]:
    """What both models reach: "58.4 ± 1.0 %", or plain figures by a metric that is not a share."""
    return (
        _with_error(score.dense, score.dense_stderr, score.share),
        _with_error(score.converted, score.converted_stderr, score.share),
    )


def score_difference(score: TaskScore) -> str:
    """Converted less dense, in points of percent where they are shares: "−1.3 ± 0.4"."""
    return _with_error(score.difference, score.difference_stderr, score.share, "+")


def _with_error(value: float | None, error: float | None, share: bool, sign: str = "") -> str:
    """A figure and its error with the same digits: tenths of a percent, or two of the error."""
    if value is None:
        return "undefined"
    scale, digits = (100, 1) if share else (1, 3)
    if not share and error:
        digits = min(6, max(0, 1 - floor(log10(error))))
    if not share and max(abs(value), error or 0) >= 1e6:
        return f"{'−' if value < 0 else sign}{number(abs(value))}"
    text = f"{scale * value:{sign},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = f"±{text[1:]}" if sign else text.removeprefix("-")
    text = text.replace("-", "−")
    if error is not None:
        text += f" ±{NBSP}{scale * error:,.{digits}f}"
    return f"{text}{NBSP}%" if share and not sign else text
