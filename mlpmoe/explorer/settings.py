"""The controls that make a static spec, and the spec that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from time import time
from typing import Any

import gradio as gr

from ..core.errors import UserError
from ..core.schedule import DEFAULT_EXPONENT, SCHEDULES
from ..core.spec import MAX_FADE, PROJECTIONS, UNITS, ConversionSpec, without_idle
from .asked import Conversion
from .loaded import LoadedModel

EXPONENTS = (0.25, 8.0)  # of the schedule power, on the page
AS_THEY_ARE = "0"  # for a `Share`: what it is follows from B and K
ARRIVING = 5  # seconds that what was set from here may need to reach all controls
MAX_BRANCHES = 64  # on the page; the library allows up to d_ff
# fields of the spec, in the order in which their controls send their values
CONTROLS = (
    "branches", "fade", "keep", "compensation", "order", "fade_schedule", "fade_exponent",
    "fade_projections", "fade_score", "fade_unit", "allocation", "progressive",
)  # fmt: skip
SETTINGS = len(CONTROLS) + 1  # with the calibration text, the last
FADE_FIELDS = (
    "fade_schedule", "fade_exponent", "fade_projections", "fade_score", "fade_unit",
)  # fmt: skip


def read_spec(values: Sequence[Any]) -> ConversionSpec:
    """The spec of the controls. What has no effect beside the other choices is left at its
    default, so that settings that do the same make the same spec.

    K exceeds B for a moment while B is moved down; then all are kept, until `settle` decides.
    """
    chosen = dict(zip(CONTROLS, values[: len(CONTROLS)], strict=True))
    names = chosen["fade_projections"]
    if not names:
        raise UserError("choose at least one matrix that fade works on: gate, up or down.")
    chosen["fade_projections"] = "-".join(name for name in PROJECTIONS if name in names)
    if chosen["keep"] >= chosen["branches"]:
        chosen["keep"] = None
    return ConversionSpec(**without_idle(chosen)).canonical()


def settled(spec: ConversionSpec) -> ConversionSpec:
    """A static spec as the controls would make it."""
    values = {name: getattr(spec, name) for name in CONTROLS}
    values |= {"keep": spec.kept, "fade_projections": spec.projections}
    return read_spec(list(values.values()))


def read_asked(loaded: LoadedModel, values: Sequence[Any]) -> Conversion:
    """The spec of the controls, with the calibration text if it needs one. Values out of range
    count as the nearest in it, as `settle` shows them."""
    used, _ = in_range(loaded, dict(zip(CONTROLS, values, strict=False)))
    spec = read_spec(list(used.values()))
    spec.check_fits(loaded.d_ff)
    return loaded.asked(spec, values[len(CONTROLS)])


def parted(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The values of the controls that make the conversion, and those after them."""
    return values[:SETTINGS], values[SETTINGS:]


def show_spec(spec: ConversionSpec, loaded: LoadedModel) -> tuple:
    """What the controls show of a spec, in the order of CONTROLS, and the share of the branches
    that K stands for (see `settle`)."""
    exponent = DEFAULT_EXPONENT if spec.fade_exponent is None else spec.fade_exponent
    branches, keep, share = show_branches(spec.branches, spec.kept, most_branches(loaded))
    shown = {name: getattr(spec, name) for name in CONTROLS} | {
        "branches": branches,
        "keep": keep,
        "fade_exponent": exponent,
        "fade_projections": list(spec.projections),
    }
    return *shown.values(), share


def show_branches(branches: int, kept: int, most: int) -> tuple[dict, dict, str]:
    """What sets B and K, and the share that K stands for."""
    return (
        gr.update(value=branches, maximum=most),
        gr.update(value=kept, maximum=max(2, branches)),
        str(Share(kept, branches, branches, int(time()))),
    )


