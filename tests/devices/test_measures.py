"""What is measured of a model on another device is what is measured of it here."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, is_dataclass
from math import isclose
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mlpmoe import ConversionSpec, convert, export, magnitudes, parameter_report, perplexity
from mlpmoe import write_side_by_side as write
from mlpmoe.checkpoints.check.verification import FreshProcess
from mlpmoe.checkpoints.forms.moe import MOE_FORMS
from mlpmoe.core.calibration import Calibration
from mlpmoe.measure.cost import speed
from mlpmoe.measure.cost.magnitudes import QUANTITIES, branch_sums
from mlpmoe.measure.quality.correlations import branch_statistics
from mlpmoe.measure.quality.drift import drift
from mlpmoe.measure.quality.encoding import encode_stream, encode_text
from mlpmoe.measure.quality.estimate import Losses, Plan, sharpen
from mlpmoe.measure.quality.head import token_losses
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.measure.quality.routing import routing
from mlpmoe.measure.quality.tokens import text_changes
from mlpmoe.measure.runs.deadline import Deadline
from mlpmoe.measure.runs.sweep import sweep
from mlpmoe.measure.runs.trials import prepare
from mlpmoe.models.texts import named_text
from tests.devices.stand_in import another_device, moved
from tests.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
TEXT, OTHER = named_text("prose")[:900], named_text("prose")[2000:9000]
IDS = torch.arange(40)
CALIBRATION = Calibration.from_text(TOKENIZER, OTHER, 1024, 32)
SPECS = {
    "static": ConversionSpec(branches=8, fade=0.6),
    "routed": ConversionSpec(method="cmoe", experts=8, active=0.5),
    "threshold": ConversionSpec(
        method="coactivation", experts=8, active=0.5, selection="threshold"
    ),
    "clusters": ConversionSpec(method="tokenclusters", experts=4, active=0.5),
    "experts": ConversionSpec(method="contiguous", experts=8, active=0.5),
}
FITTED = ConversionSpec(
    branches=8, keep=6, order="loss", compensation="refit", allocation="sensitivity"
)

FORMS = [
    ("static", "dense"),
    *((name, "branches") for name in ("static", "threshold", "clusters")),
    *(("experts", form) for form in MOE_FORMS),
]

Models = dict[str, PreTrainedModel]  # the converted ones, and "dense"


def written(models: Models) -> Iterator[list[list[int]]]:
    for name in SPECS:
        for temperature in (0.0, 0.7):
            pair = models["dense"], models[name]
            yield [w.tokens for w in list(write(pair, TOKENIZER, "Once", 8, temperature))[-1]]


def sharpened(models: Models) -> list[float]:
    def score(name: str) -> Callable:
        return lambda part: token_losses(models[name], part.ids, part.first)

    plan = Plan(models["dense"], encode_text(TOKENIZER, TEXT))
    looks = sharpen(plan, Losses(), Losses(), score("dense"), score("routed"))
    return [look.change.ratio for look in looks]


def tried(models: Models) -> list[float]:
    trials = prepare(models["dense"], TOKENIZER, OTHER, CALIBRATION, Deadline(1e6))
    specs = [FITTED, SPECS["routed"]]
    assert all(seconds > 0 for seconds in trials.forecast(specs, 2000, 1024))
    return [trials.run(spec, Deadline(1e6)).ratio for spec in specs]


def timed(models: Models) -> list[bool]:
    dense, routed = models["dense"], models["routed"]
    for model in (dense, routed):
        speed.forward(model, 8)
        speed.read(model, 8)
        speed.run_mlps(model, 8)
    return [speed.decode_speed(dense, routed, 2, 3).converted > 0]


MEASURES: dict[str, Callable[[Models], Any]] = {
    "perplexity": lambda m: [perplexity(m[name], TOKENIZER, TEXT).value for name in m],
    "stream": lambda m: measure(m["routed"], encode_stream(TOKENIZER, TEXT, 256)).value,
    "drift": lambda m: drift(m["dense"], m["routed"], IDS),
    "routing": lambda m: [routing(m[name], IDS) for name in list(SPECS)[1:]],
    "branches": lambda m: branch_statistics(m["static"], 1, IDS, 6),
    "tokens": lambda m: text_changes((m["dense"], m["routed"]), IDS.tolist(), 3, TOKENIZER),
    "parameters": lambda m: [parameter_report(m[name]) for name in m],
    "magnitudes": lambda m: [magnitudes(m["static"], 0, p) for p in ("gate", "up", "down")],
    "sums": lambda m: [branch_sums(m["static"], quantity) for quantity in QUANTITIES],
    "writing": lambda m: list(written(m)),
    "speed": timed,
    "estimate": sharpened,
    "sweep": lambda m: [
        run.ratio
        for run in sweep(m["dense"], encode_text(TOKENIZER, TEXT), [*SPECS.values()], CALIBRATION)
    ],
    "trials": tried,
}


def made(dense: PreTrainedModel) -> Models:
    return {"dense": dense} | {name: convert(dense, s, CALIBRATION) for name, s in SPECS.items()}


@pytest.fixture(scope="module")
def here() -> Models:
    return made(tiny_model())


@pytest.fixture
def there(here: Models) -> Iterator[Models]:
    with another_device() as device:
        yield made(moved(tiny_model(), device))


def plain(found: Any) -> list:
    """All numbers of it."""
    if isinstance(found, torch.Tensor):
        assert found.device.type == "cpu"  # what is measured can be shown
        return plain(found.tolist())
    if is_dataclass(found):
        return plain(astuple(found))
    if isinstance(found, dict):
        return plain(list(found.values()))
    if isinstance(found, list | tuple):
        return [each for some in found for each in plain(some)]
    return [found]


def agree(found: Any, expected: Any) -> None:
    found, expected = plain(found), plain(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        close = isinstance(other, float) and isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
        assert close or one == other


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_the_same_there(name, here, there):
    agree(MEASURES[name](there), MEASURES[name](here))


@pytest.mark.parametrize("which, form", FORMS)
def test_a_checkpoint_of_it_is_the_model(which, form, there, tmp_path, monkeypatch):
    """The other process has no such device, and computes on the CPU."""
    ask = FreshProcess.ask
    monkeypatch.setattr(
        FreshProcess,
        "ask",
        lambda self, folder, pieces, dtype, device, code: ask(
            self, folder, pieces, dtype, "cpu", code
        ),
    )
    found = export(
        there[which], tmp_path / "out", tokenizer=TOKENIZER, text=TEXT[:300], form=form
    ).verification
    assert found.passed and isclose(found.reloaded_perplexity, found.perplexity, rel_tol=1e-3)


def test_time_is_taken_when_the_device_is_done(there, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    speed.forward(there["dense"], 4)
    assert waited == [there["dense"].device]
