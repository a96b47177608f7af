"""What the first screen shows of a setting: cards, sentence, curve and network, from what is
known of it. No model runs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from ...measure.quality.estimate import Evaluation
from ...measure.runs.families import LEAST_SAVED, Estimate, Shares, estimate, expected_shares
from ...models.catalogue import DEMO_KEY
from ..plots.curve import Here, curve
from ..server.asked import Calibrated, Conversion, spec_of
from ..server.loaded import LoadedModel
from ..server.texts import calibration_name
from .cards import (
    compute_card,
    nonzero_card,
    pending_perplexity_card,
    pending_speed_card,
    pending_structure_cards,
    perplexity_card,
    speed_card,
)
from .network import Column, network_value, routed_columns, static_columns
from .records import Record
from .sentence import sentence
from .shipped import shipped

FRONT = 7  # outputs


@dataclass(frozen=True)
class Front:
    """Outputs, in the order of the page."""

    perplexity: str
    nonzero: str
    compute: str
    speed: str
    sentence: str
    curve: go.Figure
    network: Any

    @property
    def outputs(self) -> tuple[Any, ...]:
        return (
            self.perplexity, self.nonzero, self.compute, self.speed, self.sentence, self.curve,
            self.network,
        )  # fmt: skip

    @property
    def measured(self) -> tuple[Any, ...]:
        """What changes as an estimate sharpens."""
        return (
            self.perplexity, gr.skip(), gr.skip(), self.speed, self.sentence, self.curve,
            gr.skip(),
        )  # fmt: skip


def front(
    loaded: LoadedModel, asked: Conversion, text: str, axis: str, mine: Sequence[Record],
    layer: int, message: str,
) -> Front:  # fmt: skip
    """axis: of the curve. mine: what the visitor's browser keeps. layer: that is looked at.
    message: where something is not known yet."""
    evaluation, speed = loaded.known_evaluation(asked, text), loaded.known_speed(asked)
    perplexity = (
        perplexity_card(evaluation, text, loaded.text(text).window)
        if evaluation
        else pending_perplexity_card(loaded.known_dense(text), text, message)
    )
    known, own = shipped(loaded.key), _here(loaded, text, mine)
    shares, runs = shares_of(loaded, asked), [record.run for record in (*known, *own)]
    guess = None if evaluation else estimate(runs, spec_of(asked))
    nonzero, compute = _structure_cards(loaded, asked, message)
    return Front(
        perplexity=perplexity.html(),
        nonzero=nonzero,
        compute=compute,
        speed=(speed_card(speed, loaded) if speed else pending_speed_card(message)).html(),
        sentence=sentence(
            spec_of(asked), shares, evaluation or guess, runs, toy=loaded.key == DEMO_KEY,
            calibration=calibration_name(asked.key) if isinstance(asked, Calibrated) else "",
            recovery=loaded.recovery(asked),
        ),
        curve=curve(
            [record.run for record in known], [record.run for record in own],
            _point(shares.of(axis), evaluation, guess), axis,
            {record.run.spec: record.query for record in (*known, *own)},
        ),
        network=network_of(loaded, asked, layer),
    )  # fmt: skip


def shares_of(loaded: LoadedModel, asked: Conversion) -> Shares:
    """Of the dense MLPs: counted where the conversion is made, else what the spec asks for."""
    if not loaded.is_converted(asked):
        return expected_shares(spec_of(asked), gated=len(loaded.projections) == 3)
    dense, converted = loaded.report, loaded.structure.report(asked)
    return Shares(
        nonzero=converted.mlp_nonzero / dense.mlp_nonzero,
        compute=converted.mlp_macs_per_token / dense.mlp_macs_per_token,
    )


def axis_for(axis: str, loaded: LoadedModel, asked: Conversion) -> str:
    """The axis that is shown, or the other one where the conversion saves something on that one
    alone."""
    other = "compute" if axis == "nonzero" else "nonzero"
    shares = shares_of(loaded, asked)
    saves_here, saves_there = (shares.of(one) < 1 - LEAST_SAVED for one in (axis, other))
    return other if saves_there and not saves_here else axis


def network_of(
    loaded: LoadedModel, asked: Conversion, layer: int,
    used: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Any:  # fmt: skip
    """The picture of the network; left as it is until the conversion is made. used: per token of
    the answer and layer the cells that it ran."""
    spec = spec_of(asked)
    if not loaded.is_converted(asked):
        return gr.skip()
    if not spec.routed:
        columns = static_columns(loaded.structure.left(asked), spec.spared_layers)
        return network_value("branches", columns, layer)
    found = loaded.known_routing(asked)
    if found is None:
        return gr.skip()
    kind, columns = routed_columns(found, spec.spared_layers)
    return network_value(kind, columns, layer, used)


def dense_network(loaded: LoadedModel) -> dict[str, Any]:
    """The picture of a model of which nothing is cut yet."""
    return network_value("branches", [Column([]) for _ in loaded.mlps], 0)


def _here(loaded: LoadedModel, text: str, mine: Sequence[Record]) -> list[Record]:
    return [record for record in mine if (record.model, record.text) == (loaded.key, text)]


def _structure_cards(loaded: LoadedModel, asked: Conversion, message: str) -> tuple[str, str]:
    if not loaded.is_converted(asked):
        nonzero, compute = pending_structure_cards(loaded, message)
        return nonzero.html(), compute.html()
    spec, report = spec_of(asked), loaded.structure.report(asked)
    zeros = loaded.structure.zeros(asked)
    return (
        nonzero_card(loaded.report, report, spec, zeros).html(),
        compute_card(loaded.report, report, spec).html(),
    )


def _point(share: float, evaluation: Evaluation | None, guess: Estimate | None) -> Here:
    if evaluation:
        change = evaluation.change
        return Here(share, change.ratio, change.stderr, measured=True)
    if guess:
        return Here(share, guess.ratio, low=guess.low, high=guess.high)
    return Here(share, None)
