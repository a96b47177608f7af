"""The order and arithmetic of timing; no test asks how fast anything is."""

import pytest

from mlpmoe.measure.cost import speed
from mlpmoe.measure.cost.speed import Ratio, decode, decode_speed, forward, ratio, time_in_turn
from tests.tiny import tiny_model


class Clock:
    """Stands still until somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "perf_counter", clock)
    return clock


def test_actions_take_turns_and_change_direction():
    order = []
    seconds = time_in_turn([lambda n=name: order.append(n) for name in "abc"], rounds=3)
    assert "".join(order) in ("cbaabccbaabc", "abccbaabccba")
    assert [len(times) for times in seconds] == [3, 3, 3]


def test_each_action_keeps_its_own_seconds_and_the_first_round_does_not_count(clock):
    def working(durations):
        remaining = iter(durations)

        def work():
            clock.now += next(remaining)

        return work

    first, second = time_in_turn([working([50, 1, 2, 3]), working([70, 10, 20, 30])], rounds=3)
    assert (first, second) == ([1, 2, 3], [10, 20, 30])


def test_ratio_is_taken_round_by_round():
    """Twice the time in every round, however the machine's speed drifts."""
    baseline = [1.0, 5.0, 2.0, 9.0, 3.0]
    assert ratio([2 * seconds for seconds in baseline], baseline) == Ratio(2.0, 2.0, 2.0)


def test_ratio_is_the_median_with_its_quartiles():
    measured = ratio([5.0, 1.0, 7.0, 3.0, 2.0, 6.0, 4.0], [1.0] * 7)
    assert measured == Ratio(median=4.0, low=2.0, high=6.0)


def test_rounds_must_belong_together():
    with pytest.raises(ValueError):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("low", "high", "measurable"),
    [(0.9, 1.1, False), (1.0, 1.2, False), (0.8, 0.99, True), (1.01, 1.1, True)],
)
def test_a_difference_is_measurable_where_one_lies_outside_the_quartiles(low, high, measurable):
    assert Ratio((low + high) / 2, low, high).measurable is measurable


def test_writing_speed(clock, monkeypatch):
    dense, converted = tiny_model(), tiny_model()

    def fake_decode(model, tokens, compiled=True):
        seconds = {dense: 2.0, converted: 1.6}[model] if compiled else 4.0
        clock.now += seconds * tokens

    monkeypatch.setattr(speed, "decode", fake_decode)
    monkeypatch.setattr(speed, "decodes", lambda model: True)
    monkeypatch.setattr(speed, "allowed", lambda: True)
    report = decode_speed(dense, converted, tokens=8, rounds=5)
    assert report.plain == pytest.approx(0.25)
    assert report.dense == pytest.approx(0.5)
    assert report.converted == pytest.approx(0.625)
    assert report.speedup.median == pytest.approx(1.25)
    assert report.speedup.measurable


def lengths_read(model, action):
    """How many tokens each pass through the model reads."""
    lengths = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    action(model)
    hook.remove()
    return lengths


def test_what_is_timed():
    model = tiny_model()
    assert lengths_read(model, lambda m: forward(m, 40)) == [40]
    assert lengths_read(model, lambda m: decode(m, 5, prompt=7)) == [7, 1, 1, 1, 1]
