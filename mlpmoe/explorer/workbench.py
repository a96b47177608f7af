"""The models and results a server holds, shared by all its visitors.

Everything here is a function of (model, spec, text): no visitor has a "current" conversion on the
server, and the dense models are never changed, so results are kept and shared freely.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from queue import Queue
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.branched import branch_sizes
from ..core.calibration import Calibration
from ..core.conversion import convert
from ..core.errors import UserError
from ..core.fade import fade_sparsities
from ..core.mlps import DenseMLP, read_mlps
from ..core.spec import ConversionSpec
from ..measure.magnitudes import branch_sums, branched_mlps
from ..measure.parameters import ParameterReport, parameter_report
from ..measure.perplexity import (
    EncodedText,
    Perplexity,
    PerplexityChange,
    compare,
    encode_text,
    summarise,
    window_losses,
)
from ..measure.speed import SpeedReport, decode_speed, forward
from ..models import Preflight, assets_folder, find_entry, load_checked, preflight
from ..models.catalogue import DEMO_KEY

T = TypeVar("T")

TEXTS = {"stories": "evaluation.txt", "proxy": "proxy.txt"}  # key -> file in assets/texts
MAX_GUESTS = 1  # models held beside the demo model; the one used longest ago makes room
CONVERSIONS_HELD = 2  # per model; each may hold a faded copy of gate and up
RESULTS_HELD = 512  # per model
PROBE_TOKENS = 128  # length of the forward pass that predicts how long a measurement takes


@dataclass(frozen=True)
class Calibrated:
    """A spec together with the text it may look at; stands where a spec does."""

    spec: ConversionSpec
    text: str = field(repr=False)


Conversion = ConversionSpec | Calibrated


@dataclass(frozen=True)
class Evaluation:
    """What was measured for a spec on a text, against the dense model on the same text."""

    dense: Perplexity
    converted: Perplexity
    change: PerplexityChange


@dataclass(frozen=True)
class Zeros:
    """Sparsity of gate and up over the kept branches."""

    requested: float  # the mean of s_i over the neurons
    realised: float  # more where several weights equal the threshold


@dataclass(frozen=True)
class Progress:
    """A measurement under way: tokens scored of those to score."""

    done: int
    total: int


class _Recent(OrderedDict):
    """A mapping that forgets what was used longest ago."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_or_make(self, key: object, make: Callable[[], T]) -> T:
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = value = make()
        while len(self) > self.size:
            self.popitem(last=False)
        return value


