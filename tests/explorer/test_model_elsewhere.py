"""The page shows of a model on another device what it shows of the same model here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlpmoe import ConversionSpec
from mlpmoe.core.conversion import mlp_modules
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.tabs.expert_figures import split_plot, tokens_by_expert, variation_plot
from mlpmoe.explorer.tabs.lesson_steps import STEPS, feedback, read_layers
from mlpmoe.explorer.tabs.weights import histograms
from tests.devices.stand_in import another_device, moved
from tests.tiny import tiny_model

LAYER = 1
ROUNDING = r"\d\.\d × 10⁻⁷"  # how far sums in another order are apart
STATIC = (ConversionSpec(branches=8, fade=0.9), ConversionSpec(branches=8, keep=6, order="loss"))
ROUTED = [
    ConversionSpec(method="expertweaver", experts=8, active=0.5),
    ConversionSpec(method="tokenclusters", experts=4, active=0.5),
    ConversionSpec(method="inputs", active=0.5),
    ConversionSpec(method="lowrank", active=0.5),
]


@pytest.fixture
def pair(tiny: LoadedModel) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    """The tiny model here, and there."""
    here = LoadedModel("tiny", "Tiny", tiny.checked, tiny_model(), tiny.tokenizer)
    with another_device() as device:
        model = moved(tiny_model(), device)
        yield here, LoadedModel("tiny", "Tiny", tiny.checked, model, tiny.tokenizer)


def rounded(found: Any) -> Any:
    """Tensors as lists of numbers, to four digits."""
    if isinstance(found, torch.Tensor):
        assert found.device.type == "cpu"
        found = found.tolist()
    if isinstance(found, list | tuple):
        return [rounded(each) for each in found]
    return pytest.approx(found, rel=1e-3, abs=1e-4) if isinstance(found, float) else found


def alike(text: str) -> str:
    return re.sub(ROUNDING, "little", text)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_a_step_of_the_lesson_says_the_same(pair, step):
    readings = [read_layers(loaded)[LAYER] for loaded in pair]
    here, there = (step.view(each, step.control["value"], True) for each in readings)
    assert alike(here.numbers) == alike(there.numbers)
    for answer in range(3):
        said = [feedback(step, reading, answer) for reading in readings]
        assert alike(said[0]) == alike(said[1])


@pytest.mark.parametrize("spec", STATIC, ids=ConversionSpec.to_query)
def test_the_structure_is_counted_alike(pair, spec):
    here, there = (each.structure for each in pair)
    asked = pair[0].asked(spec)
    assert rounded(here.left(asked)) == rounded(there.left(asked))
    assert here.report(asked) == there.report(asked) and here.zeros(asked) == there.zeros(asked)
    figures = [histograms(loaded, asked, LAYER, "gate").to_json() for loaded in pair]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("spec", ROUTED, ids=ConversionSpec.to_query)
def test_experts_are_shown_alike(pair, spec):
    shown = []
    for loaded in pair:
        asked = loaded.asked(spec)
        converted, found = loaded.converted(asked), loaded.routing(asked)
        assert len(mlp_modules(converted)) == len(found)
        varied = variation_plot(converted, spec.tau) is not None
        words = tokens_by_expert(loaded, converted, found, LAYER)
        shown.append([split_plot(converted, found).to_json(), str(words), varied])
    assert shown[0] == shown[1]
