"""Push a checkpoint to the visitor's own account on the hub: on a Space with sign-in alone, and
with the visitor's token alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any
from zipfile import ZipFile

import gradio as gr
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...core.errors import UserError
from ...models import format_bytes
from ...models.hub import explain
from ...models.names import on_space
from ..server.background import in_thread
from ..server.events import QUIET, readable, status
from .export_result import Made
from .handed_out import HandedOut, workspace

SIGN_IN, SIGN_OUT = "Sign in with Hugging Face", "Sign out ({})"
# beside all others: the hub is waited for
PUSH_QUEUE = {"concurrency_id": "push", "concurrency_limit": 2}

logger = logging.getLogger(__name__)


def can_push() -> bool:
    """Whether visitors can sign in here. Nowhere but on a Space that has sign-in switched on:
    elsewhere Gradio would play a sign-in with the token of the machine's owner."""
    needed = ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")
    return (
        on_space()
        and all(os.environ.get(name) for name in needed)
        and all(find_spec(package) for package in ("authlib", "itsdangerous"))
    )


class PushHandlers:
    """The events of pushing what was handed out."""

    def __init__(self, handed_out: HandedOut) -> None:
        self.handed_out = handed_out
        # session -> the repository that was created but is not filled yet
        self._unfinished: dict[str, str] = {}

    def show_account(self, profile: gr.OAuthProfile | None) -> tuple:
        """The button of the sign-in, and whether one can push."""
        if profile is None:
            return SIGN_IN, gr.update(interactive=False)
        return SIGN_OUT.format(profile.username), gr.update(interactive=True)

    def push(
        self, request: gr.Request, token: gr.OAuthToken | None, name: str, public: bool
    ) -> Iterator[str]:
        """What is being done, then the link."""
        if token is None:
            raise UserError("sign in with Hugging Face first: it goes to your own account.")
        made = self.handed_out.get(request.session_hash)
        if made is None:
            raise UserError("there is no checkpoint to push (any more). Make one first.")
        name = repository_name(name, made)
        # Given outright, also below: the client falls back on the token of this machine.
        api = HfApi(token=secret(token))

        def work(report: Any) -> Any:
            return self._push(api, request.session_hash, made, name, public, report)

        url = yield from _shown(in_thread(work))
        kind = "public" if public else "private: nobody else sees it"
        yield (
            f'<p>Pushed to <a href="{escape(str(url))}" target="_blank" rel="noopener">'
            f"{escape(url.repo_id)}</a> ({kind}).</p>"
        )

    def failed(self) -> str:
        return "<p>Not pushed.</p>"

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page."""
        self._unfinished.pop(request.session_hash, None)

    def _push(
        self, api: HfApi, session: str, made: Made, name: str, public: bool, report: Any
    ) -> Any:
        """The address of the repository; UserError with what went wrong."""
        again = self._unfinished.get(session) == name
        try:
            report("creating the repository", None)
            url = api.create_repo(
                name, private=not public, exist_ok=again, repo_type="model", token=api.token
            )
            self._unfinished[session] = name
            with workspace() as folder:
                with ZipFile(made.zip) as archive:
                    archive.extractall(folder)
                report(f"uploading {format_bytes(made.bytes)} to {url.repo_id}", None)
                api.upload_folder(
                    repo_id=url.repo_id, folder_path=folder / made.name, repo_type="model",
                    commit_message="Checkpoint made with mlpmoe", token=api.token,
                )  # fmt: skip
        except CancelledError:
            raise
        except Exception as error:
            logger.warning("push failed: %s", type(error).__name__)  # no more: it may hold a token
            raise UserError(explain_push(error, name)) from None
        self._unfinished.pop(session, None)
        return url


def secret(token: gr.OAuthToken) -> str:
    """The visitor's token; UserError if the sign-in gave none."""
    if not isinstance(token.token, str) or not token.token:
        raise UserError("the sign-in is no longer valid. Sign out and in again.")
    return token.token


def repository_name(name: Any, made: Made) -> str:
    """name or owner/name, as it was typed, or the checkpoint's own; UserError for other names."""
    name = name.strip() if isinstance(name, str) else ""
    name = name or made.name
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            "a repository is called name or owner/name, of letters, digits, hyphens, dots and "
            "underscores, at most 96 characters."
        ) from None
    return name


def explain_push(error: BaseException, name: str) -> str:
    """One or two plain sentences for what the hub's client raised."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 409:
            return f"You have a repository {name} already. Choose another name."
        if status in (401, 403):
            return (
                f"The hub does not let this sign-in write to {name}. Sign out and in again and "
                "allow it to create repositories, and check the owner in the name."
            )
    if isinstance(error, FileNotFoundError):
        return "The checkpoint was removed meanwhile. Make it again."
    said = explain(error, name, None)
    if said.startswith("The download"):
        return f"The upload to {name} failed ({type(error).__name__}). Try again."
    return said


@dataclass(frozen=True)
class PushPanel:
    sign_in: gr.LoginButton
    name: gr.Textbox
    public: gr.Checkbox
    push: gr.Button
    status: gr.HTML


def push_panel() -> PushPanel:
    gr.Markdown("#### Push to your account\nWith your own sign-in, to your own account on the hub.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            sign_in = gr.LoginButton(SIGN_IN, SIGN_OUT, size="md", elem_id="sign-in")
            # its own listener would be a public endpoint
            sign_in.load_event_to_attach = None
        with gr.Column(scale=5, min_width=320):
            name = gr.Textbox(
                label="Repository", info="name or owner/name; empty: as the checkpoint is called",
                max_lines=1, max_length=200, elem_id="repository",
            )  # fmt: skip
            public = gr.Checkbox(False, label="Everybody may see it", elem_id="push-public")
            push = gr.Button("Push to my account", interactive=False, elem_id="push")
            status = gr.HTML("", elem_id="push-status")
    return PushPanel(sign_in, name, public, push, status)


def wire_push(handlers: PushHandlers, panel: PushPanel, demo: gr.Blocks) -> None:
    demo.load(readable(handlers.show_account), None, [panel.sign_in, panel.push], **QUIET)
    pushed = panel.push.click(
        readable(handlers.push), [panel.name, panel.public], panel.status, trigger_mode="once",
        **PUSH_QUEUE, **QUIET,
    )  # fmt: skip
    pushed.failure(handlers.failed, None, panel.status, **QUIET)
    demo.unload(handlers.leave)


def _shown(work: Generator[str, None, Any]) -> Generator[str, None, Any]:
    """What the work says, as HTML; returns what it returns."""
    while True:
        try:
            message = next(work)
        except StopIteration as done:
            return done.value
        yield status(f"{message} …")
