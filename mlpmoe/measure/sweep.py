"""Many specs measured on one model and text, and the standard comparison of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..core.calibration import Calibration
from ..core.conversion import convert_all
from ..core.spec import ConversionSpec
from .parameters import parameter_report
from .perplexity import EncodedText, compare, measure

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
    macs_per_token: int  # in the whole model
    mlp_macs_share: float  # of the dense MLPs' multiply-adds, routers included

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"spec": self.spec.to_dict()}


def sweep(
    model: PreTrainedModel,
    text: EncodedText,
    specs: Sequence[ConversionSpec],
    calibration: Calibration | None = None,
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
    dense = measure(model, text, window, stride)
    dense_macs = parameter_report(model).mlp_macs_per_token
    done = 0
    for start in range(0, len(specs), AT_ONCE):
        some = specs[start : start + AT_ONCE]
        report(f"converting, {done} of {len(specs)} measured")
        converted = convert_all(model, some, calibration)
        for spec, other in zip(some, converted, strict=True):
            report(f"perplexity, {done} of {len(specs)} measured")
            measured = measure(other, text, window, stride)
            changed, counted = compare(dense, measured), parameter_report(other)
            done += 1
            yield Run(
                spec=spec,
                perplexity=measured.value,
                ratio=changed.ratio,
                stderr=changed.stderr,
                bits_per_byte=measured.bits_per_byte,
                nonzero=counted.nonzero,
                macs_per_token=counted.macs_per_token,
                mlp_macs_share=counted.mlp_macs_per_token / dense_macs,
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
