"""A spec in other words: true numbers for programs, and a name for known recipes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlpmoe import PRESETS, ConversionSpec, convert, parameter_report
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.shell.preview import preset_name, summary
from mlpmoe.models import named_calibration

SPECS = [
    ConversionSpec(),
    ConversionSpec(branches=1),
    ConversionSpec(branches=48, fade=2.0),
    ConversionSpec(branches=5, fade=0.9, keep=1),
    ConversionSpec(branches=7, keep=3, compensation="none"),
    ConversionSpec(method="neurons", active=0.5),
    ConversionSpec(method="inputs", active=0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=ConversionSpec.to_query)
def test_summary(tiny, spec):
    values = summary(tiny, spec)
    dense, converted = (
        parameter_report(model) for model in (tiny.model, convert(tiny.model, spec))
    )
    assert values["spec"] == spec.to_dict()
    assert values["parameters"] == {"dense": dense.total, "converted": converted.total}
    assert values["nonzero"] == {"dense": dense.nonzero, "converted": converted.nonzero}
    assert values["mlp_nonzero"] == {
        "dense": dense.mlp_nonzero,
        "converted": converted.mlp_nonzero,
    }
    assert values["macs_per_token"]["converted"] == converted.macs_per_token
    if spec.fade:
        faded = values["faded"]
        assert faded["what"] == "gate and up"
        assert 0 <= faded["requested"] <= faded["realised"] + 0.01 <= 1.01
    else:
        assert values["faded"] is None
    json.dumps(values)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recognised(name):
    assert preset_name(PRESETS[name]) == name


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_recognised_by_what_it_does(name):
    """K = B is the same as all, and compensation says nothing then, unless it makes up for fade."""
    spec = replace(PRESETS[name], keep=PRESETS[name].kept)
    assert preset_name(spec) == name
    if spec.kept == spec.branches:
        fitted = spec.compensation == "refit"
        assert preset_name(replace(spec, compensation="none")) == (None if fitted else name)
        assert preset_name(replace(spec, compensation="ratio")) == (None if fitted else name)


def test_other_specs_are_no_preset():
    assert preset_name(ConversionSpec(branches=15)) is None
    assert preset_name(ConversionSpec(fade=0.85)) is None
    assert preset_name(ConversionSpec(fade=0.9, keep=11)) is None


CALIBRATED = [
    ConversionSpec(keep=12, order="least-squares", compensation="refit"),
    ConversionSpec(fade=0.6, fade_score="sparsegpt", fade_projections="gate-up-down"),
    ConversionSpec(branches=8, keep=5, allocation="sensitivity"),
    ConversionSpec(
        branches=8, keep=5, fade=0.8, fade_unit="neuron", fade_score="wanda",
        allocation="sensitivity",
    ),
    ConversionSpec(method="cmoe", experts=8, active=0.5),
]  # fmt: skip


@pytest.mark.parametrize("spec", CALIBRATED, ids=ConversionSpec.to_query)
def test_summary_of_a_calibrated_conversion(uneven, spec):
    values = summary(uneven, uneven.asked(spec))
    calibration = Calibration.from_text(uneven.tokenizer, named_calibration("stories"))
    report = parameter_report(convert(uneven.model, spec, calibration))
    assert values["spec"] == spec.to_dict()
    assert values["parameters"]["converted"] == report.total
    assert values["nonzero"]["converted"] == report.nonzero
    assert values["macs_per_token"]["converted"] == report.macs_per_token
    assert (values["faded"] is None) == (not spec.fades)
    assert "text" not in json.dumps(values)  # the calibration's would be long
