"""Trials against a clock that the test turns: nothing is begun for which there is no time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlpmoe.core.calibration import DOCUMENT_SEPARATOR, Calibration
from mlpmoe.core.conversion import convert_all, convert_mlp
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.stopping import may_stop
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.measure.runs import trials as module
from mlpmoe.measure.runs.deadline import Deadline, TimeUp
from mlpmoe.measure.runs.trials import (
    LEAST_CALIBRATION,
    LEAST_SCORING,
    SCORING_TOKENS,
    SEARCH_TOKENS,
    TooSlow,
    Trials,
    prepare,
    scoring_text,
)
from tests.tiny import LAYERS, VOCABULARY, byte_tokenizer, tiny_model

TEXT = "A heron stood in the reeds.\n<|endoftext|>\nNobody had told the frogs, so they sang on."
FITTED = ConversionSpec(keep=12, order="least-squares", compensation="refit")
FLAP = ConversionSpec(keep=12, order="fluctuation", compensation="mean")


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="module")
def text():
    return encode_text(byte_tokenizer(), TEXT)


@pytest.fixture(scope="module")
def seen():
    generator = torch.Generator().manual_seed(2)
    return Calibration(torch.randint(1, VOCABULARY, (40, 128), generator=generator))


# The clock ---------------------------------------------------------------------------------


def test_a_deadline(clock):
    deadline = Deadline(30, clock)
    clock.now += 10
    assert deadline.left == 20
    deadline.check()
    part = deadline.share(4)
    assert part.left == 5
    clock.now += 5
    with pytest.raises(TimeUp):
        part.check()
    deadline.check()
    clock.now += 16
    assert deadline.left < 0
    with pytest.raises(TimeUp):
        deadline.check()
    Deadline(clock=clock).check()


# Before the search -------------------------------------------------------------------------


def slow_model(clock: Clock, tokens_per_second: float):
    """A model for which time passes with the tokens that it reads, in whatever copy."""
    model = tiny_model(max_position_embeddings=4096)

    def read(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        clock.now += ids.numel() / tokens_per_second

    model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    measure(model, encode_text(byte_tokenizer(), TEXT))  # what is learnt once is learnt before
    clock.now = 1000.0
    return model


STORIES = DOCUMENT_SEPARATOR.join(f"{n:03d}" + 97 * "x" for n in range(60))  # of 100 tokens


@pytest.mark.parametrize(
    ("speed", "seconds", "scored", "calibrated"),
    [
        (1e6, 20, SCORING_TOKENS, SEARCH_TOKENS),
        (800, 20, 20 * 800 / 16, 19 * 800 / 4),
        (200, 20, LEAST_SCORING, LEAST_CALIBRATION),
        (200, 200, SCORING_TOKENS, SEARCH_TOKENS),
        (80, 20, LEAST_SCORING, None),  # looking at 1,024 tokens takes most of what is left
    ],
)
def test_texts_are_as_long_as_the_speed_allows(clock, seen, speed, seconds, scored, calibrated):
    model, told, began = slow_model(clock, speed), [], clock.now
    trials = prepare(
        model, byte_tokenizer(), STORIES, seen, Deadline(seconds, clock),
        lambda *given: told.append(given[0]),
    )  # fmt: skip
    assert scored - 1 <= trials.tokens <= scored + 100  # whole documents of 100
    assert f"by {trials.tokens:,} tokens" in told
    read = sum(map(len, trials.text.documents))
    assert trials.seconds == pytest.approx(read / speed, abs=2 * module.MOMENT)
    assert trials.dense.value == pytest.approx(measure(model, trials.text).value)
    ends = encode_text(byte_tokenizer(), STORIES).documents[-21:]
    for document, expected in zip(trials.text.documents, ends, strict=False):
        assert torch.equal(document, expected)
    if calibrated is None:
        assert trials.calibration is None
    else:
        samples = trials.calibration.calibration.samples
        assert samples.numel() == pytest.approx(calibrated, rel=0.1)
        assert torch.equal(samples, seen.samples[: len(samples)])
    assert clock.now - began < seconds / 2 + 2 * trials.seconds


def test_a_model_that_cannot_even_be_measured_is_out_of_time(clock, seen):
    with pytest.raises(TimeUp):
        prepare(slow_model(clock, 20), byte_tokenizer(), STORIES, seen, Deadline(20, clock))


# A trial -----------------------------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch, clock):
    """Converts with a time for each layer, given by the parts of a spec that are long; and says
    of which layers it has begun."""
    begun, times = [], {}

    def convert(model, specs, calibration, on_progress):
        (spec,) = specs
        for layer in range(LAYERS):
            on_progress("calibrating", layer / LAYERS)
            begun.append((spec, layer))
            for _ in range(10):
                clock.now += times.get(spec.order, 0.0) / 10
                on_progress("calibrating", layer / LAYERS)
                may_stop()
        return convert_all(model, specs, calibration)

    monkeypatch.setattr(module, "convert_all", convert)
    return begun, times


def test_what_the_first_layer_shows_to_take_too_long_is_given_up(clock, layers, text, seen):
    begun, times = layers
    times["least-squares"] = 40.0
    trials = Trials(tiny_model(), text, seen, clock)
    deadline = Deadline(60, clock)
    with pytest.raises(TooSlow) as slow:
        trials.run(FITTED, deadline)
    assert begun == [(FITTED, 0)]
    assert clock.now == 1000.0 + 32  # four fifths of a layer, so two take more than 60 s
    assert slow.value.seconds == pytest.approx(64)
    # neither the same again nor with more beside it is begun, what takes less is
    for spec in (FITTED, replace(FITTED, fade=0.5), replace(FITTED, branches=32, keep=20)):
        with pytest.raises(TooSlow):
            trials.run(spec, deadline)
    assert len(begun) == 1
    assert trials.run(FLAP, deadline).spec == FLAP
    assert trials.run(replace(FITTED, order="norm"), deadline).ratio > 0
    assert set(trials.known) == {FLAP, replace(FITTED, order="norm")}


def test_what_took_longer_than_is_left_is_not_begun_again(clock, layers, text, seen):
    begun, times = layers
    times["least-squares"] = 10.0
    trials = Trials(tiny_model(), text, seen, clock)
    trials.run(FITTED, Deadline(100, clock))
    again = replace(FITTED, keep=10)
    with pytest.raises(TooSlow) as slow:
        trials.run(again, Deadline(19, clock))
    assert slow.value.seconds == pytest.approx(20)
    assert {spec for spec, _ in begun} == {FITTED}
    assert trials.run(again, Deadline(21, clock)).spec == again


def test_the_time_of_measuring_counts_too(clock, layers, text):
    trials = Trials(tiny_model(), text, clock=clock)
    trials.seconds = 5.0
    for seconds in (4, 5):
        with pytest.raises(TooSlow):
            trials.run(ConversionSpec(keep=12), Deadline(seconds, clock))
    assert layers[0] == []
    run = trials.run(ConversionSpec(keep=12), Deadline(6, clock))
    assert trials.run(ConversionSpec(keep=12), Deadline(0, clock)) is run  # known already


def test_the_end_of_the_time_ends_a_trial(clock, text, monkeypatch):
    """A model that is slower once it is converted, which nobody could know."""
    trials = Trials(tiny_model(), text, clock=clock)

    def measured(*given):
        for _ in range(10):
            clock.now += 5
            may_stop()
        return measure(*given)

    monkeypatch.setattr(module, "measure", measured)
    began = clock.now
    with pytest.raises(TimeUp):
        trials.run(ConversionSpec(keep=12), Deadline(12, clock))
    assert clock.now - began == 15
    assert trials.known == {}


# A forecast --------------------------------------------------------------------------------


@pytest.fixture
def forecasting(clock, seen, monkeypatch):
    """Trials at 100 tokens a second, where a layer takes 1 ms for each token it is looked at on,
    and sharing out among layers 2 ms; and what was converted for it."""
    looked = []

    def converting(weights, spec, layer):
        looked.append((spec, layer))
        clock.now += 0.001 * (layer.tokens if layer else 0)
        return convert_mlp(weights, spec, layer)

    def shared_out(spec, layer):
        clock.now += 0.002 * layer.tokens

    monkeypatch.setattr(module, "convert_mlp", converting)
    monkeypatch.setattr(module, "cost_curve", shared_out)
    model = slow_model(clock, 100)
    trials = prepare(model, byte_tokenizer(), STORIES, seen, Deadline(200, clock))
    assert trials.seconds_per_token == pytest.approx(0.01, rel=0.05)
    return trials, looked


def test_a_forecast_is_the_sum_of_passes_and_layers(forecasting):
    trials, looked = forecasting
    each = trials.seconds_per_token
    specs = [
        ConversionSpec(keep=12),
        FLAP,
        replace(FLAP, keep=10, allocation="sensitivity"),
        replace(FLAP, progressive=True),
    ]
    found = trials.forecast(specs, 500, 2000)
    tokens = 16 * 128  # whole samples
    expected = [
        2 * 500 * each,  # the dense model's as well
        500 * each + 2000 * each + LAYERS * 0.001 * tokens,  # the pass over the text that all use
        500 * each + 3 * 2000 * each + LAYERS * 0.003 * tokens,  # a pass with gradients
        500 * each + 4 * 2000 * each + LAYERS * 0.001 * tokens,  # four of its own
    ]
    assert found == pytest.approx(expected, rel=1e-6)
    # of a layer that nobody has looked at, so that nothing is known of it already
    assert [spec for spec, _ in looked] == specs
    assert len({id(layer) for _, layer in looked}) == len(specs)
    again = trials.forecast(specs, 500, 2000, dense=False)
    assert again == pytest.approx([expected[0] / 2, *expected[1:]], rel=1e-6)


# The text of the search --------------------------------------------------------------------


def story(number, length):
    return f"{number:02d}" + "x" * (length - 2)


@pytest.mark.parametrize(("wanted", "count"), [(50, 1), (51, 2), (99, 2), (100, 3)])
def test_the_search_goes_by_the_last_documents(monkeypatch, wanted, count):
    monkeypatch.setattr(module, "SCORING_TOKENS", wanted)
    stories = [story(number, length) for number, length in enumerate((40, 30, 49, 50))]
    separator = f"\n{DOCUMENT_SEPARATOR}\n"
    text = separator.join([*stories, " ", ""])
    found = scoring_text(byte_tokenizer(), text)
    expected = encode_text(byte_tokenizer(), separator.join(stories[-count:]))
    assert [d.tolist() for d in found.documents] == [d.tolist() for d in expected.documents]
    assert [s.tolist() for s in found.sizes] == [s.tolist() for s in expected.sizes]


def test_of_a_long_document_the_end_is_taken_in_pieces():
    """A file without documents is one, of whatever length."""
    text = "".join(f"{number:04d}" for number in range(3000))
    found = scoring_text(byte_tokenizer(), text)
    ends = [text[-2048:-1536], text[-1536:-1024], text[-1024:-512], text[-512:]]
    assert [byte_tokenizer().decode(d[1:]) for d in found.documents] == ends
    assert {len(document) for document in found.documents} == {LEAST_SCORING + 1}


def test_a_short_text_is_taken_whole():
    found = scoring_text(byte_tokenizer(), TEXT)
    expected = encode_text(byte_tokenizer(), TEXT)
    assert [d.tolist() for d in found.documents] == [d.tolist() for d in expected.documents]
    assert len(found.documents) == 2


@pytest.mark.parametrize("text", ["", " \n", f"\n{DOCUMENT_SEPARATOR}\n"])
def test_a_text_without_documents_is_refused(text):
    with pytest.raises(UserError):
        scoring_text(byte_tokenizer(), text)