@dataclass(eq=False)
class LoadedModel:
    """A dense model in memory with all that was found out about it."""

    key: str
    label: str
    checked: Preflight
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    _conversions: _Recent = field(default_factory=lambda: _Recent(CONVERSIONS_HELD))
    _reports: _Recent = field(default_factory=lambda: _Recent(RESULTS_HELD))
    _sums: _Recent = field(default_factory=lambda: _Recent(RESULTS_HELD))
    _texts: dict[str, EncodedText] = field(default_factory=dict)
    _perplexities: _Recent = field(default_factory=lambda: _Recent(RESULTS_HELD))
    _speeds: _Recent = field(default_factory=lambda: _Recent(RESULTS_HELD))
    # what was measured of routed conversions on this server, for the trade-off plot
    points: dict[Calibrated, Any] = field(default_factory=lambda: _Recent(RESULTS_HELD))
    _lock: threading.RLock = field(default_factory=threading.RLock)

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

    def converted(self, spec: Conversion) -> PreTrainedModel:
        if isinstance(spec, Calibrated):
            for _ in self.convert(spec):
                pass
        with self._lock:
            return self._conversions.get_or_make(spec, lambda: convert(self.model, spec))

    def convert(self, asked: Calibrated) -> Iterator[str]:
        """Convert with a calibration text, yielding what is being done. Closing the iterator gives
        up after the layer in progress."""
        if asked in self._conversions:
            return
        calibration = None
        if asked.spec.needs_calibration:
            calibration = Calibration.from_text(self.tokenizer, asked.text)
        made = yield from _in_thread(
            lambda report: convert(self.model, asked.spec, calibration, report)
        )
        with self._lock:
            self._conversions.get_or_make(asked, lambda: made)

    def converted_report(self, spec: ConversionSpec) -> ParameterReport:
        """The parameters after conversion. Nothing is counted that was counted before: tensors of
        the dense model, and branches."""
        with self._lock:
            return self._reports.get_or_make(spec, lambda: self._report(spec))

    def _report(self, spec: ConversionSpec) -> ParameterReport:
        model, sums = self.converted(spec), self.sums(spec, "nonzero")
        known = dict(self._dense_nonzero)
        for layer, mlp in enumerate(branched_mlps(model)):
            for name, linear in mlp.projections.items():
                known[id(linear.weight)] = int(sums[name][layer].sum())
        return parameter_report(model, lambda tensor: known.get(id(tensor)))

    def sums(self, spec: ConversionSpec, quantity: str) -> dict[str, Tensor]:
        """`branch_sums` of the converted model."""
        with self._lock:
            return self._sums.get_or_make(
                (spec, quantity), lambda: branch_sums(self.converted(spec), quantity)
            )

    def left(self, spec: ConversionSpec, quantity: str) -> Tensor:
        """The share of each branch's non-zero weights ("nonzero") or squared weights ("energy")
        that the conversion leaves; (layers, B), 0 to 1."""
        left, whole = (
            torch.stack(list(self.sums(s, quantity).values())).sum(0)
            for s in (spec, ConversionSpec(branches=spec.branches))
        )
        return left / whole.clamp(min=1e-30)

    def zeros(self, spec: ConversionSpec) -> Zeros:
        """What fade asks for and what it does, over all layers."""
        sizes = torch.tensor([branch_sizes(m.weights.d_ff, spec.branches) for m in self.mlps])
        weights = (sizes * self.mlps[0].weights.d_model)[:, : spec.kept].double()  # (layers, K)
        asked = torch.tensor(fade_sparsities(spec.branches, spec.fade)[: spec.kept])
        faded = [s[:, : spec.kept] for p, s in self.sums(spec, "nonzero").items() if p != "down"]
        return Zeros(
            requested=float((weights * asked).sum() / weights.sum()),
            realised=float(1 - sum(faded).sum() / (len(faded) * weights.sum())),
        )

    def text(self, key: str) -> EncodedText:
        """One of the built-in texts, encoded."""
        if not isinstance(key, str) or key not in TEXTS:
            raise UserError(f"no text is called {key!r:.60}; allowed: {', '.join(TEXTS)}.")
        with self._lock:
            if key not in self._texts:
                text = (assets_folder() / "texts" / TEXTS[key]).read_text(encoding="utf-8")
                self._texts[key] = encode_text(self.tokenizer, text)
            return self._texts[key]

    def seconds_to_measure(self, spec: ConversionSpec, text: str) -> float:
        """A prediction, from the speed of one forward pass; 0 for what is known already."""
        missing = [s for s in (None, spec) if (s, text) not in self._perplexities]
        return len(missing) * self.text(text).scored_tokens / self.tokens_per_second

    def known_evaluation(self, spec: Conversion, text: str) -> Evaluation | None:
        """What was measured before, if it was."""
        dense = self._perplexities.get((None, text))
        converted = self._perplexities.get((spec, text))
        if dense is None or converted is None:
            return None
        return Evaluation(dense, converted, compare(dense, converted))

    def known_dense(self, text: str) -> Perplexity | None:
        return self._perplexities.get((None, text))

    def evaluate(self, spec: Conversion, text: str) -> Iterator[Progress | Evaluation]:
        """Measure dense (once per text) and converted model; yields Progress, then Evaluation.

        Closing the iterator stops the measurement after the window in progress.
        """
        encoded = self.text(text)
        models = {None: lambda: self.model, spec: lambda: self.converted(spec)}
        known = {s: self._perplexities.get((s, text)) for s in models}
        missing = [s for s in models if known[s] is None]
        total, done = len(missing) * encoded.scored_tokens, 0
        for key in missing:
            losses: list[Tensor] = []
            for piece in window_losses(models[key](), encoded):
                losses.append(piece)
                done += len(piece)
                yield Progress(done, total)
            known[key] = summarise(torch.cat(losses), encoded.scored_bytes)
            self._remember(key, text, known[key])
        self._remember(None, text, known[None])  # used last, so that others make room first
        yield Evaluation(known[None], known[spec], compare(known[None], known[spec]))

    def _remember(self, spec: Conversion | None, text: str, measured: Perplexity) -> None:
        with self._lock:
            self._perplexities.get_or_make((spec, text), lambda: measured)

    def known_speed(self, spec: ConversionSpec) -> SpeedReport | None:
        return self._speeds.get(spec)

    def speed(self, spec: ConversionSpec, again: bool = False) -> SpeedReport:
        """Writing speed against dense, measured once per spec, or `again`."""
        if again or spec not in self._speeds:
            measured = decode_speed(self.model, self.converted(spec))
            with self._lock:
                self._speeds.pop(spec, None)
                self._speeds.get_or_make(spec, lambda: measured)
            return measured
        return self._speeds[spec]


