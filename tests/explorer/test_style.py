"""How numbers are written: the right value, few digits, a real minus, and never a crash."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.explorer.plots.style import DAMAGE
from mlpmoe.measure.notation import NBSP, change, count, number, signed_percent
from mlpmoe.models import assets_folder

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
finite = st.floats(-1e300, 1e300).filter(lambda value: value == 0 or abs(value) > 1e-300)
ordinary = st.floats(min_value=1e-12, max_value=1e12)
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}


def read(text: str) -> float:
    """The value that a written number states."""
    mantissa, _, exponent = text.replace(",", "").partition(" × 10")
    return float(mantissa) * 10.0 ** int(exponent.translate(SUPERSCRIPTS) or 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (4.5, "4.50"),
        (27.14, "27.1"),
        (-27.14, "-27.1"),
        (1034.4, "1,034"),
        (0.00123, "0.00123"),
        (0.000123, "1.23 × 10⁻⁴"),
        (21e6, "2.10 × 10⁷"),
        (-2e-12, "-2.00 × 10⁻¹²"),
        (math.inf, "∞"),
        (math.nan, "undefined"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@given(ordinary, st.booleans(), st.integers(1, 6))
def test_number_states_the_value_to_its_digits(value, negative, digits):
    value = -value if negative else value
    assert read(number(value, digits)) == pytest.approx(value, rel=0.5001 * 10 ** (1 - digits))


@given(finite)
def test_number_is_short_for_any_float(value):
    assert len(number(value)) <= len("-9.99 × 10⁻³⁰⁰")


@pytest.mark.parametrize(
    ("value", "text"), [(9.996, "10.0"), (0.9996, "1.00"), (99.96, "100"), (9.996e6, "1.00 × 10⁷")]
)
def test_number_keeps_its_digits_when_it_rounds_up(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (845, "845"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (5_639_424, "5.64 M"),
        (1_235_814_400, "1.24 B"),
        (405e9, "405 B"),
    ],
)
def test_count(value, text):
    assert count(value) == text.replace(" ", NBSP)


@given(st.integers(0, 10**12))
def test_count_states_the_value_to_three_digits(value):
    mantissa, _, unit = count(value).partition(NBSP)
    stated = read(mantissa) * UNITS.get(unit, 1)
    assert stated == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(("value", "text"), [(999_600, "1.00 M"), (999_999_999, "1.00 B")])
def test_count_changes_its_unit_when_it_rounds_up(value, text):
    assert count(value) == text.replace(" ", NBSP)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "±0.0 %"),
        (-0.0, "±0.0 %"),
        (0.0004, "±0.0 %"),
        (-0.0004, "±0.0 %"),
        (0.0006, "+0.1 %"),
        (-0.179, "−17.9 %"),
        (1, "+100.0 %"),
    ],
)
def test_signed_percent(share, text):
    assert signed_percent(share) == text.replace(" ", NBSP)


@given(st.floats(-1e6, 1e6))
def test_signed_percent_always_has_a_sign_and_a_unit(share):
    text = signed_percent(share)
    assert re.fullmatch(rf"[+−±]\d+\.\d{NBSP}%", text)
    assert float(re.sub("[−±]", "-", text[:-2])) == pytest.approx(100 * share, abs=0.051)


@pytest.mark.parametrize("share", [math.inf, 1e300])
def test_signed_percent_survives_what_has_no_size(share):
    assert signed_percent(share).startswith("+")


@pytest.mark.parametrize(
    ("ratio", "stderr", "text"),
    [
        (1.025, 0.004, "+2.5 % ± 0.4 %"),
        (0.98, 0.004, "−2.0 % ± 0.4 %"),
        (1, 0, "±0.0 %"),  # the same model
        (6.02, 0.1, "× 6.02 ± 0.10"),
        (60.23, 1.234, "× 60.2 ± 1.2"),
        (60_230, 120, "× 60,230 ± 120"),
    ],
)
def test_change(ratio, stderr, text):
    assert change(ratio, stderr).replace(NBSP, " ") == text


@pytest.mark.parametrize(("ratio", "text"), [(math.inf, "× ∞"), (3e7, "× 3.00 × 10⁷")])
def test_change_beyond_any_use_leaves_its_error_out(ratio, text):
    assert change(ratio, math.nan) == text


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_change_states_the_ratio(ratio, stderr):
    text = change(ratio, stderr).replace(NBSP, " ")
    if text.startswith("× "):
        assert read(text[2:].partition(" ±")[0]) == pytest.approx(ratio, rel=0.00501)
    else:
        percent = float(re.sub("[−±]", "-", text.partition(" %")[0]))
        assert 1 + abs(percent) / 100 * math.copysign(1, ratio - 1) == pytest.approx(
            ratio, abs=0.00051
        )


def test_damage_darkens_all_the_way():
    """So that it can be read without seeing its colour."""

    def brightness(colour):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    levels = [brightness(colour) for colour in DAMAGE]
    assert all(a - b > 10 for a, b in pairwise(levels))


def test_no_selector_has_a_comma_within_brackets():
    """Gradio cuts selectors at every comma and puts its prefix before each part."""
    for file in assets_folder().glob("*.css"):
        style = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        selectors = re.findall(r"([^{};]+)\{", style)
        assert selectors, file.name
        for selector in selectors:
            if not selector.strip().startswith("@"):
                assert not re.search(r"\([^()]*,", selector), f"{file.name}: {selector.strip()}"
