"""Uploads a folder to ModelScope or Hugging Face, through each hub's own client.

Both clients stream, so memory does not grow with the files. They do not send files that the hub already has. The
clients read tokens, endpoints and stored logins (MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT; HF_TOKEN, HF_ENDPOINT).
This file adds two things: an error within seconds if a hub cannot be reached, and a readable message for every error
of a client.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from model_preparation.errors import SurgeryError
from model_preparation.hub.download import ANSWER_SECONDS, CONNECT_SECONDS, first_line


class Hub(Protocol):
    """A hub to upload to. Its methods raise SurgeryError if the hub refuses, fails or cannot be reached."""

    title: str
    endpoint: str

    def look_up(self, repo: str) -> bool | None:
        """Sign in. Return whether the repository is private; None if the token sees no such repository."""

    def create(self, repo: str, *, private: bool, licence: str) -> None:
        """Make the repository."""

    def digests(self, repo: str, branch: str | None) -> dict[str, str]:
        """The SHA-256 of the branch's files, by path. Files for which the hub gives no SHA-256 are left out."""

    def upload(self, folder: Path, repo: str, branch: str | None, message: str) -> None:
        """Commit all files of `folder` to the branch's root. Follow links. The branch keeps its other files."""


class ModelScopeHub:
    """ModelScope. Its client cannot make a branch, so the branch must exist."""

    title = "ModelScope"

    def __init__(self) -> None:
        from modelscope_hub import HubApi, get_default_config

        self._api = HubApi()
        config = get_default_config()
        self.endpoint, self._token = str(config.endpoint), config.token

    def look_up(self, repo: str) -> bool | None:
        import requests
        from modelscope_hub import NotExistError, Visibility

        if not self._token:
            raise SurgeryError(
                "No ModelScope token is set, but uploading needs one that may write. Make one on the page "
                "modelscope.cn/my/myaccesstoken, then set MODELSCOPE_API_TOKEN to it, or run `modelscope login`."
            )
        with self._errors(repo):
            # The client retries for a long time, so first check that the hub answers.
            timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
            requests.get(self.endpoint, timeout=timeout, allow_redirects=False, stream=True).close()
            self._api.whoami()
            try:
                visibility = self._api.get_repo(repo, "model").visibility
            except NotExistError:
                return None
        return visibility is not None and visibility != Visibility.PUBLIC

    def create(self, repo: str, *, private: bool, licence: str) -> None:
        with self._errors(repo):
            self._api.create_repo(repo, "model", visibility="private" if private else "public", license=licence)

    def digests(self, repo: str, branch: str | None) -> dict[str, str]:
        from modelscope_hub import NotExistError

        with self._errors(repo):
            try:
                files = self._api.list_repo_files(repo, "model", revision=branch)
            except NotExistError as error:
                if branch is None:
                    return {}  # a repository without commits
                raise SurgeryError(
                    f"{repo} on ModelScope has no branch {branch}, and its client cannot make one. "
                    "Make it on the repository's page, or leave --revision out."
                ) from error
        return {str(file.path): file.sha256 for file in files if file.sha256}

    def upload(self, folder: Path, repo: str, branch: str | None, message: str) -> None:
        failures: list[str] = []

        def collect_failures(record: logging.LogRecord) -> bool:
            if record.levelno >= logging.ERROR:
                failures.append(record.getMessage())
            return record.levelno == logging.WARNING

        # The client gives the reason for a failed file only in its log. It also prints a report, which goes to stderr.
        log = logging.getLogger("modelscope_hub.upload")
        log.addFilter(collect_failures)
        try:
            with self._errors(repo, failures), contextlib.redirect_stdout(sys.stderr):
                self._api.upload_folder(repo, "model", folder, commit_message=message, revision=branch)
        finally:
            log.removeFilter(collect_failures)

    @contextlib.contextmanager
    def _errors(self, repo: str, failures: Sequence[str] = ()) -> Iterator[None]:
        """Turn the client's errors into SurgeryError; `failures` are reasons from its log."""
        import requests
        from modelscope_hub import AuthenticationError, HubError, NetworkError, PermissionDeniedError

        try:
            yield
        except (HubError, requests.RequestException, RuntimeError) as error:
            place = f"ModelScope ({self.endpoint})"
            if isinstance(error, AuthenticationError):
                sentences = f"{place} does not accept the token. Set MODELSCOPE_API_TOKEN to a valid one."
            elif isinstance(error, PermissionDeniedError):
                sentences = _denied(place, repo, str(error.message), "MODELSCOPE_API_TOKEN")
            elif failures:
                reason = failures[0].partition("\n")[0]
                denied = f"[{PermissionDeniedError.error_code}]" in reason
                sentences = (
                    _denied(place, repo, reason, "MODELSCOPE_API_TOKEN") if denied else _broken_off(place, repo, reason)
                )
            elif isinstance(error, NetworkError | requests.ConnectionError | requests.Timeout):
                sentences = _unreachable(place, type(error).__name__, "MODELSCOPE_ENDPOINT")
            else:
                sentences = _broken_off(place, repo, first_line(error))
            raise SurgeryError(sentences) from error


