"""What happens on the tab Weights: the branches of a layer, or what its experts do on a text."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..plots.ridges import branch_histograms
from ..server.asked import spec_of
from ..server.loaded import LoadedModel
from ..server.workbench import Workbench
from ..shell.settings import parted, read_asked
from .expert_figures import split_plot, tokens_by_expert, variation_plot

SHOWN = 7  # outputs of `show`
HISTOGRAM_BINS = 60
HISTOGRAM_REACH = 4.0  # the axis ends at this many root mean squares of the weights


class WeightsHandlers:
    """The events of the tab over one workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def show(self, model: str, *values: Any) -> tuple:
        """The view of static conversions with its histograms, or that of routed ones with split,
        variation and words; left alone while nothing is made yet."""
        settings, (layer, projection) = parted(values)
        loaded = self.workbench.loaded(model)
        asked = read_asked(loaded, settings)
        routed = bool(spec_of(asked).routed)
        views = gr.update(visible=not routed), gr.update(visible=routed)
        if not loaded.is_converted(asked):
            return *views, *(gr.skip(),) * (SHOWN - 2)
        if not routed:
            figure = histograms(loaded, asked, layer, projection)
            return views[0], figure, views[1], *(gr.skip(),) * (SHOWN - 3)
        converted, found = loaded.converted(asked), loaded.routing(asked)
        varied = variation_plot(converted, spec_of(asked).tau)
        return (
            views[0], gr.skip(), views[1], split_plot(converted, found),
            gr.update(value=varied, visible=varied is not None),
            *tokens_by_expert(loaded, converted, found, layer),
        )  # fmt: skip

    def another_model(self, model: str) -> tuple:
        """Layer and projection."""
        return layer_and_projection(self.workbench.loaded(model))


def layer_and_projection(loaded: LoadedModel) -> tuple:
    """What the choices of a layer and of a projection offer for a model; its first ones."""
    return (
        gr.update(maximum=max(1, len(loaded.mlps) - 1), value=0),
        gr.update(choices=loaded.projections, value=loaded.projections[0]),
    )


def histograms(loaded: LoadedModel, asked: Any, layer: int, projection: str) -> Any:
    """Branch histograms before and after, on the same bins."""
    layer = min(int(layer), len(loaded.mlps) - 1)
    if projection not in loaded.projections:  # of the model before
        projection = loaded.projections[0]
    weight = getattr(loaded.mlps[layer].weights, projection).detach().float()
    upper = HISTOGRAM_REACH * float(weight.square().mean()) ** 0.5 or 1.0
    dense, converted = (
        loaded.structure.histogram(each, layer, projection, HISTOGRAM_BINS, upper)
        for each in (loaded.structure.whole(asked), asked)
    )
    return branch_histograms(dense, converted, layer, projection, spec_of(asked).fades)
