"""The app as it is served, with the shipped demo model, on a free port of this machine."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import gradio as gr
import pytest
import torch
from gradio_client import Client

from mlpmoe.explorer.app import build_demo
from mlpmoe.explorer.launch import launch_kwargs
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.server.workbench import Workbench


@dataclass(frozen=True)
class App:
    url: str
    workbench: Workbench
    blocks: gr.Blocks

    @property
    def demo(self) -> LoadedModel:
        return self.workbench.loaded("demo")

    def fingerprint(self) -> str:
        """Of every bit of the dense model."""
        digest = hashlib.sha256()
        for name, tensor in self.demo.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@pytest.fixture(scope="session")
def app() -> Iterator[App]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPACE_ID", "MLPMOE_ALLOW_ANY_MODEL"):
            patch.delenv(name, raising=False)
        patch.setenv("MLPMOE_FIRST_MODEL", "demo")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workbench = Workbench()
        blocks = build_demo(workbench)
        # sessions begin as if the demo model had been opened, as listeners that are called without
        # the page expect
        (model,) = (b for b in blocks.blocks.values() if isinstance(b, gr.State) and b.value == "")
        model.value = "demo"
        _, url, _ = blocks.launch(
            prevent_thread_lock=True,
            quiet=True,
            server_name="127.0.0.1",
            server_port=port,
            **launch_kwargs(),
        )
        yield App(url, workbench, blocks)
        blocks.close(verbose=False)


@pytest.fixture
def connect(app: App) -> Callable[[], Client]:
    return lambda: Client(app.url, verbose=False)


@pytest.fixture(scope="session")
def client(app: App) -> Client:
    return Client(app.url, verbose=False)


@pytest.fixture(scope="module")
def unchanged(app: App) -> Iterator[None]:
    """After all tests of a file the dense model has not changed by a bit."""
    before = app.fingerprint()
    yield
    assert app.fingerprint() == before


@pytest.fixture
def unharmed(unchanged: None, client: Client) -> Iterator[None]:
    """After the test the server still answers; see also `unchanged`."""
    yield
    assert client.predict(branches=2, api_name="/preview")["spec"]["branches"] == 2
