"""Downloads files of a hub's repository (a model or a data set), or finds them in the hub's cache.

sources.py turns short names into ids. The hubs' own clients download the files. So caches, mirrors, offline modes and
tokens work as the clients' documentation says (MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN; HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). If a hub cannot be reached, this module returns the cached copy and the reason
within seconds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

TITLES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}
# Limits of the first request. Behind a firewall that drops packets, one client waits for minutes, the other for ever.
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 6.0

# Only these files of a repository are fetched.
TOKENIZER_PATTERNS = [
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
]
_MODEL_PATTERNS = [*TOKENIZER_PATTERNS, "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
_PICKLE_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Files in subfolders (original/, onnx/) and consolidated.* have the same weights in formats that are not read here.
_IGNORED_PATTERNS = ["*/*", "consolidated*"]

RepoType = Literal["model", "dataset"]
Need = Literal["model", "tokenizer"]


@dataclass(frozen=True)
class Snapshot:
    """A folder with files of a repository, as a hub's client returned it.

    Attributes:
        revision: Hugging Face's commit, or ModelScope's branch or tag (its client gives no commit); None if unknown.
        trouble: why the hub did not answer, or why the download failed; None if it succeeded.
        known_missing: if there is `trouble`, the files that the hub has and the folder lacks.
    """

    folder: Path
    revision: str | None
    trouble: str | None = None
    known_missing: tuple[str, ...] = ()


class NoSnapshot(Exception):
    """Neither a hub nor its cache has the files; the message says why."""


def fetch_model(hub: str, repo: str, revision: str | None, need: Need) -> Snapshot:
    """Fetch the files that a model needs. For the need "tokenizer", fetch only its files and config.json."""
    fetch = partial(fetch_snapshot, hub, repo, revision, ignore_patterns=_IGNORED_PATTERNS)
    if need == "tokenizer":
        return fetch(TOKENIZER_PATTERNS)
    snapshot = fetch(_MODEL_PATTERNS)
    if any(snapshot.folder.glob("*.safetensors*")):
        return snapshot
    # Pickles hold the same weights again, so they are fetched only if there are no safetensors.
    return fetch([*_MODEL_PATTERNS, *_PICKLE_PATTERNS])


def fetch_snapshot(
    hub: str,
    repo: str,
    revision: str | None,
    allow_patterns: list[str],
    *,
    ignore_patterns: list[str],
    repo_type: RepoType = "model",
) -> Snapshot:
    """The matching files of a repository, downloaded if necessary. If the hub does not answer, the cache is used.

    Args:
        hub: a key of `TITLES`.
        repo, revision: the repository's id and its branch, tag or commit; None means the hub's default branch.
        allow_patterns, ignore_patterns: `fnmatch` patterns of paths in the repository; `*` matches `/` too. For each
            folder that `allow_patterns` name without `*`, ModelScope's client sends one request.

    Raises:
        NoSnapshot: if neither the hub nor its cache has the files.
    """
    return _CLIENTS[hub](repo, revision, allow_patterns, ignore_patterns, repo_type)


def _from_modelscope(
    repo: str, revision: str | None, patterns: list[str], ignore_patterns: list[str], repo_type: RepoType
) -> Snapshot:
    import requests
    from modelscope.hub.api import HubApi
    from modelscope.hub.errors import CacheNotFound, HubError
    from modelscope.hub.snapshot_download import snapshot_download

    endpoint = HubApi().endpoint
    download = partial(snapshot_download, repo, revision, repo_type=repo_type)
    trouble = None
    try:
        # The client retries for about 20 s, so first check that the hub answers. With MODELSCOPE_PREFER_AI_SITE, the
        # client chooses between two sites, so nothing is checked.
        if not os.environ.get("MODELSCOPE_PREFER_AI_SITE"):
            timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
            requests.get(endpoint, timeout=timeout, allow_redirects=False, stream=True).close()
        folder = Path(download(allow_patterns=patterns, ignore_patterns=ignore_patterns))
    except (HubError, requests.RequestException) as error:
        trouble = f"({endpoint}) {_modelscope_trouble(error)}"
        try:
            folder = Path(download(local_files_only=True))
        except CacheNotFound as absent:
            raise NoSnapshot(f"{trouble}, and there is no copy at {absent.cache_dir}") from error
    depth = len(revision.split("/")) if revision else 1
    if folder.parts[-depth - 1] == "snapshots":
        return Snapshot(folder, "/".join(folder.parts[-depth:]), trouble)
    # Versions before 1.38 kept one folder per repository, without its revision.
    if trouble and revision:
        raise NoSnapshot(f"{trouble}, and {folder} does not say whether it holds {revision}")
    return Snapshot(folder, revision, trouble)


def _modelscope_trouble(error: Exception) -> str:
    import requests
    from modelscope.hub.errors import AuthenticationError, NetworkError, NotExistError, PermissionDeniedError

    cause = error.__cause__ or error  # older functions of the client wrap its errors in requests' HTTPError
    if isinstance(cause, NotExistError):
        return "has no such repository or revision, or it is private (its token goes into MODELSCOPE_API_TOKEN)"
    if isinstance(cause, (AuthenticationError, PermissionDeniedError)):
        return "denies access (a token goes into MODELSCOPE_API_TOKEN)"
    if isinstance(error, (NetworkError, requests.ConnectionError, requests.Timeout)):
        return f"cannot be reached ({type(error).__name__})"
    return f"failed ({first_line(error)})"


def _from_huggingface(
    repo: str, revision: str | None, patterns: list[str], ignore_patterns: list[str], repo_type: RepoType
) -> Snapshot:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError, IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled

    download = partial(
        snapshot_download,
        repo,
        repo_type=repo_type,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=ignore_patterns,
    )
    try:
        # First check that the hub answers: the client's own first request has no time limit.
        HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=ANSWER_SECONDS)
        folder = Path(download())
        return Snapshot(folder, folder.name)
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, ValueError) as error:
        trouble = f"({constants.ENDPOINT}) {_huggingface_trouble(error)}"
        try:
            folder = Path(download(local_files_only=True))
            return Snapshot(folder, folder.name, trouble)
        except IncompleteSnapshotError as incomplete:
            folder = Path(incomplete.snapshot_path)
            return Snapshot(folder, folder.name, trouble, _listed_but_absent(repo, folder, download.keywords))
        except (LocalEntryNotFoundError, ValueError):
            raise NoSnapshot(f"{trouble}, and there is no copy in {constants.HF_HUB_CACHE}") from error


def _listed_but_absent(repo: str, folder: Path, asked_for: dict[str, Any]) -> tuple[str, ...]:
    """Files that the snapshot lacks, according to the hub's listing in the client's cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.utils import filter_repo_objects

    listed = [file.path for file in get_cached_repo_tree(repo, repo_type=asked_for["repo_type"], revision=folder.name)]
    patterns = {name: asked_for[name] for name in ("allow_patterns", "ignore_patterns")}
    return tuple(path for path in filter_repo_objects(listed, **patterns) if not (folder / path).is_file())


def _huggingface_trouble(error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return "was not contacted, because HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "restricts access (ask for it on the repository's page; a token goes into HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "has no such repository, or it is private (a token goes into HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return "has the repository, but not this revision"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"cannot be reached ({first_line(error)}; HF_ENDPOINT may name a mirror)"
    return f"failed ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


_Client = Callable[[str, str | None, list[str], list[str], RepoType], Snapshot]
_CLIENTS: dict[str, _Client] = {"modelscope": _from_modelscope, "huggingface": _from_huggingface}
