"""Routers of copies against a least-squares fit by another way, and Bayes' rule by hand."""

import copy
import math
from collections import Counter

import pytest
import torch

from mlpmoe.core.routed.routers import RIDGE
from mlpmoe.measure.text.graphs import CACHE
from mlpmoe.studies.copies import Copies
from mlpmoe.studies.routing import ByContext, Told, fit_by_layer, share_of_expert
from tests.tiny import LAYERS, VOCABULARY, tiny_model

GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [  # of three kinds, of tokens 0 to 59, 40 to 99 and 80 to 139
    torch.randint(low, low + 60, (6, 10), generator=GENERATOR) for low in (0, 40, 80)
]


@pytest.fixture(scope="module")
def copies():
    return Copies(tiny_model().double(), branches=4, shared=2)


@pytest.fixture(scope="module")
def apart(copies):
    """Three copies that differ."""
    return [
        {name: (tensor * (1 + expert / 4)).detach() for name, tensor in copies.start().items()}
        for expert in range(3)
    ]


@torch.no_grad()
def inputs(model, samples, path):
    """(tokens, d_model): what reaches the MLP there."""
    seen = []
    model.get_submodule(path).register_forward_pre_hook(
        lambda module, given: seen.append(given[0].flatten(0, 1))
    )
    model(samples, use_cache=False)
    return seen[0]


def test_the_map_of_a_layer_is_ridge_regression_on_what_each_copy_sees(copies, apart):
    told = Told(3)
    routers = fit_by_layer(copies.experts(apart, lambda path: told), told, TEXTS)
    assert list(routers) == [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]
    for path, router in routers.items():
        models = map(copies.dense, apart)
        x = torch.cat([inputs(*one, path) for one in zip(models, TEXTS, strict=True)])
        wanted = torch.eye(3, dtype=x.dtype).repeat_interleave(60, 0)
        centred, aim = x - x.mean(0), wanted - wanted.mean(0)
        ridge = math.sqrt(RIDGE * float(centred.square().sum(0).mean()))
        rows = torch.cat([centred, ridge * torch.eye(x.shape[1], dtype=x.dtype)])
        aims = torch.cat([aim, torch.zeros(x.shape[1], 3, dtype=x.dtype)])
        weight = torch.linalg.lstsq(rows, aims).solution.T
        torch.testing.assert_close(router.weight.double(), weight, rtol=1e-4, atol=1e-5)
        bias = wanted.mean(0) - weight @ x.mean(0)
        torch.testing.assert_close(router.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_the_context_speaks_by_bayes_rule():
    router = ByContext(TEXTS, VOCABULARY)
    ids = torch.tensor([[5, 50, 90, 130], [200, 45, 45, 3]])
    found = router.scores(ids)
    counts = [Counter(text.flatten().tolist()) for text in TEXTS]
    for sample in range(2):
        for place in range(4):
            for domain, counted in enumerate(counts):
                expected = sum(
                    math.log((counted[token] + 1) / (60 + VOCABULARY))
                    for token in ids[sample, : place + 1].tolist()
                )
                assert float(found[sample, place, domain]) == pytest.approx(expected, rel=1e-5)


def test_every_token_runs_the_copy_of_its_context(copies, apart):
    router = ByContext(TEXTS, VOCABULARY)
    merged = copies.experts(apart, lambda path: router)
    router.reads(merged)
    ids = torch.cat([TEXTS[0][:1], TEXTS[2][:1]])
    expected = router.scores(ids).argmax(-1)  # (samples, tokens)
    mlps = [merged.get_submodule(f"model.layers.{layer}.mlp") for layer in range(LAYERS)]
    seen = []
    for mlp in mlps:
        mlp.register_forward_pre_hook(
            lambda mlp, given: seen.append(mlp.select(given[0].flatten(0, 1)))
        )
    with torch.no_grad():
        merged(ids, use_cache=False)
    for chosen in seen:
        assert torch.equal(chosen.long().argmax(-1), expected.flatten())
    shares = [share_of_expert(merged, expert, ids) for expert in range(3)]
    assert shares == pytest.approx([float((expected == e).double().mean()) for e in range(3)])


def test_writing_goes_on_from_what_was_read(copies, apart):
    """Token by token with a cache is the same as all at once, also in a copy of the model."""
    router = ByContext(TEXTS, VOCABULARY)
    merged = copies.experts(apart, lambda path: router)
    router.reads(merged)
    ids = TEXTS[1][:2]
    with torch.no_grad():
        whole = merged(ids, use_cache=False).logits
        merged(TEXTS[2][:2], use_cache=False)  # another text in between
        for model in (merged, copy.deepcopy(merged)):
            cache, found = None, []
            for piece in ids.split((4, 1, 1, 4), dim=1):
                said = model(piece, use_cache=True, **{CACHE: cache})
                cache = said[CACHE]
                found.append(said.logits)
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-6, atol=1e-6)
