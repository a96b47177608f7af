"""A spec in words: as a sentence, or as a recipe in a line."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.choices import ALLOCATIONS, METHODS, SELECTIONS
from ..core.recovery.kinds import RECOVERIES
from ..core.spec import ConversionSpec
from ..core.static.compensation import COMPENSATIONS, FILLS
from ..core.static.order import ORDERS
from ..core.static.schedule import SCHEDULES
from ..core.static.scores import SCORES


def in_words(spec: ConversionSpec) -> str:
    """What a spec does, as the rest of a sentence: "keeps 12 of 16 branches; …"; of a routed one,
    its recipe in a line."""
    if spec.routed:
        return in_short(spec)
    parts = []
    drops = spec.kept < spec.branches
    if drops:
        order = ORDERS[spec.order]
        neurons = "" if order.rank is None else " of neurons"
        parts.append(f"keeps {spec.kept} of {spec.branches} branches{neurons}, {order.about}")
    if spec.pattern:
        n, m = spec.pattern
        parts.append(
            f"zeroes {n} of every {m} weights of {joined(spec.projections)}, {_first(spec)}"
        )
    elif spec.fade and spec.fade_unit == "neuron":
        parts.append(f"drops whole neurons, {SCHEDULES[spec.fade_schedule].about}")
    elif spec.fade:
        parts.append(
            f"zeroes weights of {joined(spec.projections)}, "
            f"{SCHEDULES[spec.fade_schedule].about}, {_first(spec)}"
        )
    if spec.alpha != 1 or (spec.fits and parts):
        parts.append(COMPENSATIONS[spec.compensation].about)
    if spec.shares_out:
        parts.append(ALLOCATIONS[spec.allocation].about)
    if spec.progressive:
        parts.append("calibrates layer by layer on the converted model")
    if spec.spared and parts:
        parts.append(spared_in_words(spec))
    if spec.recovers:
        parts.append(f"{RECOVERIES[spec.recover].about}, {spec.recover_steps} steps")
    return "; ".join(parts) or "cuts into branches and removes nothing"


def in_short(spec: ConversionSpec) -> str:
    """A spec in one short line, e.g. "B 16 · fade 0.90 · K 12, × √(B/K)" or "CMoE · 75 % active ·
    8 experts"."""
    parts = _routed_parts(spec) if spec.routed else _static_parts(spec)
    if spec.spared:
        parts.append(spared_in_words(spec))
    if spec.recovers:
        parts.append(f"{RECOVERIES[spec.recover].short} ({spec.recover_steps} steps)")
    return " · ".join(parts)


def _static_parts(spec: ConversionSpec) -> list[str]:
    fade = f"fade {spec.fade:.2f}"
    if spec.pattern:
        fade = f"{spec.fade_unit} zeros"
    elif spec.fade and spec.fade_unit == "neuron":
        fade += " by neurons"
    parts = [f"B {spec.branches}", fade, f"K {spec.kept}"]
    if spec.kept < spec.branches:
        parts[-1] += f", {COMPENSATIONS[spec.compensation].short}"
    elif spec.fades and spec.fits:
        parts.append(COMPENSATIONS[spec.compensation].short)
    if ORDERS[spec.order].rank is not None:
        parts.append(ORDERS[spec.order].short)
    return parts


def _routed_parts(spec: ConversionSpec) -> list[str]:
    parts = [METHODS[spec.method].short, f"{100 * spec.active:.3g} % active"]
    if spec.experts:
        parts.append(f"{spec.experts} experts")
    if spec.selection != "topk":
        parts.append(SELECTIONS[spec.selection].short)
    if spec.compensation != "none":
        parts.append(FILLS[spec.compensation].short)
    return parts


def spared_in_words(spec: ConversionSpec) -> str:
    """Which layers are spared, e.g. "layers 0 and 11 kept dense"."""
    layers = spec.spared_layers
    return f"layer{'s' if len(layers) > 1 else ''} {joined(list(map(str, layers)))} kept dense"


def capital(text: str) -> str:
    """The text, beginning with a capital; a name such as fade_unit or model.safetensors is left as
    it is written."""
    first = text.split(maxsplit=1)[0].rstrip(".,:;!?") if text.strip() else ""
    is_name = any(c in "_./\\" or c.isdigit() for c in first)
    return text if is_name else text[:1].upper() + text[1:]


def joined(names: Sequence[str]) -> str:
    """Names as in a sentence: gate, up and down."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _first(spec: ConversionSpec) -> str:
    return f"{SCORES[spec.fade_score].about} first"
