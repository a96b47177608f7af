"""Specs tried on one model against the clock: how long each takes, and whether to begin it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from time import monotonic

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.activations import LayerActivations
from ...core.calibration import DOCUMENT_SEPARATOR, Calibration
from ...core.conversion import convert_all, convert_mlp, observe
from ...core.mlps import read_mlps
from ...core.sensitivity import TOKENS as SENSITIVITY_TOKENS
from ...core.spec import ConversionSpec
from ...core.static.allocation import cost_curve
from ...core.static.order import ORDERS
from ...core.static.scores import SCORES
from ...core.stopping import stoppable
from ...core.visiting import Observed
from ..cost.parameters import parameter_report
from ..quality.encoding import EncodedText, encode_text, windows
from ..quality.head import token_losses
from ..quality.perplexity import Perplexity, measure, summarise
from .deadline import Deadline
from .sweep import Run, run_of

SCORING_TOKENS = 2048  # that specs are measured on, where the text has them and the model is fast
LEAST_SCORING = 512  # enough to tell recipes apart; what longer documents are cut into
SCORING_SHARE = 1 / 16  # of the time, that measuring one spec may take
SEARCH_TOKENS = 4096  # of the calibration text: enough to tell recipes apart, and fast
LEAST_CALIBRATION = 1024
CALIBRATION_SHARE = 1 / 4  # of the time
MOMENT = 1e-6  # seconds; clocks may be coarse
CORRECTED_PASSES = 4  # both streams, and every layer twice; see visiting.py
GRADIENT_PASSES = 3  # what a forward and a backward pass take of a forward one, about

Report = Callable[..., None]  # of a message, and a share of it that is done


class TooSlow(Exception):
    """A spec would take more time than is left."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.1f} s")
        self.seconds = seconds  # that converting takes, so far as is known


