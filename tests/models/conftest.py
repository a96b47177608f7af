from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmoe.models import packaged
from tests.models.fake_hub import FakeHub
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint; shared, so not to be changed."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub without models, which this process takes for the real one."""
    with FakeHub() as fake:
        fake.connect(monkeypatch, tmp_path / "cache")
        yield fake


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as on a laptop unless they say otherwise."""
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.delenv("MLPMOE_ALLOW_ANY_MODEL", raising=False)


@pytest.fixture(autouse=True)
def no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real model's package is not installed, and nothing of it was converted."""
    monkeypatch.setenv("MLPMOE_CACHE", str(tmp_path / "converted"))
    monkeypatch.setattr(packaged, "find_spec", lambda module: None)
