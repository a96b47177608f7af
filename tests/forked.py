"""Python programs in processes of their own that need not import torch and transformers first.

A server imports both once, which takes seconds, and forks for each program: it begins without
mlpmoe and without anything that a test did, in its own folder, environment and output. What
transformers reads from the environment as it is imported stays as it was in the server; where it
keeps downloaded code is the exception. A test that is about any of this starts Python itself.
"""

from __future__ import annotations

import multiprocessing.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import pytest

multiprocessing.util.get_temp_dir()  # before a test moves where such folders are
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.generation",
        "accelerate",
        "safetensors.torch",
    ]
)


class Forked:
    """As far as it is used here, subprocess.Popen for a command `python [-P] FILE ...` or
    `python -m MODULE ...` that writes into files."""

    def __init__(
        self, command: Sequence[object], *, cwd: str | os.PathLike[str], env: Mapping[str, str],
        stdout: IO[Any], stderr: IO[Any], stdin: int | None = None,
    ) -> None:  # fmt: skip
        assert command[0] == sys.executable and stdin in (None, subprocess.PIPE)
        self.args = [str(word) for word in command[1:] if word not in ("-P", "-m")]
        where = str(cwd), dict(env), stdout.name, stderr.name
        read, write = _context.Pipe(duplex=False)
        with read, write:
            self._process = _context.Process(target=_run, args=(self.args, *where, read))
            self._process.start()
            self.stdin = os.fdopen(os.dup(write.fileno()), "wb")
        if stdin is None:
            self.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run(
    command: Sequence[object], *, cwd: str | os.PathLike[str], env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with the output captured as text."""
    with NamedTemporaryFile() as out, NamedTemporaryFile() as err:
        process = Forked(command, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            status = process.wait(timeout=300)
        finally:
            process.kill()
        said = (file.read().decode() for file in (out, err))
        return subprocess.CompletedProcess(process.args, status, *said)


@contextmanager
def reloading() -> Iterator[None]:
    """Meanwhile, checkpoints are verified in a fork."""
    from mlpmoe.checkpoints.check import verification

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "Popen", Forked)
        yield


def _run(
    words: Sequence[str], cwd: str, env: Mapping[str, str], stdout: str, stderr: str,
    stdin: Connection,
) -> None:  # fmt: skip
    """In the new process, which has imported what this module imports, and what the server has."""
    os.dup2(stdin.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8")
    for descriptor, file in ((1, stdout), (2, stderr)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:] = words
    if "HF_MODULES_CACHE" in env:
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = env["HF_MODULES_CACHE"]
    if Path(words[0]).suffix == ".py":
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