class Trials:
    """A dense model, measured once, that specs are tried on.

    text: what specs are measured on: as many of its documents as the dense model reads within
    `seconds`, and LEAST_SCORING tokens at least. calibration: what methods may look at. `known`:
    what was measured so far. clock: of the deadlines given later.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text: EncodedText,
        calibration: Calibration | Observed | None = None,
        clock: Callable[[], float] = monotonic,
        seconds: float = inf,
    ) -> None:
        self.model, self.calibration, self.clock = model, calibration, clock
        started = clock()
        self.text, self.dense = _measure_some(model, text, Deadline(seconds, clock))
        self.report = parameter_report(model)
        self.seconds = max(clock() - started, MOMENT)  # that measuring takes
        self.tokens, self.mlps = self.dense.tokens, read_mlps(model)
        self.known: dict[ConversionSpec, Run] = {}
        self._took: dict[frozenset[str], float] = {}  # seconds of converting, the last time
        self._slow: dict[frozenset[str], float] = {}  # of what was given up, at least

    @property
    def seconds_per_token(self) -> float:
        """Of a forward pass."""
        return self.seconds / self.tokens

    def run(self, spec: ConversionSpec, deadline: Deadline) -> Run:
        """Convert and measure a spec. Raises TooSlow if that does not fit into the time that is
        left, as far as is known before; of stages that were not tried yet, as soon as the first
        layers show it. Raises TimeUp if it proves wrong."""
        if spec in self.known:
            return self.known[spec]
        parts = _costly(spec)
        seconds = self._expected(parts)
        if seconds + self.seconds >= deadline.left:
            raise TooSlow(seconds)
        started = self.clock()
        projection = _Projection(deadline, deadline.left - self.seconds, len(self.mlps))
        with stoppable(deadline.check):
            try:
                converted = convert_all(self.model, [spec], self.calibration, projection)[0]
            except TooSlow as slow:
                self._slow[parts] = slow.seconds
                raise
            converted_at = self.clock()
            self._took[parts] = converted_at - started
            measured, counted = measure(converted, self.text), parameter_report(converted)
            # the first time, of the dense model, was the longest: a warm machine is faster
            self.seconds = max(self.clock() - converted_at, MOMENT)
        self.known[spec] = run_of(spec, self.dense, measured, self.report, counted)
        return self.known[spec]

    def _expected(self, parts: frozenset[str]) -> float:
        """Seconds of converting, at least: what is slow is not faster with more beside it."""
        slow = (seconds for some, seconds in self._slow.items() if some <= parts)
        return max(self._took.get(parts, 0.0), *slow, 0.0)

    def forecast(
        self, specs: Sequence[ConversionSpec], tokens: int, calibration: int, dense: bool = True
    ) -> list[float]:
        """About how many seconds each spec takes to be measured on a text of so many tokens, after
        those before it: passes over the texts by the speed so far, stages by one layer, on so many
        calibration tokens. dense: whether the first waits for the dense model too. Takes the time
        of one layer for each spec."""
        found, observed, weighed = [], False, False
        for spec in specs:
            seconds = tokens * self.seconds_per_token * (2 if dense and not found else 1)
            if spec.needs_calibration:
                passes = CORRECTED_PASSES if spec.progressive else int(not observed)
                observed |= not spec.progressive
                if spec.looks_at_loss and not weighed:
                    weighed, tokens_weighed = True, min(calibration, SENSITIVITY_TOKENS)
                    seconds += GRADIENT_PASSES * tokens_weighed * self.seconds_per_token
                seconds += passes * calibration * self.seconds_per_token
            found.append(seconds + len(self.mlps) * self._layer_seconds(spec, calibration))
        return found

    @torch.no_grad()
    def _layer_seconds(self, spec: ConversionSpec, tokens: int) -> float:
        """Seconds that one layer takes which nobody has looked at."""
        middle, layer = len(self.mlps) // 2, None
        weights = self.mlps[middle].weights
        if spec.needs_calibration:
            x = self.calibration.layers[middle].x
            x = x.repeat(-(-tokens // x[..., 0].numel()), 1, 1)[: -(-tokens // x.shape[1])]
            sensitivity = torch.eye(weights.d_model, dtype=torch.float64)
            layer = LayerActivations(weights, x, x if spec.progressive else None, sensitivity)
        started = self.clock()
        if spec.shares_out:
            cost_curve(spec, layer)
        convert_mlp(weights, spec, layer)
        return self.clock() - started


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    calibration: Calibration | None,
    deadline: Deadline,
    report: Report = lambda *told: None,
) -> Trials:
    """Trials that a model is fast enough for: of the time, measuring a spec takes SCORING_SHARE
    and looking at the calibration CALIBRATION_SHARE, or what the least that is needed takes.

    text: whose end specs are measured on. calibration: what methods may look at, of which the
    beginning is used; without, or where it would take half of the time, trials have none. Raises
    TimeUp if there is no time to measure the dense model.
    """
    with stoppable(deadline.check):
        report("perplexity, dense")
        share = SCORING_SHARE * deadline.left
        trials = Trials(model, scoring_text(tokenizer, text), None, deadline.clock, share)
        report(f"by {trials.tokens:,} tokens")
        if calibration is None or LEAST_CALIBRATION * trials.seconds_per_token > deadline.left / 2:
            return trials
        wanted = round(CALIBRATION_SHARE * deadline.left / trials.seconds_per_token)
        count = min(max(LEAST_CALIBRATION, wanted), SEARCH_TOKENS) // calibration.samples.shape[1]
        some = Calibration(calibration.samples[: max(1, count)])
        trials.calibration = observe(model, some, report)
    return trials


def scoring_text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """The last documents of a calibration text that hold SCORING_TOKENS tokens together; of one
    that is longer by itself the end, in pieces. Where the text is longer than a calibration reads,
    methods have not seen them."""
    taken: list[str] = []
    for document in reversed(text.split(DOCUMENT_SEPARATOR)):
        if document.strip():
            taken = _end(tokenizer, document.strip()) + taken
            encoded = encode_text(tokenizer, DOCUMENT_SEPARATOR.join(taken))
            if sum(len(document) - 1 for document in encoded.documents) >= SCORING_TOKENS:
                return encoded
    return encode_text(tokenizer, DOCUMENT_SEPARATOR.join(taken))


def _end(tokenizer: PreTrainedTokenizerBase, document: str) -> list[str]:
    ids = tokenizer(document, verbose=False)["input_ids"]
    if len(ids) <= SCORING_TOKENS:
        return [document]
    starts = range(len(ids) - SCORING_TOKENS, len(ids), LEAST_SCORING)
    pieces = (ids[start : start + LEAST_SCORING] for start in starts)
    return [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]


def _measure_some(
    model: PreTrainedModel, text: EncodedText, deadline: Deadline
) -> tuple[EncodedText, Perplexity]:
    """The documents that can be measured within the time, LEAST_SCORING tokens at least, and what
    they amount to."""
    parts, losses = windows(model, text), []
    for part in parts:
        enough = deadline.left <= 0 and sum(map(len, losses)) >= LEAST_SCORING
        if enough and part.document != parts[len(losses) - 1].document:
            break
        losses.append(token_losses(model, part.ids, part.first))
    parts = parts[: len(losses)]
    count = parts[-1].document + 1
    measured = EncodedText(text.documents[:count], text.sizes[:count], text.window)
    return measured, summarise(torch.cat(losses), parts)


class _Projection:
    """Ends a conversion that, by the layers so far, takes longer than `allowed` seconds: for
    `convert_all` to tell what it does."""

    def __init__(self, deadline: Deadline, allowed: float, layers: int) -> None:
        self.clock, self.allowed, self.layers = deadline.clock, allowed, layers
        self.started = self.begun = deadline.clock()
        self.message = ""

    def __call__(self, message: str, share: float) -> None:
        now = self.clock()
        if message != self.message:  # another pass over the layers
            self.message, self.begun = message, now
        layers = share * self.layers + 1  # the one under way, as if it were done
        seconds = self.begun - self.started + (now - self.begun) * self.layers / layers
        if seconds > self.allowed:
            raise TooSlow(seconds)


def _costly(spec: ConversionSpec) -> frozenset[str]:
    """What takes a conversion's time, by name; more of these never take less."""
    if spec.routed:
        parts = {f"method {spec.method}"} if spec.routed.calibrated else set()
        if spec.compensation == "refit":
            parts.add("compensation refit")
        if spec.selection == "threshold":
            parts.add("selection threshold")
        return frozenset(parts | {f"router {spec.router}"})
    parts = {f"order {spec.order}"} if ORDERS[spec.order].calibrated else set()
    if spec.fades and SCORES[spec.fade_score].calibrated:
        matrices = ("neuron",) if spec.fade_unit == "neuron" else spec.projections
        parts |= {f"{spec.fade_score} {matrix}" for matrix in matrices}
    if spec.fits:
        parts.add(f"compensation {spec.compensation}")
    if spec.shares_out:
        parts.add(f"allocation {spec.allocation}")
    return frozenset(parts)
