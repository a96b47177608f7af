"""A measurement that sharpens, window by window: what it says at any moment is recomputed here."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import combinations, pairwise
from math import exp, log, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe import ConversionSpec, convert, perplexity
from mlpmoe.measure.quality.encoding import encode_stream, encode_text
from mlpmoe.measure.quality.estimate import (
    LOOK_PIECES,
    LOOK_TOKENS,
    Evaluation,
    Losses,
    Plan,
    sharpen,
    spread,
)
from mlpmoe.measure.quality.head import token_losses
from mlpmoe.measure.quality.perplexity import Perplexity, PerplexityChange, compare
from tests.tiny import byte_tokenizer, tiny_model

# documents of one, one, three and two windows of the tiny model's 256 tokens
DOCUMENTS = ["The ferry left. " * 12, "Nobody told the gulls. " * 10,
             "A lamp stood on the table, and a moth flew round it. " * 13,
             "It rained all day; the river rose by a hand. " * 9]  # fmt: skip
TEXT = "\n<|endoftext|>\n".join(DOCUMENTS)


@pytest.fixture(scope="module")
def models():
    dense = tiny_model()
    return dense, convert(dense, ConversionSpec(branches=6, fade=0.9, keep=4))


@pytest.fixture
def plan(models):
    return Plan(models[0], encode_text(byte_tokenizer(), TEXT))


def scorer(model, scored=None):
    """Scores with a model; `scored`: the windows, as they are asked for."""

    def score(part):
        if scored is not None:
            scored.append(part)
        return token_losses(model, part.ids, part.first)

    return score


def steps_of(plan, models, dense=None, converted=None) -> list[Evaluation]:
    known = (Losses() if dense is None else dense), (Losses() if converted is None else converted)
    return list(sharpen(plan, *known, *map(scorer, models)))


def by_hand(models, parts) -> tuple[float, float]:
    """Perplexity of both models on these pieces of text, each read by itself."""
    found = []
    for model in models:
        losses = []
        for part in parts:
            with torch.no_grad():
                logits = model(part.ids[None]).logits[0, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits, part.ids[1:], reduction="none")
            losses += loss[part.first - 1 :].tolist()
        found.append(exp(sum(losses) / len(losses)))
    return tuple(found)


# the order


@given(st.integers(1, 300))
def test_every_window_comes_once(count):
    assert sorted(spread(count)) == list(range(count))


@given(st.integers(1, 200), st.data())
def test_any_beginning_is_spread_evenly(count, data):
    """Each quarter of the text has about its share of the windows that come first."""
    some = spread(count)[: data.draw(st.integers(1, count))]
    for quarter in range(4):
        share = sum(4 * n // count == quarter for n in range(count)) / count
        assert abs(sum(4 * n // count == quarter for n in some) - share * len(some)) < 3


def test_the_first_windows_are_of_several_documents(plan):
    first = [plan.windows[n].document for n in plan.order[:4]]
    assert len(set(first)) >= 3


# what is said on the way


def test_the_last_step_is_the_library_s_perplexity_of_both(plan, models):
    last = steps_of(plan, models)[-1]
    expected = [perplexity(model, byte_tokenizer(), TEXT) for model in models]
    assert (last.dense, last.converted) == tuple(expected)
    assert torch.equal(last.converted.losses, expected[1].losses)
    assert last.change == compare(*expected)
    assert last.complete and last.settled and not last.look
    assert last.total == last.dense.tokens == expected[0].tokens


def test_every_step_is_recomputed_from_the_pieces_it_names(plan, models):
    look, *steps = steps_of(plan, models)
    assert len(steps) == len(plan.windows)
    for number, step in enumerate([look, *steps]):
        found = by_hand(models, step.parts)
        assert (step.dense.value, step.converted.value) == pytest.approx(found, rel=1e-5)
        assert step.change.ratio == pytest.approx(found[1] / found[0], rel=1e-5)
        assert step.dense.tokens == sum(part.scored for part in step.parts)
        assert step.change.stderr > 0
        assert step.complete == (number == len(steps))
        assert step.total == steps[-1].dense.tokens
        for part in step.parts:  # it says where it stands in the text
            document = plan.text.documents[part.document]
            assert torch.equal(part.ids, document[part.start : part.start + len(part.ids)])
            sizes = plan.text.sizes[part.document][part.start + part.first :][: part.scored]
            assert part.size == int(sizes.sum())
        bits = log(found[1]) / log(2) * step.dense.tokens / sum(part.size for part in step.parts)
        assert step.converted.bits_per_byte == pytest.approx(bits, rel=1e-5)
    taken = [{(part.document, part.start) for part in step.parts} for step in steps]
    assert all(len(after - before) == 1 and before < after for before, after in pairwise(taken))


def test_the_first_look_is_short_and_is_never_pooled_with_windows(plan, models):
    look, first, *_ = steps_of(plan, models)
    assert look.look and not look.complete and not look.settled
    assert len(look.parts) == LOOK_PIECES
    assert all(len(part.ids) == LOOK_TOKENS for part in look.parts)
    assert len({part.document for part in look.parts}) == LOOK_PIECES
    assert not first.look
    assert [len(part.ids) for part in first.parts] == [len(plan.windows[plan.order[0]].ids)]


def test_a_long_document_is_looked_at_in_several_places(models):
    """A text of a visitor's own is mostly one document."""
    plan = Plan(models[0], encode_text(byte_tokenizer(), " ".join(DOCUMENTS)))
    starts = [part.start for part in plan.look]
    assert len(starts) == LOOK_PIECES
    length = len(plan.text.documents[0])
    assert min(b - a for a, b in combinations(starts, 2)) > length / 6
    steps = steps_of(plan, models)
    assert steps[0].look and steps[-1].complete


