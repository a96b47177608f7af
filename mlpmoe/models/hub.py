"""The Hugging Face hub: what a repository holds, fetching it, and what its errors mean."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
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

from .catalogue import CATALOGUE, CatalogueEntry
from .checkpoint import CONFIG, Checkpoint, folder_checkpoint, read_config, weight_files
from .errors import ModelError
from .names import on_space

METADATA_TIMEOUT = 15  # seconds until an answer about a repository has to begin

logger = logging.getLogger(__name__)


def find_on_hub(repo_id: str, revision: str | None, token: str | None) -> Checkpoint:
    """The checkpoint `repo_id` at the commit that `revision` (default: main) now stands for.

    Downloads nothing but config.json, and a shard index. Where the hub cannot be reached, the
    hub's cache on this machine answers if it holds the whole model. Raises ModelError.
    """
    if constants.is_offline_mode():
        return _cached(repo_id, revision, "This machine is set to work offline")
    access = _access(token)
    try:
        return _listed(repo_id, revision, access)
    except ModelError:
        raise
    except Exception as error:  # transport errors are httpx's or httpx2's, by client version
        problem = explain(error, repo_id, revision)
        if _is_outage(error):
            return _cached(repo_id, revision, problem.removesuffix("."))
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
    """The catalogue's models that load without network: shipped, or whole in the hub's cache."""
    return [entry for entry in CATALOGUE if _is_on_this_machine(entry.source)]


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
        raise ModelError(f"The hub's answer about {repo_id} names no commit. Try again later.")
    sizes = {
        file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename
    }
    if info.gated and CONFIG in sizes:
        # The listing of a gated model is public, and files in the cache would be used without
        # asking, so ask for a file: somebody else may have downloaded it.
        url = hf_hub_url(repo_id, CONFIG, revision=info.sha)
        get_hf_file_metadata(url, token=access, timeout=METADATA_TIMEOUT)
    licence = getattr(info.card_data, "license", None)
    return Checkpoint(
        repo_id, sizes, _fetcher(repo_id, revision, info.sha, access), info.sha,
        licence=licence if isinstance(licence, str) else None,
    )  # fmt: skip


def _fetcher(
    repo_id: str, revision: str | None, sha: str, access: str | bool | None
) -> Callable[[str], Path]:
    def fetch(file: str) -> Path:
        try:
            # Asking by branch once makes the cache note which commit it stands for, so that the
            # model is found again without network.
            if file == CONFIG:
                path = Path(hf_hub_download(repo_id, file, revision=revision, token=access))
                if path.parent.name == sha:
                    return path
            return Path(hf_hub_download(repo_id, file, revision=sha, token=access))
        except Exception as error:
            raise ModelError(explain(error, repo_id, revision)) from error

    return fetch


def _cached(repo_id: str, revision: str | None, reason: str) -> Checkpoint:
    """The checkpoint in the hub's cache if it is whole; else ModelError: reason, and what works."""
    path = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
    if isinstance(path, str):
        folder = Path(path).parent
        try:
            checkpoint = folder_checkpoint(folder, repo_id, revision=folder.name)
            weight_files(checkpoint)
        except ModelError as error:
            logger.debug("The cache does not hold all of %s: %s", repo_id, error)
        else:
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
        read_config(folder_checkpoint(source, source.name))
    except ModelError:
        return False
    return True


def _access(token: str | None) -> Any:
    """The token for the client: without one, that of the person who is signed in, if any.

    A Space is different: the token in its environment is the owner's, and must not open the
    owner's private and gated models to every visitor.
    """
    return False if token is None and on_space() else token


def _is_transport(error: BaseException) -> bool:
    module = type(error).__module__.split(".")[0]
    return module in ("httpx", "httpx2") or isinstance(error, (ConnectionError, TimeoutError))


def _is_outage(error: BaseException) -> bool:
    """No network, or a hub that is down: not an answer about this model."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return _is_transport(error)
