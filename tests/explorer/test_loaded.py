"""What fade removes, recounted from the weights of a direct conversion."""

from __future__ import annotations

import pytest
import torch

from mlpmoe import ConversionSpec, UserError, convert, parameter_report
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.server import loaded as loaded_module
from mlpmoe.explorer.server.asked import Calibrated, Conversion
from mlpmoe.explorer.server.loaded import SMALL_CONVERSIONS_HELD, LoadedModel
from mlpmoe.measure.words import joined
from mlpmoe.models import CALIBRATIONS, named_calibration, named_text
from tests.tiny import D_MODEL

SHARES = {  # of 8 branches, at fade 1.2
    "linear": [min(1.0, 1.2 * b / 8) for b in range(8)],
    "uniform": [1.2 * 3.5 / 8] * 8,
    "reverse": [min(1.0, 1.2 * b / 8) for b in reversed(range(8))],
}


TEXT = named_calibration("stories")[:12_000]  # quick, and enough for 48 neurons


def asked(spec: ConversionSpec) -> Conversion:
    return Calibrated(spec, TEXT) if spec.needs_calibration else spec


def direct(loaded: LoadedModel, spec: ConversionSpec) -> torch.nn.Module:
    """The conversion as the library makes it."""
    calibration = Calibration.from_text(loaded.tokenizer, TEXT)
    return convert(loaded.model, spec, calibration if spec.needs_calibration else None)


def matrices(model: torch.nn.Module, *names: str) -> list[torch.Tensor]:
    """Those of a converted model whose MLPs have these projections, wherever they lie."""
    return [
        weight
        for key, weight in model.state_dict().items()
        if any(f"mlp.{name}" in key and key.endswith("weight") for name in names)
    ]


def share_of_zeros(weights: list[torch.Tensor]) -> float:
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("projections", ["gate-up", "gate-up-down", "down"])
@pytest.mark.parametrize("schedule", SHARES)
@pytest.mark.parametrize("score", ["magnitude", "relative", "wanda", "sparsegpt"])
def test_zeros_of_every_score(tiny, score, schedule, projections):
    spec = ConversionSpec(
        branches=8, fade=1.2, keep=6, fade_schedule=schedule, fade_score=score,
        fade_projections=projections,
    )  # fmt: skip
    zeros = tiny.structure.zeros(asked(spec))
    names = projections.split("-")
    found = share_of_zeros(matrices(direct(tiny, spec), *(f"{name}_proj" for name in names)))
    assert zeros.realised == pytest.approx(found)
    share = sum(SHARES[schedule][:6]) / 6  # all branches have 6 neurons
    assert zeros.requested == pytest.approx(share)
    assert found == pytest.approx(share, abs=0.03)  # whole weights of small branches
    assert zeros.what.replace(" and ", ", ").split(", ") == names


@pytest.mark.parametrize("score", ["magnitude", "relative", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("unit", "share"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25)])
def test_zeros_of_patterns_are_exactly_those(tiny, unit, share, score):
    spec = ConversionSpec(fade_unit=unit, fade_score=score, fade_projections="gate-up-down")
    zeros = tiny.structure.zeros(asked(spec))
    weights = matrices(direct(tiny, spec), "gate_proj", "up_proj", "down_proj")
    assert zeros.requested == share == pytest.approx(share_of_zeros(weights))
    assert zeros.realised == pytest.approx(share)
    assert zeros.what == "gate, up and down"
    n, m = map(int, unit.split(":"))
    for weight in weights:
        assert ((weight.unflatten(1, (-1, m)) == 0).sum(2) == n).all()


@pytest.mark.parametrize("score", ["magnitude", "relative", "wanda", "sparsegpt"])
@pytest.mark.parametrize("keep", [None, 6, 5])
def test_zeros_of_neurons_are_counted_in_what_is_kept(tiny, score, keep):
    spec = ConversionSpec(branches=8, fade=1.2, keep=keep, fade_unit="neuron", fade_score=score)
    zeros = tiny.structure.zeros(asked(spec))
    stay = [round(6 * (1 - share)) for share in SHARES["linear"][: spec.kept]]
    model = direct(tiny, spec)
    for weight in matrices(model, "gate_proj", "up_proj"):
        assert tuple(weight.shape) == (sum(stay), D_MODEL)
    assert zeros.what == "neurons"
    assert zeros.realised == pytest.approx(1 - sum(stay) / (6 * spec.kept))
    assert zeros.requested == pytest.approx(sum(SHARES["linear"][: spec.kept]) / spec.kept)


def test_zeros_of_neurons_beside_an_allocation(uneven):
    """Layers keep different K, and lose different shares of it."""
    spec = ConversionSpec(
        branches=8, keep=5, fade=0.5, fade_unit="neuron", allocation="sensitivity"
    )
    model = direct(uneven, spec)
    counts = [len(layer.mlp.sizes) for layer in model.model.layers]
    assert len(set(counts)) == 2 and sum(counts) == 10
    left = sum(weight.shape[0] for weight in matrices(model, "gate_proj"))
    zeros = uneven.structure.zeros(asked(spec))
    assert zeros.realised == pytest.approx(1 - left / (6 * sum(counts)))


