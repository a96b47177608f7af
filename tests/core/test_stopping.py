"""Long work ends where it is told to, within layers, and leaves nothing half changed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context

import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert, convert_all, observe
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.stopping import may_stop, stoppable, stoppable_twin
from tests.tiny import D_FF, LAYERS, VOCABULARY, tiny_model

# what takes long in a layer -> the spec, and points at which work may stop in each layer, at least
LONG = {
    "least squares": (ConversionSpec(keep=12, order="least-squares", compensation="refit"), D_FF),
    "SparseGPT": (
        ConversionSpec(fade=0.5, fade_score="sparsegpt", fade_projections="gate-up-down"),
        3 + 16,  # a block of each matrix, of down in each branch
    ),
    "fade": (ConversionSpec(fade=0.9), 2 * 16),
    "allocation": (ConversionSpec(keep=12, allocation="sensitivity"), 16),
    "clusters of weights": (ConversionSpec(method="moefication", active=0.5), 3),
    "clusters of profiles": (ConversionSpec(method="expertweaver"), 3),
    "CMoE": (ConversionSpec(method="cmoe"), 3),
    "regression": (ConversionSpec(method="random", router="regression", active=0.5), 3),
    "oracle": (ConversionSpec(method="random", router="oracle", selection="threshold"), 2),
    "single neurons": (ConversionSpec(method="neurons", active=0.5, selection="threshold"), 2),
    # from all down to a fifth of the multiply-adds in steps of a twentieth of a matrix
    "inputs": (ConversionSpec(method="inputs", active=0.5, selection="threshold"), 48),
    "layer by layer": (
        ConversionSpec(keep=12, order="fluctuation", compensation="refit", progressive=True), 4,
    ),
}  # fmt: skip


class Stopped(Exception):
    pass


class Countdown:
    """Lets so many points pass and ends the work at the next."""

    def __init__(self, passes: int) -> None:
        self.left = passes

    def __call__(self, *told: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(1)
    return Calibration(torch.randint(1, VOCABULARY, (8, 64), generator=generator))


@pytest.fixture(autouse=True)
def one_worker():
    """So that layers side by side are begun in order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def points(work) -> int:
    """How often the work could be stopped."""
    passed = Countdown(10**9)
    with stoppable(passed):
        work()
    return 10**9 - passed.left


def same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", LONG)
def test_layers_can_be_left_and_nothing_is_half_changed(model, text, name):
    """Stopped here and there, with what was observed shared, the whole conversion is as if it had
    never been begun before."""
    spec, least = LONG[name]
    calibration = text if spec.needs_calibration else None
    expected = convert_all(model, [spec], calibration)[0]
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    observed, other = (observe(model, text) if calibration else None for _ in range(2))
    count = points(lambda: convert_all(model, [spec], other))
    assert count >= LAYERS * least
    for after in (count // 2, count // 3, count // 7, 1, 0):
        # what was found of a layer is kept, so that there may be less to do than before
        with pytest.raises(Stopped) if after < 2 else suppress(Stopped):
            convert_all(model, [spec], observed, Countdown(after))
    assert same(convert_all(model, [spec], observed)[0], expected)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in weights.items())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_what_is_done_is_told_at_every_point(model, text):
    """With the share of the layers that were begun before; from the first to the last, in order."""
    spec = LONG["least squares"][0]
    told = []
    convert(model, spec, text, lambda *given: told.append(given))
    assert {message for message, _ in told} == {"converting", "calibrating"}
    shares = [share for message, share in told if message == "calibrating"]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == [layer / LAYERS for layer in range(LAYERS)]
    assert shares.count(0.0) > D_FF


def test_layers_side_by_side_end_too(model):
    """What ends one layer keeps the others from being begun."""
    deep, begun = tiny_model(num_hidden_layers=6), []

    def told(message, share):
        begun.append(share)
        if share == 2 / 6:
            raise Stopped

    with pytest.raises(Stopped):
        convert(deep, ConversionSpec(fade=0.9), on_progress=told)
    assert set(begun) == {0, 1 / 6, 2 / 6}


def test_threads_tell_one_at_a_time(model):
    torch.set_num_threads(4)
    deep, inside, together = tiny_model(num_hidden_layers=8), threading.Semaphore(0), []

    def told(message, share):
        inside.release()
        together.append(inside._value)
        inside.acquire()

    convert(deep, ConversionSpec(fade=0.9), on_progress=told)
    assert len(together) > 8 * 16
    assert set(together) == {1}


def test_the_pass_over_the_text_stops_between_modules(model, text):
    count = points(lambda: observe(model, text))
    assert count > LAYERS * 7  # four projections of the attention, two norms and the MLP
    for after in (0, count // 2, count - 1):
        with pytest.raises(Stopped):
            observe(model, text, Countdown(after))


def test_checks_around_a_check_hold_as_well_and_none_afterwards():
    may_stop()
    for outer, inner in ((Countdown(1), Countdown(9)), (Countdown(9), Countdown(1))):
        with stoppable(outer), stoppable(inner):
            may_stop()
            with pytest.raises(Stopped):
                may_stop()
    with pytest.raises(KeyError), stoppable(Countdown(0)):
        raise KeyError
    may_stop()


def test_a_check_holds_for_its_own_thread_and_for_copies_of_its_context():
    with stoppable(Countdown(0)), ThreadPoolExecutor(1) as pool:
        pool.submit(may_stop).result()
        with pytest.raises(Stopped):
            pool.submit(copy_context().run, may_stop).result()


# A forward pass ----------------------------------------------------------------------------


def test_where_nothing_could_stop_it_a_model_runs_itself(model):
    assert stoppable_twin(model) is model


@torch.no_grad()
def test_a_twin_says_the_same_and_stops_between_modules(text):
    model = tiny_model()
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append("layer 1"))
    expected = model(text.samples).logits
    passed = Countdown(10**9)
    with stoppable(passed):
        twin = stoppable_twin(model)
        assert torch.equal(twin(text.samples).logits, expected)
    assert 10**9 - passed.left >= sum(1 for m in model.modules() if not list(m.children())) - 2
    assert seen == ["layer 1"] * 2  # hooks of the model are the twin's
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    for module in model.modules():
        assert len(module._forward_pre_hooks) == (module is model.model.layers[1])
    seen.clear()
    with pytest.raises(Stopped), stoppable(Countdown(5)):
        stoppable_twin(model)(text.samples)
    assert seen == []  # it was stopped in layer 0
