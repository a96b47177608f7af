"""The script for real devices, tried on the stand-in."""

import pytest

from mlpmoe import ConversionSpec, UserError, named_text
from mlpmoe.measure.quality.encoding import encode_text
from tests.devices import matrix
from tests.devices.cases import calibration
from tests.devices.stand_in import another_device, moved
from tests.tiny import byte_tokenizer, tiny_model

SPECS = [
    ConversionSpec(branches=8, fade=0.9, keep=6),
    ConversionSpec(method="moefication", experts=8, active=0.5),
]


def side(model):
    text = encode_text(byte_tokenizer(), named_text("prose")[:2000])
    return matrix.Side(model, byte_tokenizer(), calibration(), matrix.beginning(text, 300))


def test_a_device_that_computes_the_same_is_not_off(capsys):
    with another_device() as device:
        sides = side(tiny_model()), side(moved(tiny_model(), device))
        assert list(matrix.matrix(*sides, SPECS, "float32")) == []
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.rpartition("s  ")[2] for line in lines] == [spec.to_flags() for spec in SPECS]
    assert all("+0.00%" in line or "-0.00%" in line for line in lines)
    assert sum(len(document) for document in sides[0].text.documents) <= 300


def test_what_fails_or_differs_is_named(monkeypatch, capsys):
    sides = side(tiny_model()), side(tiny_model(initializer_range=0.21))
    assert list(matrix.matrix(*sides, SPECS[:1], "float32")) == [SPECS[0].to_flags()]

    def refused(*_):
        raise UserError("no.")

    monkeypatch.setattr(matrix, "convert", refused)
    (said,) = matrix.matrix(*sides, SPECS[:1], "float32")
    assert said == f"{SPECS[0].to_flags()}: failed" and "no." in capsys.readouterr().err


@pytest.mark.parametrize(
    "figures, fits",
    [
        ((1.0, 1.0, 1.0), True),
        ((1.02, 0.85, 0.9), True),
        ((1.04, 1.0, 1.0), False),
        ((1.0, 1.3, 1.0), False),
        ((1.0, 1.0, 0.5), False),
        ((float("nan"), 1.0, 1.0), False),
    ],
)
def test_what_counts_as_rounding(figures, fits):
    assert matrix.Line(10.0, *figures, seconds=1.0).fits("bfloat16") is fits
