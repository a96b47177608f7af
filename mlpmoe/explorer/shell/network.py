"""The network as a picture: layers from left to right, in each its branches or experts as cells.

Plain numbers go to the browser; `assets/network.js` draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from ...measure.quality.routing import LayerRouting
from ...models import assets_folder

MOST_GROUPS = 64  # cells of a layer in which single neurons are chosen
MANY = 128  # more than this, with no router: single neurons and no experts
KINDS = ("branches", "experts", "neurons")
# Constant, so that Gradio never touches what network.js makes of it.
TEMPLATE = """<section class="network" aria-labelledby="network-title">
<div class="network-head"><h2 id="network-title">The network</h2>
<span class="network-label"></span></div>
<div class="network-legend"></div>
<div class="network-plot"><canvas aria-hidden="true"></canvas>
<p class="network-empty">The layers of the model appear here once it is loaded.</p>
<div class="network-grid" role="grid"><div role="row">\
<div class="network-cell" role="gridcell" tabindex="0"></div></div></div>
<div class="network-hover"></div></div>
<div class="network-below"><p class="network-reading" aria-live="polite"></p>
<button type="button" class="network-spare"></button></div>
</section>"""


@dataclass(frozen=True)
class Column:
    """One layer."""

    left: list[float]  # per branch: share of the weights that stay; routed: of tokens that run it
    always: int = 0  # routed: how many leading cells always run (shared experts)
    spared: bool = False  # kept dense by the visitor


def network_value(
    kind: str,
    columns: Sequence[Column],
    looked: int,
    used: Sequence[Sequence[Sequence[int]]] | None = None,
    label: str = "",
) -> dict[str, Any]:
    """What the component shows.

    kind: "branches", "experts" or "neurons"; looked: the layer that is shown elsewhere on the page;
    used: per token and layer the cells, numbered as in `left`, which that token ran; label: said
    beside the title. A column without cells is a dense layer.

    Columns and use are text: Gradio compares values in the browser number by number, each time.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
    shown = [
        {"left": [_rounded(share) for share in c.left], "always": c.always, "spared": c.spared}
        for c in columns
    ]
    masks = [[_mask(cells) for cells in layers] for layers in used] if used is not None else None
    return {
        "kind": kind,
        "looked": looked,
        "label": label,
        "columns": json.dumps(shown, separators=(",", ":")),
        "used": json.dumps(masks, separators=(",", ":")) if masks is not None else "",
    }


def static_columns(left: Tensor, spared: Iterable[int] = ()) -> list[Column]:
    """Of branches; left: (layers, B), the share of each one's weights that stays, 0 to 1."""
    spared = set(spared)
    return [Column(row, spared=layer in spared) for layer, row in enumerate(left.tolist())]


def routed_columns(
    found: Sequence[LayerRouting | None], spared: Iterable[int] = ()
) -> tuple[str, list[Column]]:
    """The kind and the columns of a routed conversion. None: a layer without routing, which is
    dense. Single neurons are sorted by their load and averaged over groups."""
    spared = set(spared)
    routed = [layer for layer in found if layer is not None]
    single = bool(routed) and all(
        int(layer.favourite.max()) < 0 and len(layer.load) > MANY for layer in routed
    )
    columns = []
    for number, layer in enumerate(found):
        cells: list[float] = []
        always = 0
        if layer is not None:
            values = torch.cat([torch.ones(layer.shared), layer.load])
            always = 0 if single else layer.shared
            if single:
                groups = values.sort(descending=True).values.tensor_split(MOST_GROUPS)
                values = torch.stack([group.mean() for group in groups])
            cells = values.tolist()
        columns.append(Column(cells, always, number in spared))
    return "neurons" if single else "experts", columns


def cells_used(found: Sequence[LayerRouting | None]) -> list[list[list[int]]]:
    """Per token and layer the experts that ran, numbered as in the columns: shared ones come first.
    Not for single neurons, which share their cells."""
    tokens = next((len(layer.chosen) for layer in found if layer is not None), 0)
    return [
        [[] if layer is None else _ran(layer, token) for layer in found] for token in range(tokens)
    ]


def network_component() -> gr.HTML:
    """The picture. Its click carries {"action": "look", "layer": int, "cell": int | None} or
    {"action": "spare", "layer": int}."""
    return gr.HTML(
        None,
        html_template=TEMPLATE,
        js_on_load=(assets_folder() / "network.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="network",
    )


def _ran(layer: LayerRouting, token: int) -> list[int]:
    chosen = layer.chosen[token].nonzero().flatten() + layer.shared
    return [*range(layer.shared), *chosen.tolist()]


def _rounded(share: float) -> float:
    """Short to send; only nothing is 0 and only all of it is 1."""
    if share <= 0 or share >= 1:
        return min(max(share, 0), 1)
    return min(max(round(share, 4), 0.0001), 0.9999)


def _mask(cells: Iterable[int]) -> str:
    """A bit for each cell, in hexadecimal digits."""
    return f"{sum(1 << cell for cell in set(cells)):x}"
