"""Schedules move fade's zeros among the branches and leave their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.core.errors import SpecError
from mlpmoe.core.spec import MAX_EXPONENT, MAX_FADE
from mlpmoe.core.static.schedule import (
    DEFAULT_EXPONENT,
    SCHEDULES,
    branch_sparsities,
    strength_for,
)

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
    if (schedule, branches) == ("uniform", 1):  # the limit of many branches
        asked = strength / 2
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
def test_a_single_branch_loses_nothing_unless_evenly_and_none_does_without_strength(schedule):
    assert branch_sparsities(1, 2.0, schedule) == [1.0 if schedule == "uniform" else 0]
    assert branch_sparsities(9, 0.0, schedule) == [0] * 9
    assert branch_sparsities(1, 0.0, schedule) == [0]


@given(strength=strengths)
def test_a_single_branch_fades_evenly_as_each_of_many(strength):
    (alone,) = branch_sparsities(1, strength, "uniform")
    assert alone == strength / 2
    assert alone == pytest.approx(branch_sparsities(10**5, strength, "uniform")[0], abs=2e-5)


def test_28_percent_of_the_weights_without_branches():
    assert branch_sparsities(1, 0.5625, "uniform") == [0.28125] == [9 / 32]


# The strength that zeroes a given share ----------------------------------------------------


@each_schedule
@given(branches=counts, strength=strengths, exponent=exponents, data=st.data())
def test_the_strength_of_a_share_zeroes_that_share(schedule, branches, strength, exponent, data):
    """Whether branches have lost all or not."""
    kept = data.draw(st.none() | st.integers(1, branches))
    asked = mean(branch_sparsities(branches, strength, schedule, exponent)[:kept])
    found = strength_for(asked, branches, schedule, exponent, kept)
    assert 0 <= found <= MAX_FADE
    again = branch_sparsities(branches, found, schedule, exponent)[:kept]
    assert mean(again) == pytest.approx(asked, abs=1e-12)


@each_schedule
@given(branches=counts, share=st.floats(0, 1), exponent=exponents)
def test_a_share_is_reached_or_the_largest_is_named(schedule, branches, share, exponent):
    most = mean(branch_sparsities(branches, MAX_FADE, schedule, exponent))
    try:
        found = strength_for(share, branches, schedule, exponent)
    except SpecError as refused:
        assert share > most
        assert f"{most:.6g} of the weights in {branches} branch" in str(refused)
    else:
        reached = mean(branch_sparsities(branches, found, schedule, exponent))
        assert reached == pytest.approx(share, abs=1e-12)
        assert found == 0 or share > 0


@pytest.mark.parametrize(
    ("share", "branches", "schedule", "strength"),
    [
        (27 / 64, 16, "linear", 0.9),  # as published
        (9 / 32, 16, "uniform", 0.6),
        (9 / 32, 1, "uniform", 0.5625),
        (0.5, 1, "uniform", 1.0),
        (0.5, 2, "uniform", 2.0),
        (0.25, 2, "reverse", 1.0),
        (0.55, 4, "linear", 1.6),  # 0, 0.4, 0.8 and 1, which 1.2 is cut to
        (0.625, 4, "linear", 2.0),  # 0, 0.5, 1 and 1
    ],
)
def test_strengths_by_hand(share, branches, schedule, strength):
    assert strength_for(share, branches, schedule) == pytest.approx(strength, rel=1e-14)


def test_branches_that_stay_count():
    """Of shares 0, s/4, s/2, 3s/4 the first two have the mean s/8."""
    assert strength_for(0.2, 4, kept=2) == pytest.approx(1.6, rel=1e-15)
    with pytest.raises(SpecError, match=r"at most 0\.25 of the weights in the first 2 of 4"):
        strength_for(0.26, 4, kept=2)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.5", None, True], ids=repr)
def test_a_share_lies_between_none_and_all(share):
    with pytest.raises(SpecError, match="sparsity must be a number between 0 and 1"):
        strength_for(share, 16)


def test_a_ramp_of_one_branch_reaches_nothing():
    assert strength_for(0, 1) == 0
    with pytest.raises(SpecError, match=r"linear fade zeroes at most 0 of the weights in 1 branch"):
        strength_for(0.1, 1)
