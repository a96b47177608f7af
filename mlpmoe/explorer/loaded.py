"""A model in memory with its conversions and all that was measured of them.

Everything here is a function of (model, spec, text): no visitor has a "current" conversion on the
server, and the dense model is never changed, so results are kept and shared freely.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.branched import branch_sizes
from ..core.calibration import Calibration, check_disjoint
from ..core.conversion import convert_all, observe
from ..core.mlps import DenseMLP, read_mlps
from ..core.schedule import branch_sparsities
from ..core.spec import ConversionSpec
from ..core.visiting import Observed
from ..measure.encoding import (
    EncodedText,
    Window,
    context_length,
    encode_protocol,
    encode_text,
    scored_tokens,
    windows,
)
from ..measure.head import token_losses
from ..measure.magnitudes import branch_sums, branched_mlps
from ..measure.parameters import ParameterReport, parameter_report
from ..measure.perplexity import Perplexity, PerplexityChange, compare, summarise
from ..measure.speed import SpeedReport, decode_speed, forward
from ..measure.sweep import Run, run_of
from ..measure.words import joined
from ..models import Preflight, assets_folder
from ..models.texts import TEXTS
from .background import in_thread
from .recent import Recent
from .texts import OWN_PREFIX, SHIPPED, Texts

CONVERSIONS_HELD = 2  # per model; each may hold a copy of the MLPs
SMALL_CONVERSIONS_HELD = 6  # of a model of at most SMALL_BYTES
SMALL_BYTES = 2**27
RESULTS_HELD = 512  # per model
TEXTS_HELD = 8  # encoded, per model
OBSERVED_BYTES = 2**29  # of MLP inputs, held so that a model need not be calibrated again and again
PROBE_TOKENS = 128  # length of the forward pass that predicts how long a measurement takes


@dataclass(frozen=True)
class Calibrated:
    """A spec together with the text it may look at; stands where a spec does."""

    spec: ConversionSpec
    text: str = field(repr=False)


Conversion = ConversionSpec | Calibrated


def spec_of(asked: Conversion) -> ConversionSpec:
    return asked.spec if isinstance(asked, Calibrated) else asked


@dataclass(frozen=True)
class Evaluation:
    """What was measured for a spec on a text, against the dense model on the same text."""

    dense: Perplexity
    converted: Perplexity
    change: PerplexityChange


@dataclass(frozen=True)
class Zeros:
    """Sparsity that fade was asked for and what it did, over the kept branches."""

    what: str  # is zeroed: "gate and up", "neurons", ...
    requested: float | None  # the mean of s_i over the neurons, or n/m; None if layers differ
    realised: float  # more where several weights equal the threshold


@dataclass(frozen=True)
class Progress:
    """A measurement under way: tokens scored of those to score."""

    done: int
    total: int


@dataclass(eq=False)
class LoadedModel:
    """A dense model in memory with all that was found out about it."""

    key: str
    label: str
    checked: Preflight
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Texts = field(default_factory=Texts)
    _conversions: Recent = field(default_factory=lambda: Recent(CONVERSIONS_HELD))
    _reports: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    _sums: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    _texts: Recent = field(default_factory=lambda: Recent(TEXTS_HELD))
    _perplexities: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    _speeds: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    # what was measured of routed conversions on this server, for the trade-off plot
    points: dict[Calibrated, Any] = field(default_factory=lambda: Recent(RESULTS_HELD))
    _observed: Recent = field(default_factory=lambda: Recent(1))
    _calibrating: threading.Lock = field(default_factory=threading.Lock)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        if self.checked.bytes_on_disk <= SMALL_BYTES:
            self._conversions.size = SMALL_CONVERSIONS_HELD

    @cached_property
    def mlps(self) -> list[DenseMLP]:
        return read_mlps(self.model)

    @property
    def d_ff(self) -> int:
        return min(mlp.weights.d_ff for mlp in self.mlps)

    @cached_property
    def projections(self) -> list[str]:
        return ["gate", "up", "down"] if self.mlps[0].weights.gate is not None else ["up", "down"]

    @cached_property
    def _dense_nonzero(self) -> dict[int, int]:
        return {id(p): int(torch.count_nonzero(p)) for p in self.model.parameters()}

    @cached_property
    def report(self) -> ParameterReport:
        """The parameters of the dense model."""
        return parameter_report(self.model, lambda tensor: self._dense_nonzero.get(id(tensor)))

    @cached_property
    def tokens_per_second(self) -> float:
        """Speed of a forward pass over PROBE_TOKENS tokens, measured once."""
        forward(self.model, PROBE_TOKENS)
        start = perf_counter()
        forward(self.model, PROBE_TOKENS)
        return PROBE_TOKENS / (perf_counter() - start)

    def asked(self, spec: ConversionSpec) -> Conversion:
        """The spec with our calibration text, if it needs one."""
        return Calibrated(spec, calibration_stories()) if spec.needs_calibration else spec

    def is_converted(self, asked: Conversion) -> bool:
        """Whether `converted` answers at once."""
        return not isinstance(asked, Calibrated) or asked in self._conversions

    def converted(self, asked: Conversion) -> PreTrainedModel:
        if isinstance(asked, Calibrated):
            for _ in self.convert(asked):
                pass
        with self._lock:
            return self._conversions.get_or_make(asked, lambda: self._convert(asked))

    def convert(self, asked: Calibrated) -> Iterator[str]:
        """Convert with a calibration text, yielding what is being done. Closing the iterator gives
        up after the layer in progress."""
        if asked in self._conversions:
            return
        made = yield from in_thread(lambda report: self._convert(asked, report))
        with self._lock:
            self._conversions.get_or_make(asked, lambda: made)

    def _convert(
        self, asked: Conversion, report: Callable[[str, float], None] | None = None
    ) -> PreTrainedModel:
        spec, calibration = spec_of(asked), None
        if spec.needs_calibration:
            calibration = self.calibration(asked.text, report)
        return convert_all(self.model, [spec], calibration, report)[0]

    def calibration(
        self, text: str, report: Callable[[str, float], None] | None = None
    ) -> Calibration | Observed:
        """A calibration text as tokens; with what the MLPs do on it, unless that is too large."""
        calibration = Calibration.from_text(self.tokenizer, text)
        weights = self.mlps[0].weights
        numbers = len(self.mlps) * calibration.samples.numel() * weights.d_model
        if numbers * weights.up.element_size() > OBSERVED_BYTES:
            return calibration
        with self._calibrating:
            return self._observed.get_or_make(
                text, lambda: observe(self.model, calibration, report)
            )

    def converted_report(self, asked: Conversion) -> ParameterReport:
        """The parameters after conversion. Nothing is counted that was counted before: tensors of
        the dense model, and branches."""
        with self._lock:
            return self._reports.get_or_make(asked, lambda: self._report(asked))

    def _report(self, asked: Conversion) -> ParameterReport:
        model = self.converted(asked)
        if spec_of(asked).routed:
            return parameter_report(model)
        sums = self.sums(asked, "nonzero")
        known = dict(self._dense_nonzero)
        for layer, mlp in enumerate(branched_mlps(model)):
            for name, linear in mlp.projections.items():
                known[id(linear.weight)] = int(sums[name][layer].sum())
        return parameter_report(model, lambda tensor: known.get(id(tensor)))

    def sums(self, asked: Conversion, quantity: str) -> dict[str, Tensor]:
        """`branch_sums` of the converted model."""
        with self._lock:
            return self._sums.get_or_make(
                (asked, quantity), lambda: branch_sums(self.converted(asked), quantity)
            )

    def whole(self, asked: Conversion) -> Conversion:
        """The same branches with nothing removed."""
        spec = spec_of(asked)
        return self.asked(ConversionSpec(branches=spec.branches, order=spec.order, seed=spec.seed))

    def left(self, asked: Conversion, quantity: str) -> Tensor:
        """The share of each branch's non-zero weights ("nonzero") or squared weights ("energy")
        that the conversion leaves; (layers, B), 0 to 1."""
        left, whole = (
            torch.stack(list(self.sums(s, quantity).values())).sum(0)
            for s in (asked, self.whole(asked))
        )
        return left / whole.clamp(min=1e-30)

    def zeros(self, asked: Conversion) -> Zeros | None:
        """What fade asks for and what it does, over all layers; None without fade."""
        spec = spec_of(asked)
        if not spec.fades:
            return None
        mlps = branched_mlps(self.converted(asked))
        kept = [
            sum(branch_sizes(dense.weights.d_ff, spec.branches)[: len(mlp.sizes)])
            for dense, mlp in zip(self.mlps, mlps, strict=True)
        ]
        requested = _requested(spec, self.d_ff)
        if spec.fade_unit == "neuron":
            return Zeros("neurons", requested, 1 - sum(sum(m.sizes) for m in mlps) / sum(kept))
        names = [name for name in spec.projections if name in self.projections]
        weights = sum(mlp.projections[name].weight.numel() for mlp in mlps for name in names)
        left = sum(float(self.sums(asked, "nonzero")[name].sum()) for name in names)
        return Zeros(joined(names), requested, 1 - left / weights)

    def has_text(self, key: str) -> bool:
        """Whether `text` answers at once. UserError if no text has this key."""
        self.texts.check(key)
        return key in self._texts or key in SHIPPED or key.startswith(OWN_PREFIX)

    def text(self, key: str) -> EncodedText:
        """A text, encoded. Public ones are cut into windows as their published figures have it, or
        shorter where the model's context is."""
        self.texts.check(key)
        with self._lock:
            return self._texts.get_or_make(key, lambda: self._encode(key))

    def windows(self, key: str) -> list[Window]:
        """What is run to score a text."""
        return windows(self.model, self.text(key))

    def _encode(self, key: str) -> EncodedText:
        text, entry = self.texts.read(key), TEXTS.get(key)
        if entry is None:
            return encode_text(self.tokenizer, text)
        context = context_length(self.model)
        return encode_protocol(self.tokenizer, text, entry.protocol, context, entry.most_windows)

    def seconds_to_measure(self, spec: Conversion, text: str) -> float:
        """A prediction, from the speed of one forward pass; 0 for what is known already."""
        missing = [s for s in (None, spec) if (s, text) not in self._perplexities]
        return len(missing) * scored_tokens(self.windows(text)) / self.tokens_per_second

    def known_evaluation(self, spec: Conversion, text: str) -> Evaluation | None:
        """What was measured before, if it was."""
        dense = self._perplexities.get((None, text))
        converted = self._perplexities.get((spec, text))
        if dense is None or converted is None:
            return None
        return Evaluation(dense, converted, compare(dense, converted))

    def run(self, asked: Conversion, text: str) -> Run:
        """What was measured and counted of a conversion; it must have been measured."""
        measured, report = self.known_evaluation(asked, text), self.converted_report(asked)
        return run_of(spec_of(asked), measured.dense, measured.converted, self.report, report)

    def known_dense(self, text: str) -> Perplexity | None:
        return self._perplexities.get((None, text))

    def evaluate(self, spec: Conversion, text: str) -> Iterator[Progress | Evaluation]:
        """Measure dense (once per text) and converted model; yields Progress, then Evaluation.

        Closing the iterator stops the measurement after the window in progress.
        """
        parts = self.windows(text)
        if isinstance(spec, Calibrated) and text.startswith(OWN_PREFIX):
            check_disjoint(spec.text, self.texts.read(text))
        models = {None: lambda: self.model, spec: lambda: self.converted(spec)}
        known = {s: self._perplexities.get((s, text)) for s in models}
        missing = [s for s in models if known[s] is None]
        total, done = len(missing) * scored_tokens(parts), 0
        for key in missing:
            losses: list[Tensor] = []
            for part in parts:
                losses.append(token_losses(models[key](), part.ids, part.first))
                done += part.scored
                yield Progress(done, total)
            known[key] = summarise(torch.cat(losses), parts)
            self._remember(key, text, known[key])
        self._remember(None, text, known[None])  # used last, so that others make room first
        yield Evaluation(known[None], known[spec], compare(known[None], known[spec]))

    def _remember(self, spec: Conversion | None, text: str, measured: Perplexity) -> None:
        with self._lock:
            self._perplexities.get_or_make((spec, text), lambda: measured)

    def known_speed(self, spec: Conversion) -> SpeedReport | None:
        return self._speeds.get(spec)

    def speed(self, spec: Conversion, again: bool = False) -> SpeedReport:
        """Writing speed against dense, measured once per spec, or `again`."""
        if again or spec not in self._speeds:
            measured = decode_speed(self.model, self.converted(spec))
            with self._lock:
                self._speeds.pop(spec, None)
                self._speeds.get_or_make(spec, lambda: measured)
            return measured
        return self._speeds[spec]


@lru_cache(maxsize=1)
def calibration_stories() -> str:
    """Our own calibration text."""
    return (assets_folder() / "texts" / "calibration.txt").read_text(encoding="utf-8")


def _requested(spec: ConversionSpec, d_ff: int) -> float | None:
    """The share that fade is asked to remove, in the mean over the kept neurons; None if layers
    share it out."""
    if spec.allocation != "uniform":
        return None
    if spec.pattern:
        return spec.pattern[0] / spec.pattern[1]
    sizes = branch_sizes(d_ff, spec.branches)[: spec.kept]
    shares = branch_sparsities(spec.branches, spec.fade, spec.fade_schedule, spec.fade_exponent)
    asked = sum(size * share for size, share in zip(sizes, shares, strict=False))
    return asked / sum(sizes)
