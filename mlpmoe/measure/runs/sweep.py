"""Many specs measured on one model and text, and the standard comparison of methods."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...core.calibration import Calibration
from ...core.checks import shown
from ...core.conversion import convert_all, observe
from ...core.errors import SpecError, UserError
from ...core.mlps import read_mlps
from ...core.routed import ROUTED_METHODS
from ...core.spec import ConversionSpec
from ...core.stopping import stoppable
from ...core.visiting import Observed
from ..cost.parameters import ParameterReport, parameter_report
from ..quality.encoding import EncodedText
from ..quality.perplexity import Perplexity, compare, measure
from ..quality.tasks import TaskScore
from .pace import Pace

MAY_BE_INFINITE = ("perplexity", "ratio", "stderr", "bits_per_byte")  # of a broken model
MOST_SCORES = 1000  # of one run; a suite of 57 subjects has some 60
AT_ONCE = 4  # conversions held at a time; they share the passes over the calibration text
MOST_OBSERVED = 2**32  # bytes that what was seen on that text may take; else it is read each time

Report = Callable[[str], None]
# Of a group of specs, those that are to be measured here, asked for right before it is
Take = Callable[[Sequence[ConversionSpec]], Sequence[ConversionSpec]]


@dataclass(frozen=True)
class Run:
    """A spec with what was measured for it; infinite is what a broken model gives."""

    spec: ConversionSpec
    perplexity: float
    ratio: float  # to the dense model on the same tokens
    stderr: float  # of the ratio
    bits_per_byte: float
    nonzero: int
    nonzero_share: float  # of the dense model's non-zero parameters
    mlp_nonzero_share: float  # of the dense MLPs' non-zero parameters
    macs_per_token: int  # in the whole model
    macs_share: float  # of the dense model's multiply-adds
    mlp_macs_share: float  # of the dense MLPs' multiply-adds, routers included
    tasks: tuple[TaskScore, ...] = ()  # one for each task and metric, where tasks were asked for

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no word for infinite numbers: those are None. Without
        tasks there is no entry of that name, as in files of earlier versions."""
        values = asdict(self) | {"spec": self.spec.to_dict()}
        values |= {name: None for name in MAY_BE_INFINITE if not isfinite(values[name])}
        values["tasks"] = [score.to_dict() for score in self.tasks]
        if not self.tasks:
            del values["tasks"]
        return values

    def to_row(self) -> dict[str, Any]:
        """`to_dict` for a table: each figure of each score under a name of its own."""
        values = self.to_dict()
        for score in values.pop("tasks", ()):
            name = f"{score.pop('task')} {score.pop('metric')}"
            values |= {f"{name} {figure}": value for figure, value in score.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """The inverse of `to_dict`. Infinite figures may also be given as such, and entries beside
        those of a run are passed over, such as the setting in a line of a file. Raises UserError
        for what is not a run: fields that are missing, of another type, below 0 or undefined."""
        if not isinstance(values, Mapping) or not isinstance(values.get("spec"), Mapping):
            raise UserError("this is not a run: it has no spec.")
        spec = ConversionSpec.from_dict(values["spec"])
        figures = {
            f.name: _figure(f.name, f.type, values)
            for f in fields(cls)
            if f.name not in ("spec", "tasks")
        }
        return cls(spec, **figures, tasks=_scores(values.get("tasks", ())))


def _figure(name: str, kind: str, values: Mapping[str, Any]) -> int | float:
    """A number of a run; kind: "int" or "float"."""
    if name not in values:
        raise UserError(f"this is not a run: {name} is missing.")
    value = values[name]
    if value is None and name in MAY_BE_INFINITE:
        return inf
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and kind == "int" and value >= 0:
        return value
    if kind == "float" and (whole or isinstance(value, float)) and value >= 0:
        if value <= 1e300 or (value == inf and name in MAY_BE_INFINITE):
            return float(value)
    raise UserError(f"this is not a run: {name} is {shown(value)}.")


def _scores(values: Any) -> tuple[TaskScore, ...]:
    """The scores of a run."""
    if not isinstance(values, list | tuple) or len(values) > MOST_SCORES:
        raise UserError(f"this is not a run: tasks is {shown(values)}.")
    scores = tuple(TaskScore.from_dict(entry) for entry in values)
    if len({(score.task, score.metric) for score in scores}) < len(scores):
        raise UserError("this is not a run: tasks holds one score twice.")
    return scores


class Baseline:
    """A dense model, measured once, that conversions are measured against.

    text: what perplexity is measured on. calibration: what methods may look at. window, stride:
    see `perplexity`. state: a folder from which training that was ended goes on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text: EncodedText,
        calibration: Calibration | Observed | None = None,
        window: int | None = None,
        stride: int | None = None,
        state: Path | None = None,
    ) -> None:
        self.model, self.text, self.calibration = model, text, calibration
        self.window, self.stride, self.state = window, stride, state
        self.dense, self.report = measure(model, text, window, stride), parameter_report(model)

    def outcomes(
        self,
        specs: Sequence[ConversionSpec],
        report: Report = lambda doing: None,
        take: Take = list,
    ) -> Generator[Run | SpecError, None, None]:
        """A run for each spec that is to be measured here, or why there is none, in their order.
        AT_ONCE specs are converted together."""
        for group in _together(specs):
            some = take(group)
            if not some:
                continue
            self._observe(some, report)
            try:
                converted = convert_all(
                    self.model, some, self.calibration, lambda what, share: report(what),
                    self.state,
                )  # fmt: skip
            except SpecError as error:
                if len(some) == 1:
                    yield SpecError(f"{some[0].to_flags()}: {error}")
                else:  # one of them; the others are not to suffer for it
                    for spec in some:
                        yield from self.outcomes([spec], report)
                continue
            for spec in some:
                other = converted.pop(0)  # so that it goes as soon as it is measured
                with stoppable(lambda: report("perplexity")):
                    measured = measure(other, self.text, self.window, self.stride)
                yield run_of(spec, self.dense, measured, self.report, parameter_report(other))

    def _observe(self, specs: Sequence[ConversionSpec], report: Report) -> None:
        """Read the calibration text once for all specs, if what is seen there is not too large."""
        if not isinstance(self.calibration, Calibration):
            return
        inputs = sum(mlp.weights.d_model for mlp in read_mlps(self.model))
        size = self.calibration.samples.numel() * inputs * self.model.dtype.itemsize
        if size <= MOST_OBSERVED and any(s.converts_by_text and not s.progressive for s in specs):
            self.calibration = observe(self.model, self.calibration, lambda what, _: report(what))


def _together(specs: Sequence[ConversionSpec]) -> Iterator[Sequence[ConversionSpec]]:
    """Neighbours that are converted together, AT_ONCE at most. Who is trained is alone, and so is
    measured before another training begins."""
    for trained, group in groupby(specs, lambda spec: spec.recovers):
        some, size = list(group), 1 if trained else AT_ONCE
        yield from (some[start : start + size] for start in range(0, len(some), size))


def sweep(
    model: PreTrainedModel,
    text: EncodedText,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None = None,
    window: int | None = None,
    stride: int | None = None,
    report: Report = lambda message: None,
    state: Path | None = None,
    take: Take = list,
) -> Iterator[Run]:
    """Measure each spec against the dense model; yields runs as they are known.

    text: what perplexity is measured on. calibration: what methods may look at. report: told what
    is being done, how much of it and how long the rest takes, again and again; what it raises ends
    the work within a layer or a window. state: a folder from which training that was ended goes on.
    take: which of the next specs still are to be measured; others may have done so.
    Raises SpecError at once where a spec does not fit the
    model or misses its calibration; where it shows only in converting, after all others are
    measured.
    """
    if not specs:
        return
    check_fit(model, specs, calibration is not None)
    with stoppable(lambda: report("perplexity, dense")):
        baseline = Baseline(model, text, calibration, window, stride, state)
    pace = Pace(len(specs))
    outcomes = baseline.outcomes(
        specs, lambda doing: report(f"{doing}, {pace}"), pace.leaving_out(take)
    )
    yield from runs_first(outcomes, pace)


def runs_first(outcomes: Generator[Run | SpecError, None, None], pace: Pace) -> Iterator[Run]:
    """The runs as they come, each counted; then the first error is raised, if there was one."""
    failed = None
    with closing(outcomes):
        for outcome in outcomes:
            pace.count()
            if isinstance(outcome, Run):
                yield outcome
            else:
                failed = failed or outcome
    if failed:
        raise failed


def check_fit(model: PreTrainedModel, specs: Iterable[ConversionSpec], calibrated: bool) -> None:
    """SpecError for the first spec that does not fit the model's MLPs, or misses calibration."""
    mlps = read_mlps(model)
    d_ff = min(mlp.weights.d_ff for mlp in mlps)
    for spec in specs:
        spec.check_fits(d_ff, len(mlps))
        if spec.needs_calibration and not calibrated:
            raise SpecError(
                f"{spec.to_flags()} needs a calibration text: give one to look at activations on."
            )


def run_of(
    spec: ConversionSpec,
    dense: Perplexity,
    converted: Perplexity,
    dense_report: ParameterReport,
    report: ParameterReport,
) -> Run:
    """What was measured and counted, as one record."""
    changed = compare(dense, converted)
    return Run(
        spec=spec,
        perplexity=converted.value,
        ratio=changed.ratio,
        stderr=inf if isnan(changed.stderr) else changed.stderr,  # unknown, or of a broken model
        bits_per_byte=converted.bits_per_byte,
        nonzero=report.nonzero,
        nonzero_share=report.nonzero / dense_report.nonzero,
        mlp_nonzero_share=report.mlp_nonzero / dense_report.mlp_nonzero,
        macs_per_token=report.macs_per_token,
        macs_share=report.macs_per_token / dense_report.macs_per_token,
        mlp_macs_share=report.mlp_macs_per_token / dense_report.mlp_macs_per_token,
    )


STATIC, ROUTED, BOUND = "static", "routed", "bound"


def comparison(active: float, gated: bool = True) -> dict[str, tuple[str, ConversionSpec]]:
    """Name -> kind and spec of every method and baseline at one budget of MLP compute.

    active: the share of the neurons that run for a token, or of what matrices read. Choosing single
    neurons computes the gate in full; their share is lowered so that the multiply-adds are the
    same, and left out where nothing would be left. Only an MLP with a gate opens neurons by it.
    Routers are not compensated for: see `Run.mlp_macs_share`. Kinds: "static", "routed", and
    "bound" for what cannot be deployed. Static methods keep the nearest number of 16 branches.
    """

    def static(**choices: Any) -> tuple[str, ConversionSpec]:
        keep = max(1, round(16 * active))
        return STATIC, ConversionSpec(branches=16, keep=keep, **choices)

    def routed(method: str, kind: str = ROUTED, **choices: Any) -> tuple[str, ConversionSpec]:
        return kind, ConversionSpec(method=method, active=active, **choices)

    specs = {
        "First K branches, × √(B/K) (MLPMoE)": static(),
        "Most active neurons": static(order="activation", compensation="none"),
        "FLAP: most varying, mean as bias": static(order="fluctuation", compensation="mean"),
        "Least squares, down refitted": static(order="least-squares", compensation="refit"),
        "Least squares, layer by layer": static(
            order="least-squares", compensation="refit", progressive=True
        ),
        "Random split (LLaMA-MoE)": routed("random"),
        "MLPMoE's branches, routed": routed("contiguous"),
        "MoEfication": routed("moefication"),
        "G-MoEfication": routed("moefication", compensation="mean"),
        "CMoE": routed("cmoe"),
        "CMoE, threshold": routed("cmoe", selection="threshold"),
        "ExpertWeaver": routed("expertweaver"),
        "ExpertWeaver, regression router, mean, threshold": routed(
            "expertweaver", router="regression", compensation="mean", selection="threshold"
        ),
        "Co-activation": routed("coactivation", compensation="mean", selection="threshold"),
        "Co-activation, down refitted": routed(
            "coactivation", compensation="refit", selection="threshold"
        ),
        "ExpertWeaver, oracle router": routed("expertweaver", BOUND, router="oracle"),
        "Co-activation, oracle router": routed(
            "coactivation", BOUND, router="oracle", compensation="mean"
        ),
    }
    share = ROUTED_METHODS["neurons"].active_share(active, 3 if gated else 2)
    if share > 0.005:
        for name, choices in {
            "Neurons, top-k (AbsTopK-GLU)": {},
            "Neurons, threshold (CATS)": {"selection": "threshold"},
            "Neurons, by output, threshold, mean": {
                "router": "gate-norm", "selection": "threshold", "compensation": "mean"
            },
            "Neurons, by output, threshold, down refitted": {
                "router": "gate-norm", "selection": "threshold", "compensation": "refit"
            },
        }.items():  # fmt: skip
            specs[name] = (
                ROUTED, ConversionSpec(method="neurons", active=round(share, 6), **choices)
            )  # fmt: skip
    specs["Inputs, top-k (TEAL's rule)"] = routed("inputs", router="inputs")
    specs["Inputs, by columns (WINA)"] = routed("inputs", router="inputs-norm")
    if gated:
        specs["Inputs by open gates, threshold"] = routed("inputs", selection="threshold")
        specs["Inputs by open gates, threshold, down refitted"] = routed(
            "inputs", selection="threshold", compensation="refit"
        )
    return specs