class Workbench:
    """The loaded models of a server: the demo model for good, and a few guests."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading = threading.Lock()

    def holds(self, name: str) -> bool:
        """Whether a model is in memory."""
        return model_key(name) in self._models

    def loaded(self, name: str) -> LoadedModel:
        """A model that is in memory; UserError if it had to make room for another."""
        key = model_key(name)
        if key == DEMO_KEY and key not in self._models:
            for _ in self.load(DEMO_KEY):
                pass
        if key not in self._models:
            raise UserError(
                f"{name!r:.80} is not loaded on this server (any more). Load it on the page first."
            )
        self._models.move_to_end(key)
        return self._models[key]

    def load(self, name: str) -> Iterator[str | LoadedModel]:
        """Load a model by catalogue key, label, hub id or folder; yields what is being done, then
        the model. Raises UserError if it cannot be loaded; closing the iterator gives up."""
        key = model_key(name)
        yield "checking"
        with self._loading:
            if key not in self._models:
                yield from self._load(key)
        self._models.move_to_end(key)
        yield self._models[key]

    def _load(self, key: str) -> Iterator[str]:
        guests = [k for k in self._models if k != DEMO_KEY]
        leaving = guests[: max(0, len(guests) + 1 - MAX_GUESTS)] if key != DEMO_KEY else []
        freed = sum(self._models[k].checked.memory_needed for k in leaving)
        checked = preflight(key, reclaimable=freed)
        if checked.memory_needed > (checked.memory_available or 0) - freed:
            for old in leaving:  # only together they are too large
                del self._models[old]
        model, tokenizer = yield from _in_thread(
            lambda report: load_checked(checked, on_progress=report)
        )
        entry = find_entry(key)
        loaded = LoadedModel(key, entry.label if entry else checked.name, checked, model, tokenizer)
        yield "reading its MLPs"
        loaded.converted(ConversionSpec(branches=1))  # refuses what cannot be split
        for old in leaving:
            self._models.pop(old, None)
        self._models[key] = loaded


def _in_thread(work: Callable[[Callable[[str, float | None], None]], T]) -> Generator[str, None, T]:
    """Run `work(report)` in a thread, yielding what it reports, and return its result.

    Closing the generator makes the next report raise, which ends the work.
    """
    reports: Queue[str | Future] = Queue()
    closed = threading.Event()

    def report(message: str, fraction: float | None = None) -> None:
        if closed.is_set():
            raise CancelledError
        reports.put(message if fraction is None else f"{message} ({fraction:.0%})")

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work, report)
        future.add_done_callback(reports.put)
        try:
            while not isinstance(message := reports.get(), Future):
                yield message
        finally:
            closed.set()
    return future.result()


def model_key(name: str) -> str:
    """One name per model: the catalogue's key where there is one."""
    if not isinstance(name, str):
        raise UserError("no model was named. Choose one of the list.")
    entry = find_entry(name)
    return entry.key if entry else name.strip()
