"""How long a sweep takes: a forecast before it, and the time left from the runs so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic, perf_counter

from transformers import PreTrainedModel

from ...core.calibration import Calibration
from ...core.recovery.course import forward_tokens
from ...core.spec import ConversionSpec
from ..quality.encoding import EncodedText, windows
from ..quality.head import token_losses


class Pace:
    """How many of `total` runs are measured, and about how long the others take if they need the
    mean time of these. As text: "3 of 12 measured, about 40 s left"."""

    def __init__(self, total: int, clock: Callable[[], float] = monotonic) -> None:
        self.total, self.clock = total, clock
        self.done, self.started = 0, clock()

    def count(self) -> None:
        """One more is measured."""
        self.done += 1

    def leaving_out(self, take: Callable[[Sequence], Sequence]) -> Callable[[Sequence], Sequence]:
        """`take`, which says what of a group is to be measured; the rest is not counted."""

        def taken(group: Sequence) -> Sequence:
            mine = take(group)
            self.total -= len(group) - len(mine)
            return mine

        return taken

    def __str__(self) -> str:
        left = ""
        if 0 < self.done < self.total:
            each = (self.clock() - self.started) / self.done
            left = f", {about(each * (self.total - self.done))} left"
        return f"{self.done} of {self.total} measured{left}"


def about(seconds: float) -> str:
    """A rough time in words: about 40 s, about 12 min, about 3.5 h."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def forecast(
    model: PreTrainedModel,
    text: EncodedText,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | None,
    window: int,
    stride: int,
    together: int,
) -> float:
    """Seconds that measuring these specs may take, from one timed forward pass of the dense model.

    Rough: forward passes over both texts are counted, as if every conversion ran like the dense
    model, and training as its passes forwards and backwards. Of what a conversion computes beside,
    such as fits, nothing is known. together: specs that share a pass over the calibration text,
    where they can; who is trained is converted alone.
    """
    if not specs:
        return 0.0
    parts = windows(model, text, window, stride)
    longest = max(parts, key=lambda part: len(part.ids))
    started = perf_counter()
    token_losses(model, longest.ids, longest.first)
    each = (perf_counter() - started) / len(longest.ids)
    passes = 1 + len(specs)  # the dense model's too
    tokens = passes * sum(len(part.ids) for part in parts)
    if calibration is not None:
        calibrated = [spec for spec in specs if spec.converts_by_text]
        alone = sum(spec.progressive or spec.recovers for spec in calibrated)
        passes = alone + -(-(len(calibrated) - alone) // together)
        tokens += passes * calibration.samples.numel()
        trained = (spec.recover_steps for spec in specs if spec.recovers)
        tokens += sum(forward_tokens(steps, *calibration.samples.shape) for steps in trained)
    return each * tokens
