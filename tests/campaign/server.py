"""The page in a process of its own, as a host runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]
SOON = 600  # seconds in which a server starts, on a machine that does other work too


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    @property
    def memory(self) -> int:
        """Bytes that the process holds by itself."""
        return psutil.Process(self.process.pid).memory_info().rss

    def post(self, name: str, body: str | bytes, timeout: float = 120) -> tuple[bool, str]:
        """Whether a call of an endpoint was answered, and the last that was said, as it came: for
        bodies that no client would send."""
        base = f"{self.url}/gradio_api/call/{name}"
        with httpx.Client(timeout=timeout, trust_env=False) as client:
            asked = client.post(base, content=body, headers={"Content-Type": "application/json"})
            if asked.status_code != 200:
                return False, asked.text
            lines = client.get(f"{base}/{asked.json()['event_id']}").text.splitlines()
        said = [line for line in lines if line.startswith(("event: ", "data: "))]
        return "event: complete" in said, said[-1].removeprefix("data: ")


def started(folder: Path, **environment: str) -> Server:
    """A server that begins; folder: for its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    own = {"GRADIO_SERVER_PORT": str(port), "NO_PROXY": "127.0.0.1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=os.environ | own | environment,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Server(process, f"http://127.0.0.1:{port}", log)


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[Server]:
    """A server that answers, until the end of the block; folder: for its log."""
    server = started(folder, **environment)
    try:
        wait_for(server)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def wait_for(server: Server) -> None:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()[-2000:]
        try:
            if httpx.get(f"{server.url}/config", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server does not start")
