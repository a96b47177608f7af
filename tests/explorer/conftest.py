"""The explorer on a tiny random model in place of the demo model: nothing is trained or fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.server.workbench import Workbench
from mlpmoe.explorer.shell.handlers import Handlers
from mlpmoe.explorer.shell.opening import OpeningHandlers
from mlpmoe.models import catalogue
from tests.tiny import BOS, CONTEXT, D_FF, VOCABULARY, byte_tokenizer, save_tiny_model


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as on a laptop unless they say otherwise."""
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.delenv("MLPMOE_ALLOW_ANY_MODEL", raising=False)
    monkeypatch.setenv("MLPMOE_FIRST_MODEL", "demo")


@pytest.fixture(autouse=True)
def steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests take the steps of a job themselves: pressing Stop would wait for them in vain."""
    monkeypatch.setattr("mlpmoe.explorer.server.jobs.SOON", 0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def one_layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "one-layer"
    return save_tiny_model(folder, num_hidden_layers=1, intermediate_size=40)


@pytest.fixture(scope="session")
def gateless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2: its MLPs have no gate, their weights lie transposed, and there are biases."""
    folder = tmp_path_factory.mktemp("models") / "gateless"
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    assert tokenizer.bos_token == BOS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workbench(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A new workbench whose demo model is the tiny one."""
    entries = list(catalogue.CATALOGUE)
    entries[0] = replace(entries[0], source=tiny_folder)
    monkeypatch.setattr(catalogue, "CATALOGUE", tuple(entries))
    return Workbench()


@pytest.fixture
def handlers(workbench: Workbench) -> Handlers:
    return Handlers(workbench)


@pytest.fixture
def demo(workbench: Workbench) -> LoadedModel:
    """The tiny model as the demo model, with empty caches."""
    return workbench.loaded("demo")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The tiny model for tests that only read."""
    return load(Workbench(), tiny_folder)


@pytest.fixture(scope="session")
def gateless(gateless_folder: Path) -> LoadedModel:
    return load(Workbench(), gateless_folder)


@pytest.fixture(scope="session")
def one_layer(one_layer_folder: Path) -> LoadedModel:
    return load(Workbench(), one_layer_folder)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model that says nothing with half of the neurons of its last layer: an allocation
    by output error takes more from there."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "uneven")
    weights = load_file(folder / "model.safetensors")
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down[:, D_FF // 2 :] *= 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return load(Workbench(), folder)


def load(workbench: Workbench, folder: Path) -> LoadedModel:
    *_, loaded = workbench.load(str(folder))
    return loaded


@pytest.fixture
def visitor() -> Callable[..., SimpleNamespace]:
    """Makes what Gradio tells of a visitor: the session, and the link's query string."""

    def make(session: str = "a", **query: str) -> SimpleNamespace:
        return SimpleNamespace(session_hash=session, query_params=query)

    return make


@pytest.fixture
def weights_hash() -> Callable[[torch.nn.Module], str]:
    """A fingerprint of every bit of a model's parameters and buffers."""

    def fingerprint(model: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return fingerprint


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was shown as a notice: kind and text."""
    shown: list[tuple[str, str]] = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(gr, kind, lambda text, kind=kind, **_: shown.append((kind, text)))
    return shown


@pytest.fixture
def opening(workbench: Workbench) -> OpeningHandlers:
    return OpeningHandlers(workbench)
