"""What a routed conversion does on a text, as figures: load, shared share, coloured words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch

from ..core.branched import BranchedMLP
from ..core.conversion import mlp_modules
from ..core.routed import RoutedMLP
from ..measure.routing import LayerRouting
from ..models import default_text
from .expert_plots import expert_load, shared_split, variation_histogram
from .loaded import LoadedModel

SHOWN_TOKENS = 160  # of the evaluation stories, coloured


def load_plot(found: Sequence[LayerRouting]) -> go.Figure:
    unrouted = all(int(layer.favourite.max()) < 0 for layer in found)
    single = unrouted and max(len(layer.load) for layer in found) > 128
    return expert_load([layer.load for layer in found], [layer.shared for layer in found], single)


def split_plot(model: Any, found: Sequence[LayerRouting]) -> go.Figure:
    """What runs in each layer: always, by routing, not."""
    mlps = mlp_modules(model)
    shared, routed = [], []
    for mlp, layer in zip(mlps, found, strict=True):
        if isinstance(mlp, BranchedMLP):  # spared
            shared.append(1.0)
            routed.append(0.0)
            continue
        always = mlp.shared if isinstance(mlp, RoutedMLP) else 0
        size = mlp.size if isinstance(mlp, RoutedMLP) else 1
        shared.append(always / mlp.d_ff)
        routed.append(float(layer.counts.float().mean()) * size / mlp.d_ff)
    idle = [max(0.0, 1 - s - r) for s, r in zip(shared, routed, strict=True)]
    return shared_split(shared, routed, idle)


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


def coloured_tokens(loaded: LoadedModel, found: Sequence[LayerRouting], layer: int) -> str:
    """The first tokens of the evaluation text, each on the colour of the expert that its router
    scored highest; a hint tells all experts that ran."""
    chosen = found[min(layer, len(found) - 1)]
    if not chosen.chosen.shape[1]:
        return "<p>In this layer all neurons run for every token.</p>"
    if int(chosen.favourite.max()) < 0:
        return (
            "<p>This method chooses single neurons, not experts: "
            f"{chosen.counts.float().mean():.0f} of {chosen.chosen.shape[1]} run for a token, "
            "different ones each time.</p>"
        )
    ids = story_ids(loaded)[:SHOWN_TOKENS].tolist()
    experts = chosen.chosen.shape[1]
    spans = []
    for position, token in enumerate(ids):
        favourite = int(chosen.favourite[position])
        ran = int(chosen.counts[position])
        hue = (favourite * 137.508) % 360  # the golden angle keeps neighbours apart
        text = loaded.tokenizer.decode([token])
        spans.append(
            f'<span style="--hue:{hue:.0f}" title="favourite: expert {favourite}; {ran} of '
            f'{experts} ran">{escape(text)}</span>'
        )
    most = torch.bincount(chosen.favourite, minlength=experts)
    return (
        f'<div class="tokens">{"".join(spans)}</div><p class="note">Layer {layer}: '
        f"{int((most > 0).sum())} of {experts} routed experts are the favourite of some token; "
        f"the most popular one is expert {int(most.argmax())}, of "
        f"{100 * float(most.max() / most.sum()):.0f} % of {len(chosen.favourite)} tokens.</p>"
    )


def story_ids(loaded: LoadedModel) -> torch.Tensor:
    """The evaluation stories, one after the other, as tokens."""
    return torch.cat(loaded.text(default_text(loaded.key)).documents)
