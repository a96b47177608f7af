"""The controls that make a routed spec, and the spec that they make."""

from __future__ import annotations

from typing import Any

from ..core.errors import UserError
from ..core.routed import ROUTED_METHODS
from ..core.spec import ConversionSpec

OWN = "own"  # the method's own choice, or the visitor's own text
MAX_EXPERTS = 128
CONTROLS = (
    "method", "active", "experts", "shared", "own_share", "router", "selection", "fill",
)  # fmt: skip
DEFAULT_SHARED = 0.25


def read_spec(
    method: str, active: float, experts: int, shared: float, own_share: bool, router: str,
    selection: str, fill: str,
) -> ConversionSpec:  # fmt: skip
    """The spec of the controls; those that the method does not use are left out."""
    fields = ROUTED_METHODS[method].fields if method in ROUTED_METHODS else ()
    values: dict[str, Any] = {"active": active, "selection": selection, "compensation": fill}
    if "experts" in fields:
        values["experts"] = experts
        if not own_share:
            values["shared"] = shared
    if router != OWN:
        values["router"] = router
    return ConversionSpec(method=method, **values)


def show_spec(spec: ConversionSpec) -> tuple:
    """What the controls show of a routed spec, in the order of CONTROLS."""
    usual = ConversionSpec(method=spec.method, active=spec.active)
    own_share = spec.shared == usual.shared
    return (
        spec.method,
        spec.active,
        spec.experts or 64,
        DEFAULT_SHARED if own_share or not isinstance(spec.shared, float) else spec.shared,
        own_share,
        OWN if spec.router == usual.router else spec.router,
        spec.selection,
        spec.compensation,
    )


def check_shown(spec: ConversionSpec) -> None:
    """Raise UserError for what the controls cannot show."""
    if spec.experts is not None and spec.experts > MAX_EXPERTS:
        raise UserError(f"this page offers at most {MAX_EXPERTS} experts.")
    if read_spec(*show_spec(spec)) != spec:
        raise UserError(
            "this page has no control for a part of this routed spec (profile, tau, spared, "
            "progressive or seed); the library and the shell do."
        )
