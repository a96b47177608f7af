"""The study of branches trained apart, on a tiny model and texts of a few hundred bytes."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from mlpmoe.core.errors import UserError
from mlpmoe.studies import apart
from mlpmoe.studies.copies import Copies
from mlpmoe.studies.domains import Domain
from tests.studies.texts import DOMAINS, LENGTH
from tests.tiny import byte_tokenizer, tiny_model

STEPS = 4
BATCH = 2


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(apart, "batch_of", lambda length: BATCH)


def run(seed=0, told=None, domains=DOMAINS, model=None):
    told = told or (lambda message, share: None)
    model = model or tiny_model()
    return apart.study(model, byte_tokenizer(), STEPS, seed, told, domains, LENGTH)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "batch_of", lambda length: BATCH)
        return {row["model"]: row for row in run()}


def plain(rows, row):
    """The figures of a row without the time."""
    return {name: value for name, value in rows[row].items() if name not in ("model", "seconds")}


def perplexity(model, samples):
    with torch.no_grad():
        logits = model(samples, use_cache=False).logits[:, :-1].double()
    return math.exp(F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))


def test_rows(rows):
    only = [f"{name} only" for name in DOMAINS]
    merged = [f"experts, {how}" for how in ("by layer", "by context", "told")]
    assert list(rows) == ["seed", *only, "mixture", "average", *merged]
    tokens = STEPS * BATCH * LENGTH
    assert [row["trained_tokens"] for row in rows.values()] == [0, *[tokens] * 3, *[3 * tokens] * 5]
    for name, domain in DOMAINS.items():
        _, test = domain.parts(byte_tokenizer(), LENGTH)
        assert rows["seed"][name] == pytest.approx(perplexity(tiny_model(), test), rel=1e-4)
        assert all(row[f"{name}_stderr"] > 0 for row in rows.values())


def test_told_experts_are_each_domain_s_own_copy(rows):
    for name in DOMAINS:
        told, own = rows["experts, told"], rows[f"{name} only"]
        assert told[name] == pytest.approx(own[name], rel=1e-5)
        assert own[name] < rows["seed"][name]
    assert told["right"] == 1
    assert all(0 <= rows[f"experts, {how}"]["right"] <= 1 for how in ("by layer", "by context"))
    # texts of their own letters: the first one tells
    assert rows["experts, by context"]["right"] > 0.9
    assert told["parameters_per_token"] < told["parameters"] > rows["seed"]["parameters"]


def test_the_mixture_reads_what_all_copies_read():
    train = [domain.parts(byte_tokenizer(), LENGTH)[0] for domain in DOMAINS.values()]
    *apart_readings, mixed = apart._readings(train, STEPS, seed=3)
    assert mixed.shape == (3 * STEPS, BATCH, LENGTH)

    def counted(*readings):
        return Counter(tuple(s) for r in readings for s in r.flatten(0, 1).tolist())

    assert counted(*apart_readings) == counted(mixed)
    first = {tuple(sample) for sample in train[0].tolist()}
    by_step = [sum(tuple(s) in first for s in step.tolist()) for step in mixed]
    assert sorted(by_step) != [0] * 2 * STEPS + [BATCH] * STEPS  # mixed within steps


def test_a_copy_learns_and_leaves_the_rest_alone():
    copies = Copies(tiny_model(), 4, 2)
    before = [p.clone() for p in copies.seed.parameters()]
    reading = torch.full((STEPS, BATCH, LENGTH), 65)
    steps = []
    rows = apart.train_copy(copies, reading, steps.append)
    assert steps == list(range(STEPS + 1))
    assert all(not torch.equal(rows[name], start) for name, start in copies.start().items())
    assert all(map(torch.equal, before, copies.seed.parameters()))
    trained, seed = copies.dense(rows), copies.seed
    assert perplexity(trained, reading[0]) < perplexity(seed, reading[0])


def test_the_same_seed_gives_the_same(rows):
    told = []
    again = {row["model"]: row for row in run(told=lambda *said: told.append(said))}
    assert all(plain(again, name) == plain(rows, name) for name in rows)
    shares = [share for _, share in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    other = {row["model"]: row for row in run(seed=1)}
    assert plain(other, "mixture") != plain(rows, "mixture")


def test_short_texts_are_refused():
    short = DOMAINS | {"notes": Domain("notes", lambda: "short", lambda: "short")}
    with pytest.raises(UserError, match=r"^notes: "):
        run(domains=short)