class HuggingFaceHub:
    """Hugging Face, or the server that HF_ENDPOINT names."""

    title = "Hugging Face"

    def __init__(self) -> None:
        from huggingface_hub import HfApi, get_token

        self._api = HfApi()
        self.endpoint, self._token = self._api.endpoint, get_token()

    def look_up(self, repo: str) -> bool | None:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        if not self._token:
            raise SurgeryError(
                "No Hugging Face token is set, but uploading needs one that may write. Make one on the page "
                "huggingface.co/settings/tokens, then set HF_TOKEN to it, or run `hf auth login`."
            )
        with self._errors(repo):
            private = None
            try:
                # This call comes first, because it is the client's only one with a time limit.
                private = bool(self._api.model_info(repo, timeout=ANSWER_SECONDS).private)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                pass  # or the token is not valid: `whoami` checks that
            self._api.whoami()
        return private

    def create(self, repo: str, *, private: bool, licence: str) -> None:
        with self._errors(repo):
            self._api.create_repo(repo, private=private)

    def digests(self, repo: str, branch: str | None) -> dict[str, str]:
        from huggingface_hub.errors import RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._errors(repo):
            try:
                tree = list(self._api.list_repo_tree(repo, recursive=True, revision=branch))
            except RevisionNotFoundError:
                return {}
        return {file.path: file.lfs.sha256 for file in tree if isinstance(file, RepoFile) and file.lfs}

    def upload(self, folder: Path, repo: str, branch: str | None, message: str) -> None:
        with self._errors(repo):
            if branch is not None:
                self._api.create_branch(repo, branch=branch, exist_ok=True)
            self._api.upload_folder(repo_id=repo, folder_path=folder, revision=branch, commit_message=message)

    @contextlib.contextmanager
    def _errors(self, repo: str) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        try:
            yield
        # The client wraps a failed upload in RuntimeError, and a refused model card in ValueError.
        except (HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
            place = f"Hugging Face ({self.endpoint})"
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if isinstance(cause, OfflineModeIsEnabled):
                sentences = f"{place} was not contacted, because HF_HUB_OFFLINE is set. Run `unset HF_HUB_OFFLINE`."
            elif not isinstance(cause, HTTPError):
                sentences = _broken_off(place, repo, first_line(cause))
            elif not isinstance(cause, HfHubHTTPError):
                sentences = _unreachable(place, first_line(cause), "HF_ENDPOINT")
            elif cause.response.status_code == 401:
                sentences = f"{place} does not accept the token. Set HF_TOKEN to a valid one."
            elif cause.response.status_code == 403:
                sentences = _denied(place, repo, cause.server_message or first_line(cause), "HF_TOKEN")
            else:
                sentences = _broken_off(place, repo, cause.server_message or first_line(cause))
            raise SurgeryError(sentences) from error


HUBS: dict[str, Callable[[], Hub]] = {"modelscope": ModelScopeHub, "huggingface": HuggingFaceHub}


def _denied(place: str, repo: str, reason: str, variable: str) -> str:
    return (
        f"{place} does not let you write to {repo} ({reason.rstrip('.')}). Check the name before the /, and that the "
        f"token in {variable} may write there."
    )


def _unreachable(place: str, reason: str, variable: str) -> str:
    return f"{place} cannot be reached ({reason}). Check the network connection, or set {variable} to another address."


def _broken_off(place: str, repo: str, reason: str) -> str:
    return (
        f"The upload to {repo} failed: {place} said {reason.rstrip('.')}. Run the command again; "
        "files that arrived are not sent again."
    )
