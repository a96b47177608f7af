"""Every method, and every choice of every stage, each in a conversion of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.choices import ALLOCATIONS, PROFILES
from mlpmoe.core.recovery.kinds import NOTHING, RECOVERIES
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static.compensation import COMPENSATIONS, FILLS
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.schedule import SCHEDULES
from mlpmoe.core.static.scores import SCORES
from tests.families import VOCABULARY

EXPERTS = {"experts": 8}
EVERYWHERE = {"fade": 0.6, "fade_schedule": "uniform", "fade_projections": "gate-up-down"}


@cache
def calibration() -> Calibration:
    """Random tokens that any of the tiny models has."""
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(VOCABULARY, (40, 32), generator=generator))


def static_specs() -> Iterator[ConversionSpec]:
    def spec(**fields: Any) -> ConversionSpec:
        return ConversionSpec(**{"branches": 8} | fields)

    yield spec()
    for schedule in SCHEDULES:
        yield spec(fade=0.9, fade_schedule=schedule, keep=7)
    for order in ORDERS:
        yield spec(order=order, keep=6, compensation="mean")
    for name in COMPENSATIONS:
        yield spec(order="norm", keep=6, compensation=name)
        yield spec(**EVERYWHERE, compensation=name)
    for score in SCORES:
        yield spec(**EVERYWHERE, fade_score=score, compensation="refit")
        yield spec(fade=0.6, fade_unit="neuron", fade_score=score, compensation="none")
        yield spec(fade_unit="2:4", fade_projections="up-down", fade_score=score)
    for allocation in ALLOCATIONS:
        yield spec(order="fluctuation", keep=6, allocation=allocation)
    yield spec(order="loss", keep=6, compensation="refit", allocation="sensitivity")
    yield spec(fade=0.6, allocation="sensitivity", compensation="none")
    yield spec(order="least-squares", keep=6, compensation="refit", progressive=True)


def routed_specs() -> Iterator[ConversionSpec]:
    for name, method in ROUTED_METHODS.items():
        fields = {"method": name, "active": 0.5} | (EXPERTS if "experts" in method.fields else {})
        for router in method.routers:
            yield ConversionSpec(**fields, router=router)
        for fill in FILLS:
            yield ConversionSpec(**fields, compensation=fill, progressive=fill == "refit")
            if "selection" in method.fields:
                yield ConversionSpec(**fields, compensation=fill, selection="threshold")
        if "profile" in method.fields:
            for profile in PROFILES:
                yield ConversionSpec(**fields, profile=profile)
    for router in ROUTED_METHODS["inputs"].routers:
        yield ConversionSpec(method="inputs", active=0.5, router=router, selection="threshold")
    yield ConversionSpec(method="contiguous", experts=8, shared=0.25)


def trained_specs() -> Iterator[ConversionSpec]:
    for kind in RECOVERIES:
        if kind == NOTHING:
            continue
        fields = {"recover": kind, "recover_steps": 2}
        if kind not in ("masks", "router"):
            yield ConversionSpec(branches=8, fade=0.6, keep=6, **fields)
        if kind == "masks":
            yield ConversionSpec(method="tokenclusters", active=0.5, **EXPERTS, **fields)
        elif kind == "router":
            yield ConversionSpec(method="cmoe", active=0.5, **EXPERTS, **fields)
    threshold = {"active": 0.5, "selection": "threshold", "recover_steps": 2}
    for method, kind in (("neurons", "down"), ("cmoe", "lora"), ("inputs", "all")):
        yield ConversionSpec(method=method, recover=kind, **threshold)


def all_specs() -> list[ConversionSpec]:
    """Each once."""
    return list(dict.fromkeys([*static_specs(), *routed_specs(), *trained_specs()]))


def first_specs() -> list[ConversionSpec]:
    """One of each method, calibrated and with its usual router."""
    static = ConversionSpec(branches=8, keep=6, order="least-squares", compensation="refit")
    routed = [
        ConversionSpec(
            method=name, active=0.5, compensation="mean",
            **(EXPERTS if "experts" in method.fields else {}),
        )
        for name, method in ROUTED_METHODS.items()
    ]  # fmt: skip
    return [static, *routed]


def grouped_specs() -> list[ConversionSpec]:
    """Those of experts, which can run one by one."""
    return [spec for spec in first_specs() if spec.routed and "experts" in spec.routed.fields]
