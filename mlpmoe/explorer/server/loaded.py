"""A model in memory with its conversions and all that was measured of them.

Everything here is a function of (model, spec, text): no visitor has a "current" conversion on the
server, and the dense model is never changed, so results are kept and shared freely. No lock is
held over the network, the disk or a tokenizer: see `Recent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import Calibration, check_disjoint, few_tokens
from ...core.conversion import convert_all, mlp_modules, observe, recovery_of
from ...core.mlps import DenseMLP, context_length, read_mlps
from ...core.recovery.report import RecoveryReport
from ...core.spec import ConversionSpec
from ...core.static.branched import BranchedMLP
from ...core.visiting import Observed
from ...measure.cost.parameters import ParameterReport
from ...measure.cost.speed import SpeedReport, decode_rounds, forward
from ...measure.quality.encoding import EncodedText, Window, encode_protocol
from ...measure.quality.estimate import Evaluation, Losses, Plan, sharpen
from ...measure.quality.head import token_losses
from ...measure.quality.perplexity import Perplexity
from ...measure.quality.routing import LayerRouting, routing
from ...measure.runs.sweep import Run, run_of
from ...measure.text.generation import Writing, write_side_by_side
from ...models import (
    Preflight,
    default_calibration,
    default_text,
    host_training_seconds,
    recovery_folder,
)
from ...models.texts import TEXTS
from . import lent
from .asked import Calibrated, Conversion, spec_of
from .background import in_thread
from .recent import Recent
from .room import room_on
from .structure import Structure
from .texts import OWN_PREFIX, SHIPPED, Texts
from .turns import Turns

CONVERSIONS_HELD = 2  # per model; each may hold a copy of the MLPs
SMALL_CONVERSIONS_HELD = 6  # of a model of at most SMALL_BYTES
SMALL_BYTES = 2**27
VIEWS_HELD = 16  # conversions that only cut, and so hold no weights of their own
RESULTS_HELD = 512  # per model
LOSSES_BYTES = 2**28  # per model: of WikiText-2, some two hundred conversions
TEXTS_HELD = 8  # encoded, per model
OBSERVED_BYTES = 2**29  # of MLP inputs, held so that a model need not be calibrated again and again
ANSWERS_HELD = 64
TRAININGS_KNOWN = 16  # how far they came
ROUTINGS_HELD = 4  # choices of every token and layer
ROUTING_TOKENS = 512  # of the model's own evaluation text, that experts are watched on
PROBE_TOKENS = 128  # length of the forward pass that predicts how long a measurement takes
LIVE_TOKENS = 16_384  # that a measurement takes by itself; the whole text on request

_training = Turns()  # of all models: each takes all cores, and memory for its optimiser


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
    _views: Recent = field(default_factory=lambda: Recent(VIEWS_HELD))
    _texts: Recent = field(default_factory=lambda: Recent(TEXTS_HELD))
    _plans: Recent = field(default_factory=lambda: Recent(TEXTS_HELD))
    _losses: Recent = field(
        default_factory=lambda: Recent(RESULTS_HELD, LOSSES_BYTES, attrgetter("nbytes"))
    )
    _shapes: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    _speeds: Recent = field(default_factory=lambda: Recent(RESULTS_HELD))
    turns: Turns = field(default_factory=Turns)  # of all that runs the models
    answers: Recent = field(default_factory=lambda: Recent(ANSWERS_HELD))  # see answer.py
    _routing: Recent = field(default_factory=lambda: Recent(ROUTINGS_HELD))
    _observed: Recent = field(default_factory=lambda: Recent(1))
    _calibrating: Turns = field(default_factory=Turns)
    _trainings: Recent = field(default_factory=lambda: Recent(TRAININGS_KNOWN))
    in_training: Conversion | None = None  # at this moment
    _users: set[object] = field(default_factory=set)  # what is under way, also between its turns

    def __post_init__(self) -> None:
        lent.hold(self.key, self.model, self.tokenizer)
        if self.checked.bytes_on_disk <= SMALL_BYTES:
            self._conversions.size = SMALL_CONVERSIONS_HELD

    @property
    def is_busy(self) -> bool:
        """Whether it is run or converted at this moment."""
        return self.turns.taken or bool(self._users) or self.in_training is not None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Over work that takes many turns: nobody drops the model meanwhile."""
        user = object()
        self._users.add(user)
        try:
            yield
        finally:
            self._users.discard(user)

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
    def structure(self) -> Structure:
        return Structure(self.model, self.mlps, self.converted)

    @cached_property
    def report(self) -> ParameterReport:
        """The parameters of the dense model."""
        return self.structure.dense

    @cached_property
    def tokens_per_second(self) -> float:
        """Speed of a forward pass over PROBE_TOKENS tokens, measured once."""
        forward(self.model, PROBE_TOKENS)
        start = perf_counter()
        forward(self.model, PROBE_TOKENS)
        return PROBE_TOKENS / (perf_counter() - start)

    def check_fits(self, spec: ConversionSpec) -> None:
        """SpecError if the MLPs of this model cannot be cut so, or a layer to spare is missing."""
        spec.check_fits(self.d_ff, len(self.mlps))

    def asked(self, spec: ConversionSpec, calibration: str | None = None) -> Conversion:
        """The spec, with the calibration text of this key if it needs one; None: the default of
        this model."""
        if not spec.needs_calibration:
            return spec
        key = calibration or default_calibration(self.key)
        return Calibrated(spec, self.texts.read_calibration(key), key)

    def is_converted(self, asked: Conversion) -> bool:
        """Whether `converted` answers at once."""
        return not isinstance(asked, Calibrated) or asked in self._conversions

    def is_to_train(self, asked: Conversion) -> bool:
        """Whether it takes a training, of minutes maybe, before `converted` answers."""
        return spec_of(asked).recovers and not self.is_converted(asked)

    def recovery(self, asked: Conversion) -> RecoveryReport | None:
        """What training did, where it was done."""
        made = self._conversions.get(asked) if spec_of(asked).recovers else None
        return made and recovery_of(made)

    def recovery_so_far(self, asked: Conversion) -> RecoveryReport | None:
        """The same; or what was done at the last look, of a training under way or stopped."""
        return self.recovery(asked) or self._trainings.get(asked)

    def done(self, asked: Conversion) -> ConversionSpec:
        """The spec that gives what was made: with fewer steps of training, where this host has a
        limit of time."""
        report, spec = self.recovery(asked), spec_of(asked)
        return report.done(spec) if report else spec

    def is_repeatable(self, asked: Conversion) -> bool:
        """Whether `done` gives it: not where the limit has cut a training short."""
        report = self.recovery(asked)
        return report is None or not report.cut_short

    def converted(self, asked: Conversion) -> PreTrainedModel:
        held = self._views if _only_cuts(asked) else self._conversions
        return held.get_or_make(asked, lambda: self._convert(asked))

    def convert(self, asked: Conversion) -> Iterator[str]:
        """Convert, unless `converted` answers at once, yielding what is being done. Closing the
        iterator gives up after the layer in progress."""
        if self.is_converted(asked):
            return

        def work(report: Callable[..., None]) -> None:
            self._conversions.get_or_make(asked, lambda: self._convert(asked, report))

        with self.in_use():
            yield from in_thread(work)

    def _convert(
        self, asked: Conversion, report: Callable[[str, float], None] | None = None
    ) -> PreTrainedModel:
        spec, calibration = spec_of(asked), None
        if spec.needs_calibration:
            calibration = self.calibration(asked.text, report)
        if _only_cuts(asked):
            return convert_all(self.model, [spec], None, report)[0]
        if spec.recovers:
            with _training.turn():
                # who waited may have waited for the same
                return self._conversions.get(asked) or self._train(asked, calibration, report)
        with self._room(report):  # before a turn: others free memory in theirs
            if calibration is None:  # soon done, and others' previews need not wait
                return convert_all(self.model, [spec], None, report)[0]
            with self.turns.turn(long=True):
                return convert_all(self.model, [spec], calibration, report)[0]

    def _room(self, report: Callable[..., None] | None) -> AbstractContextManager[None]:
        """For a copy of all MLPs, which most conversions are."""

        def waiting() -> None:
            if report:
                report("waiting for memory", None)

        weights = (weight for mlp in self.mlps for weight in mlp.module.parameters())
        needed = sum(weight.numel() * weight.element_size() for weight in weights)
        return room_on(self.checked.device).holding(
            needed, self._conversions.forget_oldest, waiting
        )

    def _train(
        self, asked: Calibrated, calibration: Calibration | Observed,
        report: Callable[[str, float], None] | None,
    ) -> PreTrainedModel:  # fmt: skip
        """Convert and train, from where the same was stopped before."""

        def look(so_far: RecoveryReport) -> None:
            self._trainings.put(asked, so_far)

        self.in_training = asked
        try:
            with self._room(report), self.turns.turn(long=True):
                (made,) = convert_all(
                    self.model, [asked.spec], calibration, report, recovery_folder(),
                    host_training_seconds(), look,
                )  # fmt: skip
        finally:
            self.in_training = None
        done = recovery_of(made)
        if done and done.limited and not done.cut_short:  # it is what its own spec gives, too
            self._conversions.put(replace(asked, spec=done.done(asked.spec)), made)
        self._conversions.put(asked, made)
        self._trainings.pop(asked, None)
        return made

    def calibration(
        self, text: str, report: Callable[[str, float], None] | None = None
    ) -> Calibration | Observed:
        """A calibration text as tokens; with what the MLPs do on it, unless that is too large."""
        calibration = Calibration.from_text(self.tokenizer, text)
        weights = self.mlps[0].weights
        numbers = len(self.mlps) * calibration.samples.numel() * weights.d_model
        if numbers * weights.up.element_size() > OBSERVED_BYTES:
            return calibration
        with self._calibrating.turn():
            return self._observed.get_or_make(text, lambda: self._observe(calibration, report))

    def _observe(
        self, calibration: Calibration, report: Callable[[str, float], None] | None
    ) -> Observed:
        with self.turns.turn(long=True):
            return observe(self.model, calibration, report)

    def few_tokens(self, asked: Calibrated) -> str | None:
        """A sentence, if the calibration text is short for what is fitted on it."""
        tokens = Calibration.from_text(self.tokenizer, asked.text).samples.numel()
        return few_tokens(asked.spec, tokens, self.d_ff, self.mlps[0].weights.d_model)

    @cached_property
    def routing_ids(self) -> Tensor:
        """(tokens,): what experts are watched on."""
        return torch.cat(self.text(default_text(self.key)).documents)[:ROUTING_TOKENS]

    def routing(self, asked: Conversion) -> list[LayerRouting]:
        """Which experts or neurons each token of a text runs, layer by layer."""
        return self._routing.get_or_make(asked, lambda: self._route(asked))

    def _route(self, asked: Conversion) -> list[LayerRouting]:
        converted, ids = self.converted(asked), self.routing_ids
        with self.turns.turn(long=True):
            return routing(converted, ids)

    def known_routing(self, asked: Conversion) -> list[LayerRouting] | None:
        return self._routing.get(asked)

    def has_text(self, key: str) -> bool:
        """Whether `text` answers at once. UserError if no text has this key."""
        self.texts.check(key)
        return key in self._texts or key in SHIPPED or key.startswith(OWN_PREFIX)

    def text(self, key: str) -> EncodedText:
        """A text, encoded. Public ones are cut into windows as most published figures have it, or
        shorter where the model's context is."""
        self.texts.check(key)
        return self._texts.get_or_make(key, lambda: self._encode(key))

    def _encode(self, key: str) -> EncodedText:
        text, entry = self.texts.read(key), TEXTS.get(key)
        protocol, most = (entry.protocol, entry.most_windows) if entry else ("documents", None)
        context = context_length(self.model)
        return encode_protocol(self.tokenizer, text, protocol, context, most)

    def plan(self, key: str) -> Plan:
        """In which windows and which order a text is measured."""
        self.texts.check(key)
        return self._plans.get_or_make(key, lambda: Plan(self.model, self.text(key)))

    def windows(self, key: str) -> list[Window]:
        """What is run to score a text, in its order."""
        return self.plan(key).windows

    def known_evaluation(self, asked: Conversion | None, text: str) -> Evaluation | None:
        """What was measured so far, if anything was; None: of the dense model, with itself."""
        if (asked, text) not in self._losses:
            return None
        return self.plan(text).evaluation(self._known(None, text), self._known(asked, text))

    def known_dense(self, text: str) -> Perplexity | None:
        """Of the dense model, so far."""
        known = self.known_evaluation(None, text)
        return known and known.dense

    def known_whole(
        self, asked: Conversion, text: str
    ) -> tuple[Perplexity | None, Perplexity | None]:
        """Of the dense and of the converted model, where all of the text was measured."""
        found = (self.known_evaluation(each, text) for each in (None, asked))
        dense, converted = (each.converted if each and each.complete else None for each in found)
        return dense, converted

    def run(self, asked: Conversion, text: str) -> Run:
        """What was measured and counted of a conversion; it must have been measured."""
        measured, report = self.known_evaluation(asked, text), self.structure.report(asked)
        return run_of(self.done(asked), measured.dense, measured.converted, self.report, report)

    def evaluate(self, asked: Conversion, text: str, whole: bool = True) -> Iterator[Evaluation]:
        """Measure dense and converted model on the same windows in turn and yield what is known
        after each, up to where `ends_here`.

        Each step is a turn (see `Turns`). Closing the iterator stops after the step in progress.
        """
        own = isinstance(asked, Calibrated) and (text, asked.key)
        if own and any(key.startswith(OWN_PREFIX) for key in own):
            check_disjoint(asked.text, self.texts.read(text))
        plan = self.plan(text)
        converted = None if lent.takes(asked) else self.converted(asked)
        dense = self._losses.get_or_make((None, text), Losses)
        losses = self._losses.get_or_make((asked, text), Losses)
        if converted is None:
            scores = lent.scores(lent.Request.of(self.key, asked), plan, dense, losses)
        else:
            scores = _scored_by(self.model), _scored_by(converted)
        known = plan.evaluation(dense, losses)
        if known and ends_here(known, whole):
            yield known
            return
        with self.in_use():
            for step in sharpen(plan, dense, losses, *scores, self.turns.turn):
                self._losses.get_or_make((None, text), lambda: dense)  # others make room first
                yield step
                if ends_here(step, whole):
                    break

    def write(
        self, asked: Conversion, prompt: str, tokens: int, temperature: float, dense: bool = True
    ) -> Iterator[tuple[Writing, ...]]:
        """What the dense model (unless it is left out) and the converted one write, token by token;
        see `write_side_by_side`."""
        if lent.takes(asked):
            request = lent.Request.of(self.key, asked)
            return lent.write(request, prompt, tokens, temperature, dense)
        models = (self.model, self.converted(asked)) if dense else (self.converted(asked),)
        return write_side_by_side(models, self.tokenizer, prompt, tokens, temperature)

    def _known(self, asked: Conversion | None, text: str) -> Losses:
        return self._losses.get((asked, text)) or Losses()

    def known_speed(self, asked: Conversion) -> SpeedReport | None:
        if asked not in self._shapes and not self.is_converted(asked):
            return None
        return self._speeds.get(self._shape(asked))

    def speed(self, asked: Conversion) -> Iterator[SpeedReport | None]:
        """Writing speed against dense, round by round; the last is kept. Each round is a turn."""
        shape = self._shape(asked)
        rounds = decode_rounds(self.model, self.converted(asked))
        with self.in_use():
            while True:
                with self.turns.turn():
                    report = next(rounds, "done")
                if report == "done":
                    return
                if report is not None:
                    self._speeds.put(shape, report)
                yield report

    def _shape(self, asked: Conversion) -> Any:
        """Conversions of one shape write at one speed: zeros in place cost and save nothing."""

        def shape() -> Any:
            mlps = mlp_modules(self.converted(self.structure.unfaded(asked)))
            if not all(isinstance(mlp, BranchedMLP) for mlp in mlps):
                return asked
            return tuple((sum(mlp.sizes), mlp.down_proj.bias is not None) for mlp in mlps)

        return self._shapes.get_or_make(asked, shape)


def _scored_by(model: PreTrainedModel) -> Callable[[Window], Tensor]:
    return lambda part: token_losses(model, part.ids, part.first)


def _only_cuts(asked: Conversion) -> bool:
    """Whether all weights are those of the dense model, as stored."""
    plain = isinstance(asked, ConversionSpec) and not asked.routed
    return plain and not asked.fades and asked.order == "contiguous"


def ends_here(found: Evaluation, whole: bool) -> bool:
    """Whether a measurement ends with this: at the end of the text, or (`whole` False) where its
    error is below what is shown, or after LIVE_TOKENS tokens."""
    enough = found.settled or (not found.look and found.dense.tokens >= LIVE_TOKENS)
    return found.complete or (enough and not whole)
