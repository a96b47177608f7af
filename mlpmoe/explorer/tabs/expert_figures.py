"""What a routed conversion does on a text, as figures: load, shared share, coloured words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch

from ...core.conversion import mlp_modules
from ...core.routed import ClusterMLP, InputMLP, LowRankMLP, RoutedMLP
from ...core.static.branched import BranchedMLP
from ...measure.quality.routing import LayerRouting
from ...measure.words import joined
from ..plots.expert_plots import shared_split, variation_histogram
from ..server.loaded import LoadedModel

SHOWN_TOKENS = 160  # of the evaluation stories, coloured


def split_plot(model: Any, found: Sequence[LayerRouting]) -> go.Figure:
    """What runs in each layer: always, by routing, not; of the weights, where inputs are chosen."""
    mlps = mlp_modules(model)
    shared, routed, of = [], [], "neurons"
    for mlp, layer in zip(mlps, found, strict=True):
        if isinstance(mlp, BranchedMLP):  # spared
            shared.append(1.0)
            routed.append(0.0)
            continue
        if isinstance(mlp, InputMLP):
            shared.append(0.0)
            routed.append(mlp.macs_per_token / (mlp.matrices * mlp.down.numel()))
            of = "weights"
            continue
        if isinstance(mlp, LowRankMLP):
            shared.append(0.0)
            routed.append(mlp.macs_per_token / mlp.dense_macs)
            of = "weights"
            continue
        if isinstance(mlp, ClusterMLP):
            always = int(mlp.masks.all(0).sum())
            shared.append(always / mlp.neurons)
            routed.append((mlp.size - always) / mlp.neurons)
            continue
        always = mlp.shared if isinstance(mlp, RoutedMLP) else 0
        size = mlp.size if isinstance(mlp, RoutedMLP) else 1
        shared.append(always / mlp.d_ff)
        routed.append(float(layer.counts.float().mean()) * size / mlp.d_ff)
    idle = [max(0.0, 1 - s - r) for s, r in zip(shared, routed, strict=True)]
    return shared_split(shared, routed, idle, of)


def variation_plot(model: Any, tau: float | None) -> go.Figure | None:
    """The coefficients of variation of all neurons, if the method computed them."""
    found = [
        mlp.partition.variation
        for mlp in mlp_modules(model)
        if isinstance(mlp, RoutedMLP) and mlp.partition.variation is not None
    ]
    if not found:
        return None
    values = torch.cat(found)
    return variation_histogram(values, float(values.median()) if tau is None else tau)


def tokens_by_expert(
    loaded: LoadedModel, model: Any, found: Sequence[LayerRouting], layer: int
) -> tuple[str, str]:
    """The first words of the text, each with the experts that it runs in this layer (see
    network.js), and how evenly they are chosen. model: the converted one."""
    layer = min(layer, len(found) - 1)
    chosen, mlp = found[layer], mlp_modules(model)[layer]
    experts = chosen.chosen.shape[1]
    if not experts:
        return "", f"<p>Layer {layer} is kept dense: all of its neurons run for every token.</p>"
    if isinstance(mlp, InputMLP):
        return "", _inputs_read(mlp)
    if isinstance(mlp, LowRankMLP):
        return "", _directions_used(mlp)
    if int(chosen.favourite.max()) < 0:
        return "", (
            f"<p>Single neurons are chosen here, not experts: {chosen.counts.float().mean():.0f} "
            f"of {experts} run for a token, different ones each time.</p>"
        )
    ids = loaded.routing_ids[:SHOWN_TOKENS].tolist()
    spans = []
    for position, token in enumerate(ids):
        ran = chosen.chosen[position].nonzero()[:, 0] + chosen.shared
        cells = " ".join(map(str, [*range(chosen.shared), *ran.tolist()]))
        text = escape(loaded.tokenizer.decode([token], skip_special_tokens=True))
        if text:
            spans.append(f'<span data-cells="{cells}">{text}</span>')
    most = torch.bincount(chosen.favourite, minlength=experts)
    return (
        f'<div class="tokens" data-layer="{layer}">{"".join(spans)}</div>',
        f'<p class="note">Layer {layer}: {int((most > 0).sum())} of {experts} routed experts are '
        f"the favourite of some token; the most popular one is expert "
        f"{chosen.shared + int(most.argmax())}, of {100 * float(most.max() / most.sum()):.0f} % of "
        f"{len(chosen.favourite)} tokens.</p>",
    )


def _inputs_read(mlp: InputMLP) -> str:
    """What each matrix reads for a token, on average."""
    d_ff, d_model = mlp.down.shape
    active, first = mlp.active, " and ".join(mlp.by_columns)
    verb = "reads" if len(mlp.by_columns) == 1 else "read"
    up = f", up is computed for {active.opened:.0f} of {d_ff} neurons" if mlp.opens else ""
    return (
        f"<p>Inputs are chosen here, not experts: of each token {first} {verb} "
        f"{active.inputs:.0f} of {d_model} numbers{up}, and down reads {active.read:.0f} of {d_ff} "
        "neurons, different ones each time.</p>"
    )


def _directions_used(mlp: LowRankMLP) -> str:
    """What is left of each matrix."""
    parts = [
        f"{name} {f.kept} of {min(f.first.shape[1], f.second.shape[1])}"
        + ("" if f.kept == f.directions else f" ({f.directions} are computed to choose)")
        for name, f in mlp.projections.items()
    ]
    return f"<p>Directions of each matrix are used here, not experts: {joined(parts)}.</p>"
