"""The controls that make a spec, and the spec that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import floor
from time import time
from typing import Any

import gradio as gr

from ...core.checks import layer_numbers
from ...core.errors import SpecError, UserError
from ...core.recovery.kinds import NOTHING
from ...core.routed import ROUTED_METHODS
from ...core.spec import MAX_FADE, PROJECTIONS, UNITS, ConversionSpec, without_idle
from ...core.static.schedule import DEFAULT_EXPONENT, SCHEDULES
from ...measure.words import capital
from ..server.asked import Conversion
from ..server.loaded import LoadedModel

EXPONENTS = (0.25, 8.0)  # of the schedule power, on the page
ARRIVING = 30  # seconds that what was set from here may need to reach all controls, on a slow page
MAX_BRANCHES = 64  # on the page; the library allows up to d_ff
MAX_EXPERTS = 128
USUAL_EXPERTS, USUAL_SHARED = 64, 0.25  # shown for methods that have none of their own
OWN = "own"  # the router that the method has by itself
LEAST_ACTIVE, ACTIVE_STEP = 0.05, 0.0125
MOST_STEPS = 1000  # of training
# Fields of the spec, and of routed specs what stands for them, in the order in which their
# controls send their values.
STATIC = (
    "branches", "fade", "keep", "compensation", "order", "fade_schedule", "fade_exponent",
    "fade_projections", "fade_score", "fade_unit", "allocation",
)  # fmt: skip
ROUTED = ("active", "experts", "shared", "own_share", "router", "selection", "fill")
TRAINING = ("recover", "recover_steps")
CONTROLS = ("method", *STATIC, *ROUTED, "progressive", "spared", *TRAINING)
SETTINGS = len(CONTROLS) + 1  # with the calibration text, the last
USED = 7  # outputs of `settle`


def read_spec(values: Sequence[Any]) -> ConversionSpec:
    """The spec of the controls. What has no effect beside the other choices is left at its
    default, so that settings that do the same make the same spec.

    K exceeds B for a moment while B is moved down; then all are kept, until `settle` decides.
    """
    chosen = dict(zip(CONTROLS, values[: len(CONTROLS)], strict=True))
    method = chosen["method"]
    if method in ROUTED_METHODS:
        return _routed(chosen)
    if method != "mlpmoe":
        raise UserError(f"{method!r:.60} is not a method; choose one of the list.")
    return _static({name: chosen[name] for name in (*STATIC, "progressive", "spared", *TRAINING)})


def _routed(chosen: dict[str, Any]) -> ConversionSpec:
    """The controls that the method does not use are left out."""
    method = ROUTED_METHODS[chosen["method"]]
    values = {
        "method": chosen["method"], "active": chosen["active"], "compensation": chosen["fill"],
        "spared": chosen["spared"], **{name: chosen[name] for name in TRAINING},
    }  # fmt: skip
    own = ("experts", "selection", "progressive")
    values |= {name: chosen[name] for name in own if name in method.fields}
    if "shared" in method.fields and not chosen["own_share"]:
        values["shared"] = min(chosen["shared"], chosen["active"])
    if chosen["router"] in method.routers:  # a list that is about to follow the method may not fit
        values["router"] = chosen["router"]
    return ConversionSpec(**values).canonical()


def _static(chosen: dict[str, Any]) -> ConversionSpec:
    names = chosen["fade_projections"]
    if not names:
        raise UserError("choose at least one matrix that fade works on: gate, up or down.")
    chosen["fade_projections"] = "-".join(name for name in PROJECTIONS if name in names)
    if chosen["keep"] >= chosen["branches"]:
        chosen["keep"] = None
    return ConversionSpec(**without_idle(chosen)).canonical()


def read_asked(loaded: LoadedModel, values: Sequence[Any]) -> Conversion:
    """The spec of the controls, with the calibration text if it needs one. Values out of range
    count as the nearest in it, as `settle` shows them."""
    used, _ = in_range(loaded, dict(zip(CONTROLS, values, strict=False)))
    spec = read_spec(list(used.values()))
    loaded.check_fits(spec)
    return loaded.asked(spec, values[len(CONTROLS)])


def parted(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The values of the controls that make the conversion, and those after them."""
    return values[:SETTINGS], values[SETTINGS:]


def show_spec(spec: ConversionSpec, loaded: LoadedModel) -> tuple:
    """What the controls show of a spec, in the order of CONTROLS, and the share of the branches
    that K stands for (see `settle`). What the method does not use stays as it is."""
    shown = dict.fromkeys(CONTROLS, gr.skip()) | {
        "method": spec.method, "progressive": spec.progressive, "spared": spec.spared,
        "recover": spec.recover,
    }  # fmt: skip
    if spec.recover != NOTHING:
        shown["recover_steps"] = spec.recover_steps
    if spec.routed:
        share = Share(set_at=int(time()), spec=_digest(spec))
        return *(shown | _show_routed(spec)).values(), str(share)
    exponent = DEFAULT_EXPONENT if spec.fade_exponent is None else spec.fade_exponent
    branches, keep, share = show_branches(
        spec.branches, spec.kept, most_branches(loaded), _digest(spec)
    )
    shown |= {name: getattr(spec, name) for name in STATIC} | {
        "branches": branches,
        "keep": keep,
        "fade_exponent": exponent,
        "fade_projections": list(spec.projections),
    }
    return *shown.values(), share