@pytest.mark.parametrize("repeats", [1, 40], ids=["few tokens", "short documents"])
def test_there_is_no_first_look_where_windows_are_as_quick(models, repeats):
    text = "\n<|endoftext|>\n".join(["A short one, of a line."] * repeats)
    plan = Plan(models[0], encode_text(byte_tokenizer(), text))
    steps = steps_of(plan, models)
    assert not any(step.look for step in steps)
    assert [step.complete for step in steps] == [False] * (repeats - 1) + [True]


def test_a_public_text_sharpens_in_its_own_windows(models):
    encoded = encode_stream(byte_tokenizer(), " ".join(DOCUMENTS), 256)
    plan = Plan(models[0], encoded)
    steps = steps_of(plan, models)
    ids = torch.stack(encoded.documents)
    assert ids.shape == (len(plan.windows), 256)
    with torch.no_grad():
        logits = models[1](ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert steps[-1].converted.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert steps[-1].dense.tokens == 255 * len(ids)


# what is enough


def made(ratio: float, stderr: float, *, tokens: int = 5000, look: bool = False) -> Evaluation:
    losses, blocks = torch.zeros(tokens), torch.arange(tokens)
    dense = Perplexity(10.0, 0.1, tokens, 1.0, losses, blocks)
    change = PerplexityChange(ratio, stderr, True)
    return Evaluation(dense, dense, change, 10_000, look=look)


@pytest.mark.parametrize(
    ("ratio", "enough", "too_much"),
    [
        (1.0, 0.0004, 0.0006),  # shown as +0.0 %
        (0.99, 0.0004, 0.0006),
        (1.99, 0.0004, 0.0006),
        (2.0, 0.004, 0.006),  # shown as × 2.00
        (9.99, 0.004, 0.006),
        (34.0, 0.04, 0.06),  # × 34.0
        (9500.0, 4.0, 6.0),  # × 9,500
    ],
)
def test_it_is_settled_once_the_error_is_below_what_is_shown(ratio, enough, too_much):
    assert made(ratio, enough).settled
    assert not made(ratio, too_much).settled
    assert not made(ratio, enough, look=True).settled
    assert made(ratio, too_much, tokens=10_000).settled  # there is no more
    assert not made(ratio, enough, tokens=1000).settled  # too few for the perplexities
    assert not made(ratio, enough, tokens=10_000, look=True).complete


@pytest.mark.parametrize("ratio", [float("inf"), 1e300, 1e-300])
def test_a_broken_model_never_settles_by_chance(ratio):
    assert not made(ratio, float("nan")).settled
    assert made(ratio, float("nan"), tokens=10_000).settled


def test_losses_that_are_not_numbers_are_carried_to_the_end(plan, models):
    def broken(part):
        return torch.full((part.scored,), float("nan"))

    *_, last = sharpen(plan, Losses(), Losses(), scorer(models[0]), broken)
    assert last.complete and last.change.ratio == float("inf")


# what is kept


def test_a_second_conversion_costs_one_model(plan, models):
    dense, scored = Losses(), []
    for converted in (models[1], convert(models[0], ConversionSpec(keep=12))):
        one, two = scorer(models[0], scored), scorer(converted, scored)
        *_, last = sharpen(plan, dense, Losses(), one, two)
        assert last.complete
    both = 2 * (LOOK_PIECES + len(plan.windows))
    assert len(scored) == both + both // 2
    assert list(last.parts) == plan.windows


def test_what_was_stopped_goes_on_where_it_was(plan, models):
    dense, converted, scored = Losses(), Losses(), []
    steps = sharpen(plan, dense, converted, *(scorer(model, scored) for model in models))
    for _ in range(3):
        shown = next(steps)
    steps.close()
    assert plan.evaluation(dense, converted) == shown
    before = len(scored)
    assert before == 2 * (LOOK_PIECES + 2)
    again = list(sharpen(plan, dense, converted, *(scorer(m, scored) for m in models)))
    assert [len(step.parts) for step in again] == list(range(3, len(plan.windows) + 1))
    assert len(scored) == before + 2 * (len(plan.windows) - 2)
    expected = perplexity(models[1], byte_tokenizer(), TEXT)
    assert again[-1].converted == expected
    # known to the end: said once, at no cost
    assert list(sharpen(plan, dense, converted, None, None)) == again[-1:]


def test_what_another_fills_in_meanwhile_is_not_scored_again(plan, models):
    """Who waits for a turn looks again when it comes: here the other one scores everything."""
    dense, mine, theirs = Losses(), Losses(), Losses()
    scored, inside = [], threading.Event()

    @contextmanager
    def turn():
        if not inside.is_set():
            inside.set()
            list(sharpen(plan, dense, theirs, scorer(models[0], scored), scorer(models[1])))
        yield

    *_, last = sharpen(plan, dense, mine, scorer(models[0], scored), scorer(models[1]), turn)
    assert last.complete
    assert len(scored) == LOOK_PIECES + len(plan.windows)


def test_the_error_is_that_of_the_blocks(plan, models):
    """The ratio estimator over clusters, written out."""
    step = steps_of(plan, models)[3]
    difference = (step.converted.losses - step.dense.losses).double()
    blocks = step.dense.blocks
    mean, count = float(difference.mean()), len(set(blocks.tolist()))
    sums = [float((difference[blocks == b] - mean).sum()) for b in set(blocks.tolist())]
    spread_ = sqrt(sum(s * s for s in sums) * count / (count - 1)) / len(difference)
    assert step.change.stderr == pytest.approx(step.change.ratio * spread_, rel=1e-6)
