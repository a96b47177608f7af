"""Decoding as a graph reads what the model reads. Without a GPU a graph is what it records."""

from __future__ import annotations

import pytest
import torch

from mlpmoe.core.conversion import convert
from mlpmoe.core.kernels import gpu
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.text import decoding, graphs
from mlpmoe.measure.text.decoding import Reader
from mlpmoe.measure.text.graphs import records
from tests.tiny import VOCABULARY, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5)).to(DEVICE)
SPECS = {
    "dense": None,
    "split": ConversionSpec(branches=6),
    "kept": ConversionSpec(branches=6, keep=3),
    "experts": ConversionSpec(method="contiguous", experts=6, active=0.5),
    "neurons": ConversionSpec(method="neurons", active=0.5),
}


@torch.inference_mode(False)
def made(name):
    model = tiny_model().to(DEVICE)
    return model if SPECS[name] is None else convert(model, SPECS[name])


@pytest.fixture
def recorded(monkeypatch):
    """All models are recorded; a list of what was replayed, and how often anything was."""
    counts = {"recorded": 0, "replayed": 0}

    def capture(run):
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            return run()

        return replay

    if DEVICE == "cpu":
        monkeypatch.setattr(decoding, "decodes", lambda model: False)
        monkeypatch.setattr(graphs, "_on_one_gpu", lambda model: True)
        monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(gpu, "_said", set())
    return counts


def follows(reader, model, text):
    """Whether logits are the model's own, after a prompt and from then on."""
    expected = model(text).logits[0]
    for start, stop in ((0, 9), (9, 10), (10, 15), (15, 24)):
        found = reader.read(text[:, start:stop])[0]
        torch.testing.assert_close(found, expected[stop - 1], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("name", SPECS)
def test_a_graph_reads_what_the_model_reads(name, recorded):
    model = made(name)
    assert records(model)
    reader = Reader(model, TEXT.shape[1])
    for text in TEXT[:, None]:  # the second with the graph of the first
        follows(reader, model, text)
        reader.restart()
    assert reader._decoder._replay is not None
    if DEVICE == "cpu":
        assert recorded == {"recorded": 1, "replayed": 1 + 14 + 15}


def fails(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def says_something_else(run):
    return lambda: 2 * run()


@torch.inference_mode()
@pytest.mark.parametrize("capture", [fails, says_something_else])
def test_what_cannot_be_recorded_runs_as_it_is(recorded, monkeypatch, caplog, capture):
    monkeypatch.setattr(graphs, "capture", capture)
    model = made("dense")
    for text in TEXT[:, None]:
        follows(Reader(model, TEXT.shape[1]), model, text)
    assert not records(model)
    assert len(caplog.records) == 1


def test_what_is_recorded(recorded, monkeypatch):
    model = made("dense")
    assert records(model)
    for spec in (
        ConversionSpec(method="inputs", active=0.5),  # waits for what it chooses
        ConversionSpec(method="neurons", active=0.5),
    ):
        assert records(convert(model, spec)) is (spec.method == "neurons")
    monkeypatch.setenv("MLPMOE_KERNELS", "plain")
    assert not records(model)
    monkeypatch.delenv("MLPMOE_KERNELS")
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not records(model)
    hook.remove()
    assert not records(model.train())


@pytest.mark.skipif(DEVICE == "cuda", reason="is about the CPU")
def test_nothing_is_recorded_on_a_cpu():
    assert not records(made("dense"))