def _show_routed(spec: ConversionSpec) -> dict[str, Any]:
    usual = ConversionSpec(method=spec.method, active=spec.active)
    own_share = spec.shared == usual.shared
    shown = {
        "active": spec.active,
        "own_share": own_share,
        "router": OWN if spec.router == usual.router else spec.router,
        "selection": spec.selection,
        "fill": spec.compensation,
    }
    if spec.experts is not None:
        shown["experts"] = spec.experts
    if not own_share:
        shown["shared"] = spec.shared
    return shown


def show_branches(branches: int, kept: int, most: int, spec: str = "") -> tuple[dict, dict, str]:
    """What sets B and K, and the share that K stands for. spec: see `Share`."""
    return (
        gr.update(value=branches, maximum=most),
        gr.update(value=kept, maximum=max(2, branches)),
        str(Share(kept, branches, branches, int(time()), spec)),
    )


@dataclass(frozen=True)
class Share:
    """The share of the branches that K stands for, as it was chosen, and the B it was last shown
    for. Without it K would drift while B is dragged: 8 of 16 would pass 8 of 17 and end below
    16 of 32."""

    kept: int = 1
    of: int = 1
    branches: int = 0  # 0: none was shown yet
    set_at: int = 0  # seconds since 1970, if it was set from here together with other controls
    spec: str = ""  # digest of the spec that they make once all have arrived, where it is known

    @classmethod
    def read(cls, text: str) -> Share:
        try:
            *numbers, spec = text.split()
            share = cls(*map(int, numbers), spec=spec.strip("-"))
            if 1 <= share.kept <= share.of and share.branches >= 0:
                return share
        except (ValueError, TypeError, AttributeError):
            pass
        return cls()

    def __str__(self) -> str:
        return f"{self.kept} {self.of} {self.branches} {self.set_at} {self.spec or '-'}"

    @property
    def shown(self) -> int:
        """K for the B it was last shown for."""
        return self.at(self.branches)

    def at(self, branches: int) -> int:
        """K for this B: at least one branch."""
        return max(1, min(branches, int(branches * self.kept / self.of + 0.5)))


AS_THEY_ARE = str(Share())  # what it is follows from B and K


def arriving(values: Sequence[Any], share: str) -> bool:
    """Whether the values as sent are those of before they were set from here: they reach the page
    one after the other, this share first. What is sent then is not what the page is about to show.
    Before anything was set there is no share."""
    if not share:
        return True
    if not set_just_now(share):
        return False
    before = Share.read(share)
    if before.spec:
        try:
            return _digest(read_spec(values)) != before.spec
        except UserError:  # two that do not go together are on their way
            return True
    sent = dict(zip(CONTROLS, values, strict=False))
    return (sent["branches"], sent["keep"]) != (before.branches, before.shown)


def set_just_now(share: str) -> bool:
    """Whether the controls were set from here and not by the visitor."""
    return 0 <= time() - Share.read(share).set_at <= ARRIVING


def _digest(spec: ConversionSpec) -> str:
    return sha256(spec.canonical().to_query().encode()).hexdigest()[:12]


def settle(
    loaded: LoadedModel, values: Sequence[Any], share: str, budget: float
) -> tuple[list[Any], tuple[Any, ...], list[str]]:
    """The values of the controls as they are used; what to show instead of what was sent (B, fade,
    K and share, the shared share, what is trained, the budget); and sentences on what was out of
    range.

    After B moved K stays the same share of it. Whatever is used is shown.
    """
    sent, before = dict(zip(CONTROLS, values, strict=False)), Share.read(share)
    used, said = in_range(loaded, sent)
    branches = used["branches"]
    moved = branches != before.branches
    if before.branches and sent["keep"] == before.shown:
        after = replace(before, branches=branches, set_at=0, spec="")
        said.pop("keep", None)  # it only was on its way as B moved
    else:
        after = Share(used["keep"], branches, branches)
    used["keep"] = after.shown
    shown = (
        _unless(branches, sent["branches"]),
        _unless(used["fade"], sent["fade"]),
        _keep_shown(after.shown, sent["keep"], branches, moved),
        _unless(str(after), share),
        _unless(used["shared"], sent["shared"]),
        _unless(used["recover"], sent["recover"]),
        _budget_shown(loaded, used, budget),
    )
    return [*used.values(), *values[len(CONTROLS) :]], shown, list(said.values())


def _keep_shown(used: int, sent: int, branches: int, moved: bool) -> dict[str, Any]:
    """K is left alone where it may stay: the visitor may have moved it further meanwhile."""
    if used != sent:
        return gr.update(value=used, maximum=max(2, branches))
    return gr.update(maximum=max(2, branches)) if moved else gr.skip()


