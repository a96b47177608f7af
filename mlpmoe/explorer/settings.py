"""The controls that make a static spec, and the spec that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.schedule import DEFAULT_EXPONENT
from ..core.spec import PROJECTIONS, UNITS, ConversionSpec
from .loaded import LoadedModel

EXPONENTS = (0.25, 8.0)  # of the schedule power, on the page
MAX_BRANCHES = 64  # on the page; the library allows up to d_ff
# fields of the spec, in the order in which their controls send their values
CONTROLS = (
    "branches", "fade", "keep", "compensation", "order", "fade_schedule", "fade_exponent",
    "fade_projections", "fade_score", "fade_unit", "allocation", "progressive",
)  # fmt: skip
FADE_FIELDS = (
    "fade_schedule", "fade_exponent", "fade_projections", "fade_score", "fade_unit",
)  # fmt: skip


def read_spec(values: Sequence[Any]) -> ConversionSpec:
    """The spec of the controls. What has no effect beside the other choices is left at its
    default, so that settings that do the same make the same spec.

    K exceeds B for a moment while B is moved down; then all are kept, as `settle_keep` decides.
    """
    chosen = dict(zip(CONTROLS, values, strict=True))
    names = chosen["fade_projections"]
    if not names:
        raise UserError("choose at least one matrix that fade works on: gate, up or down.")
    chosen["fade_projections"] = "-".join(name for name in PROJECTIONS if name in names)
    if chosen["keep"] >= chosen["branches"]:
        chosen["keep"] = None
    if chosen["fade_unit"] not in UNITS:
        chosen |= {"fade": 0.0, "fade_schedule": "linear"}
    elif chosen["fade"] == 0:
        chosen = {name: v for name, v in chosen.items() if name not in FADE_FIELDS}
    elif chosen["fade_unit"] == "neuron":
        chosen["fade_projections"] = "gate-up"
    if chosen.get("fade_schedule") != "power":
        chosen.pop("fade_exponent", None)
    if chosen["keep"] is None and chosen["fade"] == 0:
        chosen["allocation"] = "uniform"
    spec = ConversionSpec(**chosen | {"progressive": False})
    if spec.keep is None and not (spec.fits and spec.fades):
        spec = replace(spec, compensation="sqrt")
    if chosen["progressive"] and spec.looks_at_activations:
        spec = replace(spec, progressive=True)
    return spec


def settled(spec: ConversionSpec) -> ConversionSpec:
    """A static spec as the controls would make it."""
    values = {name: getattr(spec, name) for name in CONTROLS}
    values |= {"keep": spec.kept, "fade_projections": spec.projections}
    return read_spec(list(values.values()))


def parted(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The values of the controls that make the spec, and those after them."""
    return values[: len(CONTROLS)], values[len(CONTROLS) :]


def show_spec(spec: ConversionSpec, loaded: LoadedModel) -> tuple:
    """What the controls show of a spec, in the order of CONTROLS, and B again, for `settle_keep`
    to compare with."""
    exponent = DEFAULT_EXPONENT if spec.fade_exponent is None else spec.fade_exponent
    shown = {name: getattr(spec, name) for name in CONTROLS} | {
        "branches": gr.update(value=spec.branches, maximum=most_branches(loaded)),
        "keep": gr.update(value=spec.kept, maximum=max(2, spec.branches)),
        "fade_exponent": exponent,
        "fade_projections": list(spec.projections),
    }
    return *shown.values(), spec.branches


def settle_keep(branches: int, keep: int, branches_before: int) -> int:
    """K after B moved: all branches stay all, and K never exceeds B."""
    return branches if keep == branches_before else min(keep, branches)


def most_branches(loaded: LoadedModel) -> int:
    return min(MAX_BRANCHES, loaded.d_ff)


def check_shown(spec: ConversionSpec) -> None:
    """Raise UserError for what the controls cannot show."""
    if spec.branches > MAX_BRANCHES:
        raise UserError(f"this page offers at most {MAX_BRANCHES} branches (B).")
    low, high = EXPONENTS
    if spec.fade_exponent is not None and not low <= spec.fade_exponent <= high:
        raise UserError(f"this page offers fade_exponent from {low:g} to {high:g}.")
    if spec.seed:
        raise UserError("this page has no other seed than 0; the library and the shell do.")
