"""Schedules move fade's zeros among the branches and leave their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.spec import MAX_EXPONENT, MAX_FADE
from mlpmoe.core.static.schedule import DEFAULT_EXPONENT, SCHEDULES, branch_sparsities

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
counts = st.integers(1, 300)
strengths = st.floats(0, MAX_FADE)
exponents = st.floats(1e-3, MAX_EXPONENT)


def mean(values):
    return sum(values) / len(values)


@given(branches=counts, strength=strengths)
def test_the_published_ramp_rises_in_equal_steps_from_zero_to_at_most_one(branches, strength):
    found = branch_sparsities(branches, strength)
    assert found == [min(1.0, strength * (i / branches)) for i in range(branches)]
    assert found == branch_sparsities(branches, strength, "linear")
    assert found[0] == 0
    assert found == sorted(found)


def test_published_setting_asks_for_27_of_64_of_gate_and_up():
    assert mean(branch_sparsities(16, 0.9)) == pytest.approx(27 / 64)
    expected = [0.05625 * i for i in range(16)]
    assert branch_sparsities(16, 0.9) == pytest.approx(expected, rel=1e-15)


@each_schedule
@given(branches=counts, strength=strengths, exponent=exponents)
def test_no_schedule_zeroes_more_or_less(schedule, branches, strength, exponent):
    found = branch_sparsities(branches, strength, schedule, exponent)
    assert len(found) == branches
    assert all(0 <= share <= 1 for share in found)
    asked = strength * (branches - 1) / 2 / branches
    if max(found) < 1:
        assert mean(found) == pytest.approx(asked, rel=1e-9, abs=1e-15)
    else:
        assert mean(found) <= asked * (1 + 1e-9)


@given(branches=counts, strength=strengths)
def test_power_one_is_linear(branches, strength):
    power = branch_sparsities(branches, strength, "power", 1.0)
    assert power == pytest.approx(branch_sparsities(branches, strength), rel=1e-12)


@given(branches=counts, strength=strengths)
def test_reverse_is_the_mirror_image(branches, strength):
    reverse = branch_sparsities(branches, strength, "reverse")
    assert reverse[::-1] == branch_sparsities(branches, strength)


@given(branches=counts, strength=strengths)
def test_uniform_has_one_value(branches, strength):
    assert len(set(branch_sparsities(branches, strength, "uniform"))) == 1


@given(branches=st.integers(2, 300), exponent=exponents)
def test_power_is_proportional_to_the_power_of_the_branch_number(branches, exponent):
    found = branch_sparsities(branches, 1e-3, "power", exponent)
    last = branches - 1
    expected = [found[last] * (i / last) ** exponent for i in range(branches)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_larger_exponents_spare_early_branches():
    mild, steep = (branch_sparsities(16, 0.5, "power", e) for e in (DEFAULT_EXPONENT, 4.0))
    assert steep[4] < mild[4] < branch_sparsities(16, 0.5)[4]
    assert steep[15] > mild[15] > branch_sparsities(16, 0.5)[15]


@each_schedule
def test_a_single_branch_and_no_strength_lose_nothing(schedule):
    assert branch_sparsities(1, 2.0, schedule) == [0]
    assert branch_sparsities(9, 0.0, schedule) == [0] * 9
