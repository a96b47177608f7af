"""The Hugging Face hub: what a repository holds, fetching it, and what its errors mean."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from .catalogue import CATALOGUE, CatalogueEntry
from .checkpoint import (
    CARD,
    CONFIG,
    Checkpoint,
    card_facts,
    folder_checkpoint,
    read_config,
    weight_files,
)
from .errors import ModelError
from .gguf_choice import is_gguf
from .names import serves_visitors

SHIPPED, PACKAGED = "shipped", "from its package"
IN_CACHE, FROM_HUB = "in the hub's cache", "from the hub"
METADATA_TIMEOUT = 15  # seconds until an answer about a repository has to begin

logger = logging.getLogger(__name__)


def find_on_hub(
    repo_id: str, revision: str | None, token: str | None, gguf: str | None = None
) -> Checkpoint:
    """The checkpoint `repo_id` at the commit that `revision` (default: main) now stands for.

    Downloads nothing but config.json, and a shard index. Where the hub cannot be reached, the
    hub's cache on this machine answers if it holds the whole model, or the GGUF file that is
    named. Raises ModelError.
    """
    if constants.is_offline_mode():
        return _cached(repo_id, revision, gguf, "This machine is set to work offline")
    access = _access(token)
    try:
        return _listed(repo_id, revision, access)
    except ModelError:
        raise
    except Exception as error:  # transport errors are httpx's or httpx2's, by client version
        problem = explain(error, repo_id, revision)
        if _is_outage(error):
            return _cached(repo_id, revision, gguf, problem.removesuffix("."))
        raise ModelError(problem) from error


def download(
    repo_id: str,
    revision: str,
    files: Sequence[str],
    token: str | None,
    tqdm_class: type | None = None,
) -> Path:
    """Folder that holds `files` of that commit, downloaded where the cache lacks them."""
    paths = [try_to_load_from_cache(repo_id, file, revision=revision) for file in files]
    if all(isinstance(path, str) for path in paths):
        return Path(paths[0]).parent
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=_access(token),
                allow_patterns=list(files),
                tqdm_class=tqdm_class,
            )
        )
    except Exception as error:
        raise ModelError(explain(error, repo_id, revision)) from error


def is_cached(repo_id: str, file: str, revision: str) -> bool:
    """Whether that file of that commit is on this machine already."""
    return isinstance(try_to_load_from_cache(repo_id, file, revision=revision), str)


def cache_folder() -> Path:
    """Where downloads go."""
    return Path(constants.HF_HUB_CACHE)


def offline_models() -> list[CatalogueEntry]:
    """The catalogue's models that load without network: shipped, from an installed package, or
    whole in the hub's cache."""
    return [entry for entry in CATALOGUE if whereabouts(entry) != FROM_HUB]


def whereabouts(entry: CatalogueEntry) -> str:
    """Where the weights of a catalogue's model come from: SHIPPED, PACKAGED, IN_CACHE or FROM_HUB.
    Looks at this machine only."""
    if entry.packaged:
        return PACKAGED
    if not _is_on_this_machine(entry.source):
        return FROM_HUB
    return IN_CACHE if entry.hub_id else SHIPPED


def answers(seconds: float) -> bool:
    """Whether the hub can be asked at all, found out within so many seconds. Never raises."""
    if constants.is_offline_mode():
        return False
    found: list[bool] = []

    def ask() -> None:
        try:
            found.append(get_session().head(constants.ENDPOINT, timeout=seconds).status_code < 500)
        except Exception:
            logger.debug("the hub does not answer", exc_info=True)

    # In a thread: looking up the name of a host may take longer than any timeout says.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found == [True]


def explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """One or two plain sentences for an error of the hub's client."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the client's "not in the cache either" hides the reason
    for kind, sentence in (
        (
            GatedRepoError,
            f"{repo_id} is gated: accept its conditions on its page on huggingface.co, then sign "
            "in with a token (hf auth login).",
        ),
        (
            RepositoryNotFoundError,
            f"There is no model {repo_id} on the hub, or it is private. Check the spelling; for "
            "a private model sign in with a token (hf auth login).",
        ),
        (RevisionNotFoundError, f"{repo_id} has no branch, tag or commit {revision}."),
        (DisabledRepoError, f"{repo_id} was disabled by the hub."),
        (EntryNotFoundError, f"A file of {repo_id} has disappeared from the hub. Try again."),
        (OfflineModeIsEnabled, "This machine is set to work offline."),
    ):
        if isinstance(error, kind):
            return sentence
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, repo_id)
    if _is_transport(error):
        return "The model hub cannot be reached."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {repo_id} could not be downloaded."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "The folder of downloaded models cannot be written to."
    return f"The download of {repo_id} failed ({type(error).__name__}). Try again."


def _explain_status(status: int, repo_id: str) -> str:
    if status == 401:
        return "The hub does not accept the access token. Sign in again (hf auth login)."
    if status == 403:
        return f"The hub refuses access to {repo_id} with this token."
    if status == 429:
        return "The hub asks to wait: too many requests were sent from here. Try again later."
    if status >= 500:
        return f"The hub has a problem of its own (error {status}). Try again later."
    return f"The hub did not understand the request for {repo_id} (error {status})."


def _listed(repo_id: str, revision: str | None, access: str | bool | None) -> Checkpoint:
    info = HfApi().model_info(
        repo_id,
        revision=revision,
        files_metadata=True,
        timeout=METADATA_TIMEOUT,
        token=access,
    )
    if not info.sha:
        raise ModelError(
            f"The hub's answer about {repo_id} does not name a commit. Try again later."
        )
    sizes = {
        file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename
    }
    if info.gated and CONFIG in sizes:
        # The listing of a gated model is public, and files in the cache would be used without
        # asking, so ask for a file: somebody else may have downloaded it.
        url = hf_hub_url(repo_id, CONFIG, revision=info.sha)
        get_hf_file_metadata(url, token=access, timeout=METADATA_TIMEOUT)
    licence, base = card_facts(info.card_data.to_dict() if info.card_data else {})
    return Checkpoint(
        repo_id, sizes, _fetcher(repo_id, revision, info.sha, access), info.sha,
        licence=licence, base=base, beginning=_beginning(repo_id, info.sha, access),
    )  # fmt: skip


def _fetcher(
    repo_id: str, revision: str | None, sha: str, access: str | bool | None
) -> Callable[[str], Path]:
    def fetch(file: str) -> Path:
        try:
            # Asking by branch once makes the cache note which commit it stands for, so that the
            # model is found again without network.
            if file in (CONFIG, CARD):
                path = Path(hf_hub_download(repo_id, file, revision=revision, token=access))
                if path.parent.name == sha:
                    return path
            return Path(hf_hub_download(repo_id, file, revision=sha, token=access))
        except Exception as error:
            raise ModelError(explain(error, repo_id, revision)) from error

    return fetch


def _beginning(repo_id: str, sha: str, access: str | bool | None) -> Callable[[str, int], bytes]:
    def beginning(file: str, count: int) -> bytes:
        url = hf_hub_url(repo_id, file, revision=sha)
        headers = build_hf_headers(token=access) | {"Range": f"bytes=0-{count - 1}"}
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=METADATA_TIMEOUT, follow_redirects=True
            ) as answer:
                hf_raise_for_status(answer)
                content = bytearray()
                for piece in answer.iter_bytes():
                    content += piece
                    if len(content) >= count:  # from a server that sends all of it
                        break
                return bytes(content[:count])
        except Exception as error:
            raise ModelError(explain(error, repo_id, sha)) from error

    return beginning


def _cached(repo_id: str, revision: str | None, gguf: str | None, reason: str) -> Checkpoint:
    """The checkpoint in the hub's cache if it is whole; else ModelError: reason, and what works."""
    # a repository of GGUF files has no config.json, but a card
    for file in (gguf or CONFIG, CONFIG, CARD):
        path = try_to_load_from_cache(repo_id, file, revision=revision)
        if not isinstance(path, str):
            continue
        folder = Path(path).parent
        try:
            checkpoint = folder_checkpoint(folder, repo_id, revision=folder.name, links=True)
            if not gguf and (checkpoint.has_safetensors or not any(map(is_gguf, checkpoint.sizes))):
                weight_files(checkpoint)
        except ModelError as error:
            logger.debug("The cache does not hold all of %s: %s", repo_id, error)
        else:
            if not gguf or gguf in checkpoint.sizes:
                return checkpoint
    keys = ", ".join(entry.key for entry in offline_models()) or "none"
    raise ModelError(
        f"{reason}, and {repo_id} is not on this machine. "
        f"Models that work without network here: {keys}."
    )


def _is_on_this_machine(source: str | Path) -> bool:
    if isinstance(source, str):
        path = try_to_load_from_cache(source, CONFIG)
        if not isinstance(path, str):
            return False
        source = Path(path).parent
    try:
        checkpoint = folder_checkpoint(source, source.name, links=True)
        read_config(checkpoint)
        weight_files(checkpoint)
    except ModelError:
        return False
    return True


def _access(token: str | None) -> Any:
    """The token for the client: without one, that of the person who is signed in, if any.

    A Space is different: the token in its environment is the owner's, and must not open the
    owner's private and gated models to every visitor.
    """
    return False if token is None and serves_visitors() else token


def _is_transport(error: BaseException) -> bool:
    module = type(error).__module__.split(".")[0]
    return module in ("httpx", "httpx2") or isinstance(error, (ConnectionError, TimeoutError))


def _is_outage(error: BaseException) -> bool:
    """No network, or a hub that is down: not an answer about this model."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return _is_transport(error)
