"""The four cards: dense and converted value, the difference, and what to know about it.

Plain functions from measurements to HTML; every text that is not ours is escaped.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from ...core.spec import ConversionSpec
from ...measure.cost.parameters import ParameterReport
from ...measure.cost.speed import SpeedReport
from ...measure.notation import change, count, difference, number, signed_percent, speedup
from ...measure.quality.estimate import Evaluation
from ...measure.quality.perplexity import Perplexity
from ..server.loaded import LoadedModel
from ..server.structure import Zeros
from ..server.texts import text_name


@dataclass(frozen=True)
class Card:
    """What a card says; empty strings leave their line blank, so that cards keep their height."""

    title: str
    dense: str
    converted: str
    difference: str
    note: str

    def html(self) -> str:
        return (
            f'<section class="card"><h3>{escape(self.title)}</h3>'
            f'<p class="values"><span class="dense" title="dense">{escape(self.dense)}</span>'
            '<span class="arrow" aria-label="becomes"> → </span>'
            f'<span class="converted" title="converted">{escape(self.converted)}</span>'
            "</p>"
            f'<p class="difference">{escape(self.difference)}</p>'
            f'<p class="note">{escape(self.note)}</p></section>'
        )


def perplexity_card(evaluation: Evaluation, text: str, window: int | None = None) -> Card:
    """What is known so far, with its error and on how many tokens. window: tokens, of a text that
    is cut into windows."""
    dense, converted = evaluation.dense, evaluation.converted
    tokens = f"{dense.tokens:,} tokens"
    if evaluation.look:
        tokens = f"first look: {len(evaluation.parts)} pieces, {dense.tokens:,} tokens"
    elif not evaluation.complete:
        tokens = f"{dense.tokens:,} of {evaluation.total:,} tokens"
    changed = difference(evaluation.change)
    if not evaluation.settled and not evaluation.change.measurable:
        early = evaluation.change
        changed = f"{change(early.ratio, early.stderr)}, not measurable so far"
    windows = f" in windows of {window:,}" if window and not evaluation.look else ""
    return Card(
        "Perplexity",
        number(dense.value),
        number(converted.value),
        changed,
        f"{text_name(text)}, {tokens}{windows}; "
        f"{dense.bits_per_byte:.2f} → {number(converted.bits_per_byte)} bits per byte",
    )


def pending_perplexity_card(dense: Perplexity | None, text: str, message: str) -> Card:
    """Before and during a measurement."""
    value = number(dense.value) if dense else "…"
    return Card("Perplexity", value, "…", message, f"on the {text_name(text)}")


def nonzero_card(
    dense: ParameterReport, converted: ParameterReport, spec: ConversionSpec, zeros: Zeros | None
) -> Card:
    """Both denominators, and what fade was asked for against what it did."""
    whole = converted.nonzero / dense.nonzero - 1
    mlps = converted.mlp_nonzero / dense.mlp_nonzero - 1
    alphas = converted.total - dense.total
    if spec.routed:
        note = f"all weights stay; routers add {count(alphas)}" if alphas else "all weights stay"
    elif zeros:
        where = " in what is kept" if spec.kept < spec.branches else ""
        verb = "drops" if spec.fade_unit == "neuron" else "zeroes"
        note = f"fade {verb} {100 * zeros.realised:.2f} % of {zeros.what}{where}"
        if zeros.requested is not None:
            note += f", asked for {100 * zeros.requested:.2f} %"
    elif spec.kept < spec.branches:
        note = f"{spec.branches - spec.kept} of {spec.branches} branches are neither kept nor run"
    else:
        note = f"nothing removed; one α per branch and layer adds {alphas:,}"
    return Card(
        "Non-zero parameters",
        count(dense.nonzero),
        count(converted.nonzero),
        f"MLPs {signed_percent(mlps)} · all {signed_percent(whole)}",
        note,
    )


def compute_card(dense: ParameterReport, converted: ParameterReport, spec: ConversionSpec) -> Card:
    mlps = converted.mlp_macs_per_token / dense.mlp_macs_per_token - 1
    whole = converted.macs_per_token / dense.macs_per_token - 1
    note = "multiply-adds in weight matrices"
    if spec.routed:
        note += ", routers counted; the mean over tokens"
    elif spec.fades and spec.fade_unit != "neuron":
        note = "zeros stay in place, so fade saves no multiply-adds"
    return Card(
        "Compute per token",
        count(dense.macs_per_token),
        count(converted.macs_per_token),
        f"MLPs {signed_percent(mlps)} · all {signed_percent(whole)}",
        note,
    )


def pending_structure_cards(loaded: LoadedModel, message: str) -> tuple[Card, Card]:
    """Non-zero parameters and compute, before a calibrated conversion is made."""
    dense, note = loaded.report, "a choice with a * looks at a calibration text first"
    return (
        Card("Non-zero parameters", count(dense.nonzero), "…", message, note),
        Card("Compute per token", count(dense.macs_per_token), "…", message, note),
    )


def speed_card(speed: SpeedReport, loaded: LoadedModel) -> Card:
    dtype = str(loaded.checked.dtype).removeprefix("torch.")
    note = f"writing one text, {dtype} on {loaded.checked.device.type}; range: middle half of runs"
    if speed.plain is not None:
        note = f"one text, {dtype}, both compiled; torch alone, dense: {number(speed.plain)}"
    return Card(
        "Tokens per second",
        number(speed.dense),
        number(speed.converted),
        speedup(speed.speedup),
        note,
    )


def pending_speed_card(message: str) -> Card:
    return Card("Tokens per second", "…", "…", message, "measured in turn with perplexity")


def status_line(loaded: LoadedModel) -> str:
    """What is loaded, for the line under the model picker."""
    weights = loaded.mlps[0].weights
    parts = [
        loaded.checked.architecture.removesuffix("ForCausalLM"),
        f"{len(loaded.mlps)} layers",
        f"d_model {weights.d_model}",
        f"d_ff {loaded.d_ff}",
        f"{count(loaded.report.total)} parameters, {100 * mlp_share(loaded):.0f} % in MLPs",
        f"{str(loaded.checked.dtype).removeprefix('torch.')} on {loaded.checked.device.type}",
    ]
    if loaded.checked.revision:
        parts.append(f"revision {loaded.checked.revision[:8]}")
    return f"<p><strong>{escape(loaded.label)}</strong> {escape(' · '.join(parts))}</p>"


def mlp_share(loaded: LoadedModel) -> float:
    return loaded.report.mlp_total / loaded.report.total
