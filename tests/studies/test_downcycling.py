"""The study of downcycling, on a tiny model: three starts, one course of the same text."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.errors import UserError
from mlpmoe.core.recovery.soft import SoftlyRouted
from mlpmoe.core.routed import RoutedMLP
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.studies import downcycling
from mlpmoe.studies.domains import Domain
from tests.families import build
from tests.studies.texts import DOMAINS, LENGTH
from tests.tiny import byte_tokenizer, tiny_model

STEPS, BATCH, LOOKS = 8, 2, 4
D_FF = 128  # 64 experts of two neurons
EXPERTWEAVER = downcycling.STARTS["ExpertWeaver"]


def small_model():
    return tiny_model(intermediate_size=D_FF)


def run(steps=STEPS, seed=0, told=None, domains=DOMAINS, model=None):
    told = told or (lambda message, share: None)
    model = model or small_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downcycling, "batch_of", lambda length: BATCH)
        patch.setattr(downcycling, "LOOKS", LOOKS)
        return downcycling.study(model, byte_tokenizer(), steps, seed, told, domains, LENGTH)


@pytest.fixture(scope="module")
def rows():
    return run()


@pytest.fixture
def texts():
    return downcycling.Texts.of(byte_tokenizer(), DOMAINS, LENGTH, STEPS, 0)


def loss(model, samples):
    """By one pass over the samples, in float64."""
    with torch.no_grad():
        logits = model(samples, use_cache=False).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))


def of(rows, start):
    return [row for row in rows if row["start"] == start]


def test_each_start_reads_the_same_tokens(rows):
    assert list(dict.fromkeys(row["start"] for row in rows)) == ["dense", "ExpertWeaver", "random"]
    every = STEPS * BATCH * LENGTH
    for start in downcycling.STARTS:
        found = of(rows, start)
        assert [row["tokens"] for row in found] == [every * n // LOOKS for n in range(LOOKS + 1)]
        assert len({row["rate"] for row in found}) == 1
        assert found[-1]["loss"] < found[0]["loss"]


def test_what_is_read_is_all_text_but_what_is_kept_back(texts):
    train, kept_back = [], []
    for name, domain in DOMAINS.items():
        samples, test = domain.parts(byte_tokenizer(), LENGTH)
        border = len(samples) - len(samples) // downcycling.KEPT_BACK
        train += samples[:border].tolist()
        kept_back += samples[border:].tolist()
        assert torch.equal(texts.held_out[name], test[: downcycling.LOOKED_AT])
    assert texts.kept_back.tolist() == kept_back
    whole = downcycling.Texts.of(byte_tokenizer(), DOMAINS, LENGTH, len(train), 0)
    read = whole.reading.flatten(0, 1).tolist()
    assert sorted(read[: len(train)]) == sorted(train) == sorted(texts.calibration.samples.tolist())


def test_the_first_points_are_the_models_before_training(rows, texts):
    dense = small_model()
    for name, fields in downcycling.STARTS.items():
        model = dense
        if fields:
            model = convert(dense, ConversionSpec(**fields), texts.calibration)
        first, held_out = of(rows, name)[0], texts.held_out
        losses = {domain: loss(model, samples) for domain, samples in held_out.items()}
        for domain, expected in losses.items():
            assert first[domain] == pytest.approx(expected, rel=1e-4)
        assert first["loss"] == pytest.approx(sum(losses.values()) / 3, rel=1e-4)


def test_both_sparse_models_run_as_much_of_the_dense_one(texts):
    dense = small_model()
    made = [
        downcycling.sparse(dense, fields, texts.calibration, 0)
        for fields in downcycling.STARTS.values()
        if fields
    ]
    for mlps in zip(*map(mlp_modules, made), strict=True):
        assert len({(m.shared, m.experts, m.active, m.neurons_per_token) for m in mlps}) == 1
        assert mlps[0].neurons_per_token == D_FF / 4
        assert not torch.equal(mlps[0].up, mlps[1].up)


def test_all_weights_learn_routers_too_and_the_start_stays(texts):
    start = downcycling.sparse(small_model(), EXPERTWEAVER, texts.calibration, 0)
    before = copy.deepcopy(start)
    steps = []
    model = downcycling.train(start, texts.reading, 1e-2, lambda step, model: steps.append(step))
    assert steps == list(range(STEPS + 1))
    assert all(map(torch.equal, start.parameters(), before.parameters()))
    for (name, old), new in zip(start.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), name
    assert any("router" in name for name, _ in model.named_parameters())
    for mlp in mlp_modules(model):
        assert type(mlp) is SoftlyRouted
        mlp.__class__ = RoutedMLP  # what it is for when it is done
    soft = downcycling.train(start, texts.reading, 1e-2, lambda step, model: None)
    ids = texts.reading[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, soft(ids).logits)


def test_a_start_shares_no_memory_with_the_dense_model(texts):
    dense = small_model()
    start = downcycling.sparse(dense, EXPERTWEAVER, texts.calibration, 0)
    own = {p.data_ptr() for p in dense.parameters()}
    assert not own & {p.data_ptr() for p in start.parameters()}


def test_each_start_has_the_rate_that_is_best_for_it(rows):
    dense, found = small_model(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downcycling, "batch_of", lambda length: BATCH)
        texts = downcycling.Texts.of(byte_tokenizer(), DOMAINS, LENGTH, STEPS, 0)
        trial = texts.reading[: STEPS // downcycling.TUNED]
    for rate in downcycling.RATES:
        made = downcycling.train(dense, trial, rate, lambda step, model: None)
        found[rate] = loss(made, texts.kept_back)
    assert of(rows, "dense")[0]["rate"] == min(found, key=found.get)


def test_the_same_seed_gives_the_same(rows):
    told = []
    again = run(told=lambda *said: told.append(said))
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    shares = [share for _, share in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    assert run(seed=1)[-1]["loss"] != rows[-1]["loss"]


def test_one_step_is_enough():
    found = run(steps=1)
    assert [row["step"] for row in found] == [0, 1] * 3


def test_what_cannot_be_studied_is_refused():
    with pytest.raises(UserError, match="have none"):
        run(model=build("gpt2"))
    short = DOMAINS | {"notes": Domain("notes", lambda: "short", lambda: "short")}
    with pytest.raises(UserError, match=r"^notes: "):
        run(domains=short)