def test_a_model_without_gates_names_what_it_has(gateless):
    spec = ConversionSpec(branches=8, fade=1.2, fade_score="wanda")
    zeros = gateless.structure.zeros(asked(spec))
    assert zeros.what == "up"
    both = ConversionSpec(branches=8, fade=1.2, fade_projections="gate-up-down")
    assert gateless.structure.zeros(both).what == "up and down"
    with pytest.raises(UserError, match="no gate"):
        gateless.structure.zeros(ConversionSpec(fade=0.5, fade_projections="gate"))


def test_without_fade_nothing_is_zeroed(tiny):
    for spec in (
        ConversionSpec(keep=3),
        ConversionSpec(order="least-squares", keep=3, compensation="refit"),
        ConversionSpec(fade_unit="neuron", fade_score="wanda"),
    ):
        assert tiny.structure.zeros(asked(spec)) is None


def test_names_are_joined():
    assert [joined(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


# conversions that look at a text

LOOKING = [
    ConversionSpec(keep=12, order="least-squares", compensation="refit"),
    ConversionSpec(fade=0.9, fade_score="sparsegpt", fade_projections="gate-up-down"),
    ConversionSpec(keep=9, allocation="sensitivity"),
    ConversionSpec(fade=1.9, fade_unit="neuron", fade_score="wanda", allocation="sensitivity"),
    ConversionSpec(keep=6, order="activation", compensation="mean", progressive=True),
    ConversionSpec(branches=1, order="fluctuation"),
]


@pytest.mark.parametrize("spec", LOOKING, ids=ConversionSpec.to_query)
@pytest.mark.parametrize("model", ["tiny", "gateless", "one_layer", "uneven"])
def test_counts_from_memory_are_plain_counts(request, model, spec):
    loaded = request.getfixturevalue(model)
    counted = loaded.structure.report(asked(spec))
    assert counted == parameter_report(direct(loaded, spec))


def test_only_what_needs_it_is_calibrated(tiny):
    assert tiny.asked(ConversionSpec()) == ConversionSpec()
    for spec in LOOKING:
        assert tiny.asked(spec) == Calibrated(spec, named_calibration("prose"))
        assert tiny.asked(spec, "stories") == Calibrated(spec, named_calibration("stories"))
        assert len(repr(tiny.asked(spec))) < 1000  # the text is long


def test_our_calibration_text_is_not_what_is_measured_on():
    for name in CALIBRATIONS:
        lines = {line for line in named_calibration(name).splitlines() if len(line) > 60}
        assert lines and not lines & set(named_text(name).splitlines())


def test_converting_says_what_it_does_and_can_be_closed(demo):
    refitted = demo.asked(LOOKING[0])
    assert not demo.is_converted(refitted)
    steps = demo.convert(refitted)
    assert any(step.startswith("calibrating") for step in steps)  # looks no further than that
    steps.close()
    assert not demo.is_converted(refitted)
    steps = list(demo.convert(refitted))
    assert steps and all("%" in step or step == "waiting" for step in steps)
    assert demo.is_converted(refitted)
    assert list(demo.convert(refitted)) == []
    assert demo.converted(refitted) is demo.converted(refitted)


def test_a_text_is_looked_at_once(demo, monkeypatch):
    calls = []
    original = loaded_module.observe

    def observe(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(loaded_module, "observe", observe)
    for spec in LOOKING:
        demo.converted(asked(spec))
    assert len(calls) == 1
    monkeypatch.setattr(loaded_module, "OBSERVED_BYTES", 0)  # too large to be held
    other = Calibrated(LOOKING[0], TEXT + "\n")
    found, expected = demo.converted(other).state_dict(), direct(demo, LOOKING[0]).state_dict()
    assert len(calls) == 1
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_few_calibrated_conversions_are_held(demo):
    several = [asked(ConversionSpec(keep=k, compensation="mean")) for k in range(1, 10)]
    for one in several[: SMALL_CONVERSIONS_HELD + 1]:
        demo.converted(one)
    assert not demo.is_converted(several[0])
    assert demo.is_converted(several[SMALL_CONVERSIONS_HELD])


def test_another_text_is_another_conversion(demo):
    ours = asked(LOOKING[1])
    other = Calibrated(LOOKING[1], "A moth flew round the lamp, again and again. " * 60)
    assert ours != other
    first, second = (demo.converted(one).state_dict() for one in (ours, other))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    first, second = (list(demo.evaluate(one, "proxy"))[-1] for one in (ours, other))
    assert first.converted != second.converted
    assert first.dense == second.dense


def test_the_dense_model_is_never_changed(demo, weights_hash):
    before = weights_hash(demo.model)
    for spec in LOOKING:
        demo.structure.zeros(asked(spec))
        list(demo.evaluate(asked(spec), "proxy"))
    assert weights_hash(demo.model) == before
