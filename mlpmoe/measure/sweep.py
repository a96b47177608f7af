"""Many specs measured on one model and text, and the standard comparison of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..core.calibration import Calibration
from ..core.conversion import convert_all
from ..core.spec import ConversionSpec
from ..core.visiting import Observed
from .parameters import ParameterReport, parameter_report
from .perplexity import EncodedText, Perplexity, compare, measure

AT_ONCE = 4  # conversions held at a time; they share the passes over the calibration text


@dataclass(frozen=True)
class Run:
    """A spec with what was measured for it."""

    spec: ConversionSpec
    perplexity: float
    ratio: float  # to the dense model on the same tokens
    stderr: float  # of the ratio
    bits_per_byte: float
    nonzero: int
    mlp_nonzero_share: float  # of the dense MLPs' non-zero parameters
    macs_per_token: int  # in the whole model
    mlp_macs_share: float  # of the dense MLPs' multiply-adds, routers included

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"spec": self.spec.to_dict()}


def sweep(
    model: PreTrainedModel,
    text: EncodedText,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | Observed | None = None,
    window: int | None = None,
    stride: int | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Run]:
    """Measure each spec against the dense model; yields runs as they are known.

    text: what perplexity is measured on. calibration: what methods may look at. report: told what
    is being done.
    """
    if not specs:
        return
    report("perplexity, dense")
    dense, dense_report = measure(model, text, window, stride), parameter_report(model)
    done = 0
    for start in range(0, len(specs), AT_ONCE):
        some = specs[start : start + AT_ONCE]
        report(f"converting, {done} of {len(specs)} measured")
        converted = convert_all(model, some, calibration)
        for spec, other in zip(some, converted, strict=True):
            report(f"perplexity, {done} of {len(specs)} measured")
            measured = measure(other, text, window, stride)
            done += 1
            yield run_of(spec, dense, measured, dense_report, parameter_report(other))


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
        stderr=changed.stderr,
        bits_per_byte=converted.bits_per_byte,
        nonzero=report.nonzero,
        mlp_nonzero_share=report.mlp_nonzero / dense_report.mlp_nonzero,
        macs_per_token=report.macs_per_token,
        mlp_macs_share=report.mlp_macs_per_token / dense_report.mlp_macs_per_token,
    )


STATIC, ROUTED, BOUND = "static", "routed", "bound"


def comparison(active: float, gated: bool = True) -> dict[str, tuple[str, ConversionSpec]]:
    """Name -> kind and spec of every method and baseline at one budget of MLP compute.

    active: the share of the neurons that run for a token. Choosing single neurons computes the
    gate in full; their share is lowered so that the multiply-adds are the same, and left out where
    nothing would be left. Routers are not compensated for: see `Run.mlp_macs_share`. Kinds:
    "static", "routed", and "bound" for what cannot be deployed. Static methods keep the nearest
    number of 16 branches.
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
        "ExpertWeaver, oracle router": routed("expertweaver", BOUND, router="oracle"),
        "Co-activation, oracle router": routed(
            "coactivation", BOUND, router="oracle", compensation="mean"
        ),
    }
    matrices = 3 if gated else 2
    share = (matrices * active - 1) / (matrices - 1)
    if share > 0.005:
        for name, choices in {
            "Neurons, top-k (AbsTopK-GLU)": {},
            "Neurons, threshold (CATS)": {"selection": "threshold"},
            "Neurons, by output, threshold, mean": {
                "router": "gate-norm", "selection": "threshold", "compensation": "mean"
            },
        }.items():  # fmt: skip
            specs[name] = (
                ROUTED, ConversionSpec(method="neurons", active=round(share, 6), **choices)
            )  # fmt: skip
    return specs
