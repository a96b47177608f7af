"""A small HTTP server that answers like the Hugging Face hub, for the real client to talk to.

    with FakeHub() as hub:
        hub.add("owner/model", folder)
        hub.connect(monkeypatch, tmp_path / "cache")     # this process, or
        subprocess.run(..., env=hub.environment(cache))  # another one
        ...
        assert hub.requested("model.safetensors") == []

It serves what loading needs: model info, file listings and files of any commit; and it can gate a
repository, fail, lie about file sizes, and tell what it was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.utils import _http

GOOD_TOKEN = "hf_good"


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    sizes: dict[str, int] = field(default_factory=dict)  # sizes to announce instead of true ones
    gated: bool = False  # files only with GOOD_TOKEN
    private: bool = False  # nothing at all without GOOD_TOKEN
    status: int | None = None  # fail every request with it
    weight_status: int | None = None  # fail requests for weight files with it


class FakeHub:
    """The server runs from `__enter__` to `__exit__`; repositories are added at any time."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[
            str
        ] = []  # "GET /owner/model/resolve/...", and " 4000" for that many bytes
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No server any more: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        *,
        branch: str = "main",
        **options: object,
    ) -> str:
        """Serve a folder, or files by name, as one commit, and return its hash.

        options: the fields of `Repo`. Adding to a repository again makes another commit.
        """
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir()}
        repo = self.repos.setdefault(repo_id, Repo())
        for name, value in options.items():
            if name not in Repo.__dataclass_fields__:
                raise TypeError(f"Repo has no field {name}")
            setattr(repo, name, value)
        digest = hashlib.sha1(repo_id.encode())
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name])
        sha = digest.hexdigest()
        repo.commits[sha] = dict(files)
        repo.branches[branch] = sha
        return sha

    def requested(self, ending: str) -> list[str]:
        """The requests so far for paths that end so."""
        return [request for request in self.requests if request.endswith(ending)]

    def connect(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let this process's hub client talk to the server, with an empty cache of its own."""
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        for name, value in self._variables().items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPACE_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(_http, "time", _Impatient())
        close_session()  # the client's connection pool has read the proxy settings before

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables of this process, changed for another one that is to use the server."""
        dropped = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPACE_ID", "TRANSFORMERS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return {
            **kept,
            **self._variables(),
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache.parent / "home"),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
        }

    def _variables(self) -> dict[str, str]:
        return {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Impatient:
    """The module `time` for a client that would wait for seconds between attempts."""

    sleep = staticmethod(lambda seconds: None)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        repo = self.fake.repos.get(repo_id)
        if repo is not None and repo.status is not None:
            return self._error(repo.status, None)
        if self._token() not in (None, GOOD_TOKEN):
            return self._error(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and self._token() != GOOD_TOKEN):
            return self._error(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            return self._error(404, "RevisionNotFound")
        if is_api and rest[:1] == ["tree"]:
            return self._json([self._entry(repo, sha, name) for name in repo.commits[sha]])
        if is_api:
            return self._json(self._info(repo_id, repo, sha))
        return self._file(repo, sha, "/".join(rest[2:]))

    def _file(self, repo: Repo, sha: str, name: str) -> None:
        if repo.gated and self._token() != GOOD_TOKEN:
            return self._error(403, "GatedRepo", "Access to this model is restricted.")
        if repo.weight_status is not None and name.endswith((".safetensors", ".gguf")):
            return self._error(repo.weight_status, None)
        content = repo.commits[sha].get(name)
        if content is None:
            return self._error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_blob(content)}"'}
        wanted = re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", ""))
        if wanted:
            part = content[: int(wanted[1]) + 1]
            self.fake.requests[-1] += f" {len(part)}"
            headers["Content-Range"] = f"bytes 0-{len(part) - 1}/{len(content)}"
            return self._send(206, part, "application/octet-stream", headers)
        return self._send(200, content, "application/octet-stream", headers)

    def _info(self, repo_id: str, repo: Repo, sha: str) -> dict:
        siblings = [
            {"rfilename": name, "size": repo.sizes.get(name, len(content))}
            for name, content in repo.commits[sha].items()
        ]
        card = ModelCard(repo.commits[sha].get("README.md", b"").decode())
        return {
            "id": repo_id,
            "cardData": card.data.to_dict(),
            "sha": sha,
            "siblings": siblings,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [],
        }

    def _entry(self, repo: Repo, sha: str, name: str) -> dict:
        content = repo.commits[sha][name]
        size = repo.sizes.get(name, len(content))
        return {"type": "file", "path": name, "size": size, "oid": _blob(content)}

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), "application/json")

    def _error(self, status: int, code: str | None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        headers = {name: value for name, value in headers.items() if value is not None}
        self._send(status, b"{}", "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _blob(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
