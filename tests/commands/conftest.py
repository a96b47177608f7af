"""A tiny saved model, texts, and functions that run a command on them."""

import pytest

from mlpmoe.__main__ import main
from tests.commands.common import STORIES, TEXT
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("command-line") / "tiny")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text(STORIES, encoding="utf-8")
    return file


@pytest.fixture
def evaluate(folder, text, capsys):
    """Run `evaluate` with these flags; gives exit status, stdout and stderr."""

    def run(*flags, speed=False):
        flags = [*flags, *([] if speed else ["--no-speed"])]
        status = main(["evaluate", str(folder), "--text", str(text), *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def sweep(folder, text, stories, capsys):
    """Run `sweep` with these flags; gives exit status, stdout and stderr."""

    def run(*flags):
        texts = ["--text", str(text), "--calibration", str(stories)]
        status = main(["sweep", str(folder), *texts, *flags])
        return status, *capsys.readouterr()

    return run
