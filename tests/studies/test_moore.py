"""The study of several tasks: what it trains on what, and what its rows say."""

from __future__ import annotations

from math import exp

import pytest
import torch
import torch.nn.functional as F

from mlpmoe.core.errors import UserError
from mlpmoe.studies import moore
from mlpmoe.studies.adapters import PROJECTIONS, kinds_of
from tests.tiny import byte_tokenizer, tiny_model

LENGTH = 32
SETTING = {"length": LENGTH, "reflections": 2, "width": 2}
KINDS = ("MoORE", "one LoRA", "a LoRA per task")


class Domain:
    """Numbers that count up in steps of one size: easy to learn, and of the size alone."""

    def __init__(self, size):
        self.size = size

    def parts(self, tokenizer, length):
        ids = torch.arange(20)[:, None] * 7 + torch.arange(length) * self.size
        ids = 1 + ids % 40
        return ids[:16], ids[16:]


@pytest.fixture
def domains(monkeypatch):
    found = {"stories": Domain(1), "prose": Domain(3), "dialogue": Domain(11)}
    monkeypatch.setattr(moore, "DOMAINS", found)
    return found


@torch.no_grad()
def plain_perplexity(model, ids):
    logits = model(ids).logits[:, :-1].double()
    return exp(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))


def test_the_loss_falls_on_each_kind(domains):
    texts = [
        (task, domains[name].parts(None, LENGTH)[0])
        for task, name in ((0, "prose"), (1, "dialogue"))
    ]
    for name, make in kinds_of(tiny_model(), 2, 0, PROJECTIONS, 2, 2).items():
        losses = moore.train(make(), texts, 30, 1e-2, 0)
        assert len(losses) == 30 and sum(losses[-3:]) < 0.9 * sum(losses[:3]), name


def test_tasks_share_a_step_and_no_sample_comes_twice_in_an_epoch(domains, monkeypatch):
    seen = []
    loss = moore.next_token_loss
    monkeypatch.setattr(
        moore, "next_token_loss", lambda logits, ids: seen.append(ids) or loss(logits, ids % 40)
    )
    train = domains["prose"].parts(None, LENGTH)[0]
    adapted = kinds_of(tiny_model(), 2, 0, PROJECTIONS, 2, 2)["one LoRA"]()
    losses = moore.train(adapted, [(0, train), (1, train + 100)], 4, 1e-3, 0)
    assert len(losses) == 4 and [len(ids) for ids in seen] == [8] * 8  # 512 tokens in all
    for task in (0, 1):
        for epoch in (seen[task:4:2], seen[4 + task :: 2]):
            read = torch.cat(epoch) - 100 * task
            assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, train.tolist()))


def test_the_rows(domains):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    rows = moore.study(
        model, byte_tokenizer(), 12, 0, lambda *said: told.append(said), rates=(1e-2,), **SETTING
    )
    trained = ["prose and dialogue", "prose", "prose, then dialogue"]
    assert [(row["adapter"], row["trained on"]) for row in rows] == [
        ("dense", "nothing"),
        *((kind, what) for kind in KINDS for what in trained),
    ]
    dense = rows[0]
    for name, domain in domains.items():
        expected = plain_perplexity(model, domain.parts(None, LENGTH)[1])
        assert dense[name] == pytest.approx(expected, rel=1e-4)
    for row in rows:
        assert row["forgotten"] == pytest.approx(row["stories"] / dense["stories"], rel=1e-5)
    of = {(row["adapter"], row["trained on"]): row for row in rows}
    for kind in KINDS:
        for name in ("prose", "dialogue"):
            assert of[kind, "prose and dialogue"][name] < 0.95 * dense[name]
        assert of[kind, "prose"]["prose"] < 0.95 * dense["prose"]
    # what is only of one task changes nothing for others
    own = "a LoRA per task"
    assert of[own, "prose"]["prose"] == of[own, "prose, then dialogue"]["prose"]
    assert of[own, "prose"]["dialogue"] == dense["dialogue"]
    for row in rows:
        if row["adapter"] == own:
            assert row["forgotten"] == 1
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1


def test_a_row_is_what_its_training_gives(domains):
    """MoORE on the first task, by hand."""
    rows = moore.study(tiny_model(), byte_tokenizer(), 8, 3, rates=(1e-2,), **SETTING)
    adapted = kinds_of(tiny_model(), 2, 3, PROJECTIONS, 2, 2)["MoORE"]()
    train, test = domains["prose"].parts(None, LENGTH)
    moore.train(adapted, [(0, train)], 4, 1e-2, 3)
    row = next(row for row in rows if row["trained on"] == "prose")
    assert row["adapter"] == "MoORE" and row["parameters"] == adapted.parameters
    expected = plain_perplexity(adapted.on(0), test)
    assert row["prose"] == pytest.approx(expected, rel=1e-4)
    stories = plain_perplexity(adapted.on(None), domains["stories"].parts(None, LENGTH)[1])
    assert row["stories"] == pytest.approx(stories, rel=1e-4)


def test_the_better_rate_is_taken(domains, monkeypatch):
    """From text that is trained on; what is measured plays no part."""
    monkeypatch.setattr(moore, "held_out", lambda model, samples: None)
    monkeypatch.setattr(moore, "_row", lambda name, order, count, rate, *rest: (name, rate))
    for rates, best in (((1e-6, 1e-2), 1e-2), ((1e30, 1e-2), 1e-2)):
        rows = moore.study(tiny_model(), byte_tokenizer(), 16, 0, rates=rates, **SETTING)
        assert set(rows[1:]) == {(kind, best) for kind in KINDS}


def test_it_can_be_stopped(domains):
    class Stopped(Exception):
        pass

    def stop(message, share):
        if share > 0.5:
            raise Stopped

    model = tiny_model()
    with pytest.raises(Stopped):
        moore.study(model, byte_tokenizer(), 8, 0, stop, rates=(1e-2,), **SETTING)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"unseen": "poems"}, "no domain is called 'poems'"),
        ({"rates": ()}, "rates above 0"),
        ({"rates": (1e-3, -1.0)}, "rates above 0"),
        ({"steps": 3}, "at least 4 steps"),
        ({"reflections": 1}, "an even number"),
    ],
)
def test_what_is_refused(domains, values, words):
    with pytest.raises(UserError, match=words):
        moore.study(tiny_model(), byte_tokenizer(), **{"steps": 8, **SETTING, **values})