@dataclass(frozen=True)
class Share:
    """The share of the branches that K stands for, as it was chosen, and the B it was last shown
    for. Without it K would drift while B is dragged: 8 of 16 would pass 8 of 17 and end below
    16 of 32."""

    kept: int
    of: int
    branches: int
    set_at: int = 0  # seconds since 1970, if it was set from here together with B and K

    @classmethod
    def read(cls, text: str) -> Share:
        try:
            share = cls(*map(int, text.split()))
            if 1 <= share.kept <= share.of and share.branches >= 1:
                return share
        except (ValueError, TypeError, AttributeError):
            pass
        return cls(1, 1, 0)  # none was shown yet

    def __str__(self) -> str:
        numbers = self.kept, self.of, self.branches, *([self.set_at] if self.set_at else [])
        return " ".join(map(str, numbers))

    @property
    def shown(self) -> int:
        """K for the B it was last shown for."""
        return self.at(self.branches)

    def at(self, branches: int) -> int:
        """K for this B: at least one branch."""
        return max(1, min(branches, int(branches * self.kept / self.of + 0.5)))


def arriving(values: Sequence[Any], share: str) -> bool:
    """Whether B and K as sent are those of before they were set from here: the page hears of the
    share first. What is sent then is not what the page is about to show. Before anything was set
    there is no share."""
    if not share:
        return True
    before = Share.read(share)
    if not 0 <= time() - before.set_at <= ARRIVING:
        return False
    branches, _, keep, *_ = values
    return (branches, keep) != (before.branches, before.shown)


def settle(
    loaded: LoadedModel, values: Sequence[Any], share: str
) -> tuple[list[Any], tuple[Any, ...], list[str]]:
    """The values of the controls as they are used; what to show instead of what was sent (B, fade,
    K and share); and sentences on what was out of range.

    After B moved K stays the same share of it. Whatever is used is shown.
    """
    sent, before = dict(zip(CONTROLS, values, strict=False)), Share.read(share)
    used, said = in_range(loaded, sent)
    branches = used["branches"]
    moved = branches != before.branches
    if before.branches and sent["keep"] == before.shown:
        after = replace(before, branches=branches, set_at=0)
        said.pop("keep", None)  # it only was on its way as B moved
    else:
        after = Share(used["keep"], branches, branches)
    used["keep"] = after.shown
    shown = (
        gr.skip() if branches == sent["branches"] else branches,
        gr.skip() if used["fade"] == sent["fade"] else used["fade"],
        # K is left alone where it may stay: the visitor may have moved it further meanwhile
        gr.update(value=after.shown, maximum=max(2, branches))
        if moved or after.shown != sent["keep"]
        else gr.skip(),
        gr.skip() if str(after) == share else str(after),
    )
    return [*used.values(), *values[len(CONTROLS) :]], shown, list(said.values())


def within_reach(fade_unit: str, fade_schedule: str) -> tuple[dict, dict]:
    """Which of fade and its power can be set beside these choices."""
    takes = SCHEDULES[fade_schedule].exponent is not None
    return gr.update(interactive=fade_unit in UNITS), gr.update(visible=takes)


def in_range(loaded: LoadedModel, sent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """B, fade and K as they are used of what was sent, and a sentence on each that was not taken
    as it came."""
    most, used, said = most_branches(loaded), dict(sent), {}
    used["branches"] = max(1, min(most, floor(sent["branches"] + 0.5)))
    used["fade"] = max(0.0, min(MAX_FADE, sent["fade"]))
    used["keep"] = max(1, min(used["branches"], floor(sent["keep"] + 0.5)))
    if used["branches"] != sent["branches"]:
        said["branches"] = f"B is a whole number from 1 to {most}: {used['branches']} is used."
    if used["fade"] != sent["fade"]:
        said["fade"] = f"Fade goes from 0 to {MAX_FADE:g}: {used['fade']:g} is used."
    if used["keep"] != sent["keep"]:
        said["keep"] = f"K is a whole number from 1 to B: {used['keep']} is used."
    return used, said


def most_branches(loaded: LoadedModel) -> int:
    return min(MAX_BRANCHES, loaded.d_ff)


def check_shown(spec: ConversionSpec) -> None:
    """Raise UserError for what the controls cannot show."""
    if spec.branches > MAX_BRANCHES:
        raise UserError(f"this page offers at most {MAX_BRANCHES} branches (B).")
    low, high = EXPONENTS
    if spec.fade_exponent is not None and not low <= spec.fade_exponent <= high:
        raise UserError(f"this page offers fade_exponent from {low:g} to {high:g}.")
    if spec.spared:
        raise UserError("this page has no control for spared layers; the library and the shell do.")
    if spec.seed:
        raise UserError("this page has no other seed than 0; the library and the shell do.")
