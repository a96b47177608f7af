"""Measurements of a loaded model: shared by its visitors, kept as far as they came, and fair."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from mlpmoe import ConversionSpec, UserError, convert, named_text, perplexity
from mlpmoe.explorer.server import loaded as module
from mlpmoe.explorer.server import structure
from mlpmoe.explorer.server.asked import Calibrated
from mlpmoe.explorer.shell.front import front
from mlpmoe.explorer.tabs.weights import histograms
from mlpmoe.measure.quality import estimate
from mlpmoe.models import named_calibration
from mlpmoe.models.texts import TEXTS
from tests.explorer.asking import SOON, AskedTurns, started

SPEC = ConversionSpec(branches=6, fade=0.9, keep=4)
PROXY = "proxy", "compute", (), 0, ""  # how a setting is looked at
OTHER = ConversionSpec(keep=12)
OWN = "The ferry left at nine, and nobody had told the gulls. Grüße – “ok”!\n"


@pytest.fixture
def scored(monkeypatch) -> list:
    """The model of each window that was scored."""
    models, original = [], module.token_losses

    def token_losses(model, ids, first):
        models.append(model)
        return original(model, ids, first)

    monkeypatch.setattr(module, "token_losses", token_losses)
    return models


@pytest.mark.parametrize("text", ["stories", "proxy"])
def test_evaluate_is_the_library_s_perplexity(demo, text):
    *steps, found = demo.evaluate(SPEC, text)
    content = named_text(text)
    dense = perplexity(demo.model, demo.tokenizer, content)
    converted = perplexity(convert(demo.model, SPEC), demo.tokenizer, content)
    assert (found.dense, found.converted) == (dense, converted)
    assert found.change.ratio == pytest.approx(converted.value / dense.value, rel=1e-6)
    assert found.complete and not any(step.complete for step in steps)
    done = [step.dense.tokens for step in steps if not step.look]
    assert done == sorted(set(done))
    assert all(step.total == dense.tokens for step in steps)


# what is kept


def test_nothing_is_measured_twice(demo, scored):
    *_, first = demo.evaluate(SPEC, "proxy")
    both = len(scored)
    assert list(demo.evaluate(SPEC, "proxy")) == [first]
    assert len(scored) == both
    *_, other = demo.evaluate(ConversionSpec(), "proxy")
    assert len(scored) == both + both // 2  # the dense one is known
    assert other.dense == first.dense
    assert demo.known_evaluation(SPEC, "proxy") == first
    assert demo.known_dense("proxy") == first.dense
    assert demo.known_evaluation(SPEC, "stories") is demo.known_dense("stories") is None


def test_what_was_stopped_is_known_and_goes_on(demo, scored):
    steps = demo.evaluate(SPEC, "proxy")
    for _ in range(3):
        shown = next(steps)
    steps.close()
    assert demo.known_evaluation(SPEC, "proxy") == shown
    assert demo.known_dense("proxy") == shown.dense
    assert not shown.look and not shown.complete
    before = len(scored)
    *_, found = demo.evaluate(SPEC, "proxy")
    windows, look = len(demo.windows("proxy")), len(demo.plan("proxy").look)
    assert (before, len(scored)) == (2 * (look + 2), 2 * (look + windows))
    assert found.converted == perplexity(
        convert(demo.model, SPEC), demo.tokenizer, named_text("proxy")
    )


def test_full_caches_still_measure(workbench, monkeypatch, scored):
    """The dense losses, the oldest of all, must not make room for what is compared with them."""
    monkeypatch.setattr(module, "RESULTS_HELD", 3)
    demo = workbench.loaded("demo")
    for branches in range(1, 9):
        *_, found = demo.evaluate(ConversionSpec(branches=branches), "proxy")
        assert demo.known_evaluation(ConversionSpec(branches=branches), "proxy") == found
    assert scored.count(demo.model) * 9 == len(scored)


def test_what_is_measured_stays_known_while_others_measure_other_texts(workbench, monkeypatch):
    """Each visitor may have a text of their own, and fewer are held encoded."""
    monkeypatch.setattr(module, "TEXTS_HELD", 2)
    demo = workbench.loaded("demo")
    steps = demo.evaluate(SPEC, "proxy")
    next(steps)
    for number in range(3):
        list(demo.evaluate(SPEC, demo.texts.add(f"{OWN * 3}{number}")))
    *_, found = steps
    assert demo.known_evaluation(SPEC, "proxy") == found
    assert demo.run(SPEC, "proxy").perplexity == found.converted.value


# what ends by itself


def test_a_measurement_by_itself_ends_where_its_error_is_small(demo, scored, monkeypatch):
    """Nothing removed changes nothing: as soon as there are tokens enough for the perplexities."""
    monkeypatch.setattr(estimate, "SETTLED_TOKENS", 300)
    *_, found = demo.evaluate(ConversionSpec(), "proxy", whole=False)
    assert found.settled and not found.complete
    *before, last = (part.scored for part in found.parts)
    assert sum(before) < 300 <= sum(before) + last
    before = len(scored)
    assert list(demo.evaluate(ConversionSpec(), "proxy", whole=False)) == [found]
    assert len(scored) == before  # to look again costs nothing
    *_, found = demo.evaluate(ConversionSpec(), "proxy")
    assert found.complete


def test_a_measurement_by_itself_ends_after_so_many_tokens(demo, scored, monkeypatch):
    monkeypatch.setattr(module, "LIVE_TOKENS", 500)
    *_, found = demo.evaluate(SPEC, "proxy", whole=False)
    assert 500 <= found.dense.tokens <= 500 + 255
    assert not found.settled
    before = len(scored)
    assert list(demo.evaluate(SPEC, "proxy", whole=False)) == [found]
    assert len(scored) == before
    *_, whole = demo.evaluate(SPEC, "proxy")
    assert whole.complete


def test_the_first_look_is_never_enough(demo, monkeypatch):
    monkeypatch.setattr(module, "LIVE_TOKENS", 1)
    look, window = demo.evaluate(SPEC, "proxy", whole=False)
    assert look.look and not window.look


# several visitors


def test_two_who_measure_at_once_alternate_and_both_come_to_the_end(demo, monkeypatch):
    demo.turns = turns = AskedTurns()
    order, original = [], module.token_losses

    def token_losses(model, ids, first):
        turns.await_askers(2)  # the other one waits, until it has come to its end
        order.append(model)
        return original(model, ids, first)

    monkeypatch.setattr(module, "token_losses", token_losses)
    found = {}

    def measure(spec: ConversionSpec) -> None:
        *_, found[spec] = demo.evaluate(spec, "proxy")
        turns.leave()

    models = {demo.converted(spec): spec for spec in (SPEC, OTHER)}
    threads = [started(lambda spec=spec: measure(spec)) for spec in (SPEC, OTHER)]
    for thread in threads:
        thread.join(SOON)
    for model, spec in models.items():
        expected = perplexity(model, demo.tokenizer, named_text("proxy"))
        assert found[spec].complete and found[spec].converted == expected
    each = len(demo.windows("proxy")) + len(demo.plan("proxy").look)
    turns_of = [models[model] for model in order if model in models]
    assert turns_of in ([SPEC, OTHER] * each, [OTHER, SPEC] * each)
    assert order.count(demo.model) == each  # the dense model reads each window once for both


def test_nobody_waits_for_a_text_that_another_reads(demo, monkeypatch):
    """Over a network it may take minutes. Who asks for the same one waits and gets the same."""
    begun, go_on, reads = threading.Event(), threading.Event(), []
    content = named_text("stories")

    def read():
        reads.append(1)
        begun.set()
        assert go_on.wait(SOON)
        return content

    monkeypatch.setitem(TEXTS, "c4", replace(TEXTS["c4"], read=read, most_windows=2))
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(demo.text, "c4")
        assert begun.wait(SOON)
        also = pool.submit(demo.text, "c4")
        assert not demo.has_text("c4")
        *_, found = demo.evaluate(SPEC, "proxy")
        assert found.complete
        assert front(demo, SPEC, *PROXY).network
        *_, own = demo.evaluate(SPEC, demo.texts.add(OWN))
        assert own.complete
        assert demo.known_evaluation(SPEC, "c4") is None
        assert not waiting.done()
        go_on.set()
        assert waiting.result(SOON) is also.result(SOON)
    assert len(reads) == 1


def test_nobody_waits_for_a_text_that_another_tokenizes(demo, monkeypatch):
    begun, go_on, original = threading.Event(), threading.Event(), module.encode_protocol
    long = OWN * 5

    def encode_protocol(tokenizer, text, *protocol):
        if text == long:
            begun.set()
            assert go_on.wait(SOON)
        return original(tokenizer, text, *protocol)

    monkeypatch.setattr(module, "encode_protocol", encode_protocol)
    key = demo.texts.add(long)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(demo.evaluate(SPEC, key)))
        assert begun.wait(SOON)
        *_, found = demo.evaluate(SPEC, "proxy")
        assert found.complete and not waiting.done()
        go_on.set()
        assert waiting.result(SOON)[-1].complete


# speed


@pytest.fixture
def timed(monkeypatch) -> list:
    """What was timed against the dense model."""
    models, original = [], module.decode_rounds

    def decode_rounds(dense, converted):
        models.append(converted)
        return original(dense, converted, tokens=2)

    monkeypatch.setattr(module, "decode_rounds", decode_rounds)
    return models


def test_speed_is_taken_round_by_round_and_kept(demo, timed):
    assert demo.known_speed(SPEC) is None
    reports = [report for report in demo.speed(SPEC) if report is not None]
    assert len(reports) > 1
    assert demo.known_speed(SPEC) is reports[-1]
    assert reports[-1].dense > 0 < reports[-1].converted
    assert timed == [demo.converted(SPEC)]


def test_conversions_of_one_shape_have_one_speed(demo, timed):
    """Zeros in place cost and save nothing; what is narrower does."""
    list(demo.speed(SPEC))
    known = demo.known_speed(SPEC)
    for same in (
        replace(SPEC, fade=0.5),
        replace(SPEC, fade=0.0),
        ConversionSpec(branches=3, keep=2),
    ):
        assert demo.known_speed(same) is known
    for other in (replace(SPEC, keep=3), ConversionSpec(), replace(SPEC, fade_unit="neuron")):
        assert demo.known_speed(other) is None
    calibrated = demo.asked(ConversionSpec(keep=12, order="activation", compensation="mean"))
    assert demo.known_speed(calibrated) is None
    demo.converted(calibrated)
    assert demo.known_speed(calibrated) is None  # its bias is another shape


def test_what_others_convert_does_not_make_it_forgotten(workbench, monkeypatch, timed):
    """Few conversions are held; what was found out of them must not make them anew."""
    monkeypatch.setattr(module, "SMALL_CONVERSIONS_HELD", 1)
    demo = workbench.loaded("demo")
    shown = front(demo, SPEC, *PROXY).network, histograms(demo, SPEC, 0, "gate")
    list(demo.speed(SPEC))
    list(demo.evaluate(SPEC, "proxy"))
    demo.converted(OTHER)
    monkeypatch.setattr(module, "convert_all", lambda *_: pytest.fail("it was made anew"))
    assert demo.known_speed(SPEC) is not None
    assert demo.known_evaluation(SPEC, "proxy").complete
    again = front(demo, SPEC, *PROXY)
    assert (again.network, histograms(demo, SPEC, 0, "gate")) == shown
    assert "…" not in again.perplexity + again.speed


def test_histograms_are_binned_once_per_layer_and_branches(demo, monkeypatch):
    binned, original = [], structure.magnitudes

    def magnitudes(model, layer, *more):
        binned.append(layer)
        return original(model, layer, *more)

    monkeypatch.setattr(structure, "magnitudes", magnitudes)
    for fade in (0.5, 0.6, 0.5):
        histograms(demo, ConversionSpec(fade=fade), 0, "gate")
    assert binned == [0, 0, 0]  # the whole branches, and two settings
    histograms(demo, ConversionSpec(fade=0.5), 1, "gate")
    assert binned[3:] == [1, 1]


# what looks at a text


def test_whole_branches_are_those_of_the_same_calibration_text(demo):
    """In the order that another text gives, "what is left" would be of other neurons."""
    asked = Calibrated(
        ConversionSpec(branches=6, keep=3, order="activation"), OWN * 40, demo.texts.add(OWN * 40)
    )
    assert demo.structure.whole(asked) == Calibrated(replace(asked.spec, keep=None), asked.text)
    left = demo.structure.left(asked)
    assert torch.equal(left[:, :3], torch.ones(2, 3))
    assert torch.equal(left[:, 3:], torch.zeros(2, 3))


def test_no_text_is_both_calibrated_and_measured_on(demo):
    spec = ConversionSpec(keep=12, order="activation")
    measured = named_text("stories")[:4000]
    theirs = demo.asked(spec, demo.texts.add(measured))
    with pytest.raises(UserError, match="share a passage"):
        list(demo.evaluate(theirs, "stories"))
    ours = demo.asked(spec, "stories")
    with pytest.raises(UserError, match="share a passage"):
        list(demo.evaluate(ours, demo.texts.add(named_calibration("stories")[:3000])))
    *_, found = demo.evaluate(theirs, "proxy")
    assert found.complete