def _unless(used: Any, sent: Any) -> Any:
    return gr.skip() if used == sent else used


def _budget_shown(loaded: LoadedModel, used: dict[str, Any], budget: float) -> Any:
    """The budget that the other sliders stand for; left alone where they stand for it already,
    since there are fewer numbers of branches than budgets."""
    if _at_budget(loaded, used, budget) == _budgeted(used):
        return gr.skip()
    return round(100 * _compute(loaded, used))


def set_budget(loaded: LoadedModel, values: Sequence[Any], budget: float) -> tuple:
    """K and the active share that come nearest to a budget, in per cent of the dense MLPs'
    compute; what the method does not use, and what is there already, is left alone."""
    sent = dict(zip(CONTROLS, values, strict=False))
    used, _ = in_range(loaded, sent)
    wanted = _at_budget(loaded, used, budget)
    if wanted == _budgeted(used):
        return gr.skip(), gr.skip()
    return (gr.skip(), wanted) if used["method"] in ROUTED_METHODS else (wanted, gr.skip())


def _budgeted(used: dict[str, Any]) -> float:
    """What the budget moves."""
    return used["active"] if used["method"] in ROUTED_METHODS else used["keep"]


def _at_budget(loaded: LoadedModel, used: dict[str, Any], budget: float) -> float:
    """What it would move that to."""
    spared = _spared_share(loaded, used)
    share = (budget / 100 - spared) / (1 - spared) if spared < 1 else 1.0
    if used["method"] not in ROUTED_METHODS:
        return max(1, min(used["branches"], floor(used["branches"] * share + 0.5)))
    share = ROUTED_METHODS[used["method"]].active_share(share, len(loaded.projections))
    return max(LEAST_ACTIVE, min(1.0, round(round(share / ACTIVE_STEP) * ACTIVE_STEP, 4)))


def _compute(loaded: LoadedModel, used: dict[str, Any]) -> float:
    """The share of the dense MLPs' compute that K or the active share leaves, routers aside."""
    spared = _spared_share(loaded, used)
    share = _budgeted(used)
    if used["method"] not in ROUTED_METHODS:
        share /= used["branches"]
    else:
        share = ROUTED_METHODS[used["method"]].compute_share(share, len(loaded.projections))
    return spared + (1 - spared) * share


def _spared_share(loaded: LoadedModel, used: dict[str, Any]) -> float:
    return min(1.0, len(layer_numbers(used["spared"])) / len(loaded.mlps))


def within_reach(fade_unit: str, fade_schedule: str) -> tuple[dict, dict]:
    """Which of fade and its power can be set beside these choices."""
    takes = SCHEDULES[fade_schedule].exponent is not None
    return gr.update(interactive=fade_unit in UNITS), gr.update(visible=takes)


def in_range(loaded: LoadedModel, sent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What is used of what was sent, and a sentence on each of B, fade, K and what is trained that
    was not taken as it came."""
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
    used["shared"] = min(sent["shared"], sent["active"])  # of what runs, no more can be shared
    if reason := _untrainable(used):
        used["recover"] = NOTHING
        said["recover"] = f"{capital(reason)} Nothing is trained."
    return used, said


def _untrainable(used: dict[str, Any]) -> str | None:
    """Why the rest of what is chosen has nothing of the kind that is to be trained."""
    if used["recover"] == NOTHING:
        return None
    try:
        rest = read_spec(list((used | {"recover": NOTHING}).values()))
    except UserError:  # which is said where the spec is read
        return None
    try:
        replace(rest, recover=used["recover"])
    except SpecError as error:
        return str(error)
    return None


def most_branches(loaded: LoadedModel) -> int:
    return min(MAX_BRANCHES, loaded.d_ff)


def check_shown(spec: ConversionSpec) -> None:
    """Raise UserError for what the controls cannot show."""
    if spec.branches > MAX_BRANCHES:
        raise UserError(f"this page offers at most {MAX_BRANCHES} branches (B).")
    if spec.experts is not None and spec.experts > MAX_EXPERTS:
        raise UserError(f"this page offers at most {MAX_EXPERTS} experts.")
    if spec.active < LEAST_ACTIVE:
        raise UserError(f"this page offers an active share of at least {LEAST_ACTIVE:g}.")
    low, high = EXPONENTS
    if spec.fade_exponent is not None and not low <= spec.fade_exponent <= high:
        raise UserError(f"this page offers fade_exponent from {low:g} to {high:g}.")
    usual = ConversionSpec(method=spec.method, active=spec.active)
    if spec.recover_steps > MOST_STEPS:
        raise UserError(f"this page offers at most {MOST_STEPS:,} steps of training.")
    for name in ("profile", "tau", "seed", "recover_rate"):
        if getattr(spec, name) != getattr(usual, name):
            raise UserError(
                f"this page has no control for {name}; the library and the shell have one."
            )
