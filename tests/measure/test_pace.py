"""How long a sweep takes, by a clock that the test turns."""

from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.encoding import EncodedText
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.measure.runs import pace as pace_module
from mlpmoe.measure.runs.pace import Pace, about, forecast
from tests.tiny import VOCABULARY, tiny_model


def test_the_time_left_is_the_mean_of_the_runs_so_far():
    now = [100.0]
    pace = Pace(4, lambda: now[0])
    assert str(pace) == "0 of 4 measured"
    now[0] += 30
    pace.count()
    assert str(pace) == "1 of 4 measured, about 90 s left"
    now[0] += 10
    pace.count()
    assert str(pace) == "2 of 4 measured, about 40 s left"
    pace.count()
    pace.count()
    assert str(pace) == "4 of 4 measured"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "about 1 s"), (99.4, "about 99 s"), (100, "about 2 min"), (5999, "about 100 min"),
     (6000, "about 1.7 h"), (1e6, "about 277.8 h")],
)  # fmt: skip
def test_rough_times(seconds, words):
    assert about(seconds) == words


class Counter:
    """A model that counts the tokens it is given, with a clock that one second passes on per
    token."""

    def __init__(self):
        self.model, self.tokens = tiny_model(), 0
        self.model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.tokens += (args[0] if args else kwargs["input_ids"]).numel()


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 16), (200, 100)])
def test_the_forecast_counts_forward_passes(monkeypatch, window, stride):
    counter = Counter()
    generator = torch.Generator().manual_seed(0)
    documents = tuple(torch.randint(1, VOCABULARY, (n,), generator=generator) for n in (5, 90, 33))
    text = EncodedText(documents, documents)
    measure(counter.model, text)  # what is learnt of a class of models once is no part of it
    counter.tokens = 0
    measure(counter.model, text, window, stride)
    each = counter.tokens  # of one evaluation, overlaps included
    monkeypatch.setattr(pace_module, "perf_counter", lambda: float(counter.tokens))
    calibration = Calibration(torch.ones(8, 64, dtype=torch.int64))

    def seconds(specs, given=calibration):
        before = counter.tokens
        found = forecast(counter.model, text, specs, given, window, stride, 4)
        assert counter.tokens - before <= window  # a single pass was timed
        return found

    plain = [ConversionSpec(branches=b) for b in range(1, 6)]
    fitted = [ConversionSpec(branches=b, keep=1, compensation="mean") for b in range(2, 7)]
    alone = ConversionSpec(keep=8, compensation="refit", progressive=True)
    assert seconds([]) == 0
    assert seconds(plain, None) == pytest.approx(6 * each)
    assert seconds(plain) == pytest.approx(6 * each)
    assert seconds(fitted) == pytest.approx(6 * each + 2 * 8 * 64)
    assert seconds([*fitted, alone]) == pytest.approx(7 * each + 3 * 8 * 64)
    # trained: of both models and backwards, 512 tokens a step; nine looks at one sample of eight
    training = 4 * 200 * 512 + 9 * 2 * 64
    trained = ConversionSpec(keep=8, recover="alpha")
    assert seconds([trained]) == pytest.approx(2 * each + training)
    few = ConversionSpec(keep=8, recover="alpha", recover_steps=3)
    assert seconds([few]) == pytest.approx(2 * each + 4 * 3 * 512 + 4 * 2 * 64)
    both = replace(fitted[0], recover="all")  # a pass of its own
    assert seconds([*fitted, both]) == pytest.approx(7 * each + 3 * 8 * 64 + training)
    assert seconds([ConversionSpec(recover="all")]) == pytest.approx(2 * each)  # nothing is lost
