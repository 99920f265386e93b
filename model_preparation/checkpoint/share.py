"""Uploads a checkpoint to a repository on ModelScope or Hugging Face.

The repository gets the chosen files that checkpoint_info.json lists, and checkpoint_info.json without this
machine's paths. It also gets README.md (the card), and NOTICE if a licence asks for it. The checkpoint's
folder is only read.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from model_preparation.checkpoint.checkpoint_info import (
    EVALUATIONS,
    INFO,
    MODULE,
    STATE_DICT,
    TOKENIZER,
    current_score,
    needs_parent,
    read_info,
)
from model_preparation.checkpoint.model_card import MEASURED, card_text, read_card
from model_preparation.errors import SurgeryError
from model_preparation.hub.download import first_line
from model_preparation.hub.licences import check_name, licence_of, terms_of
from model_preparation.hub.upload import HUBS
from model_preparation.io.digests import fault_of
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.text import read_text
from model_preparation.io.untrusted.not_a_model import stand_in, what_it_is

CARD, NOTICE, README = "README.md", "NOTICE", "README.txt"
# Files at the root that only transformers' from_pretrained reads; format pt does not need them.
_HF_ONLY = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
_WHAT = ("auto", "pt", "hf", "recipe")
_LOCAL_PATH = re.compile(r"(~([A-Za-z_]\w*)?|\.\.?|[A-Za-z]:)?[/\\]|file:")  # of any operating system


@dataclass(frozen=True)
class UploadPlan:
    """The files of an upload.

    Attributes:
        licence: the id of the licence.
        recorded: {"bytes", "sha256"} of files in `directory`, by path.
        texts: contents of files made for the hub, by path.
        left_out: files of `directory` that are not uploaded.
    """

    directory: Path
    repo: str
    hub: str
    revision: str | None
    licence: str
    recorded: dict[str, dict]
    texts: dict[str, bytes]
    left_out: list[str]

    def sizes(self) -> dict[str, int]:
        """The size of every uploaded file in bytes, by path, sorted."""
        sizes = {name: entry["bytes"] for name, entry in self.recorded.items()}
        sizes |= {name: len(content) for name, content in self.texts.items()}
        return dict(sorted(sizes.items()))


def share_checkpoint(
    directory: str | Path,
    *,
    repo: str,
    private: bool = False,
    message: str | None = None,
    verify: bool = True,
    **choices: Any,
) -> str:
    """Upload a checkpoint with a card; returns the address of its page. Files that the hub has are not sent again.

    The arguments are those of `plan_upload` and `upload`.

    Raises:
        SurgeryError: as these two functions do.
    """
    plan = plan_upload(directory, repo=repo, **choices)
    return upload(plan, private=private, message=message, verify=verify)


def plan_upload(
    directory: str | Path,
    *,
    repo: str,
    hub: str = "modelscope",
    what: str = "auto",
    revision: str | None = None,
    licence: str | None = None,
    card: str | Path | None = None,
) -> UploadPlan:
    """Choose the files of an upload. The hub is not contacted.

    Args:
        directory: a complete checkpoint folder.
        repo: org/name.
        hub: "modelscope" or "huggingface".
        what: "pt" or "hf" for one format's files, "auto" for all files, "recipe" for checkpoint_info.json,
            README.txt, README.md and NOTICE only.
        revision: the branch; by default the hub's default branch.
        licence: the licence's id; needed if base and donor do not determine it.
        card: a README.md to upload instead of the generated card. It also names the licence.

    Raises:
        SurgeryError: if the checkpoint is not complete or lacks the format; if a file is missing, has another size or
            lies outside the folder; if the licence is unknown, or its terms forbid the repository's name.
    """
    for choice, known in ((hub, HUBS), (what, _WHAT)):
        if choice not in known:
            raise SurgeryError(f"{choice!r} cannot be chosen. Choose one of {', '.join(known)}.")
    directory = Path(directory).expanduser()
    info = read_info(directory)
    try:
        recorded, what = _select(info, what, directory)
        for name in recorded:
            _check_file(directory, name, recorded[name])
        card_content = None if card is None else _read_card_file(Path(card).expanduser())
        licence = licence_of(info, licence if card_content is None else read_card(card_content))
        terms = terms_of(info, licence)
        check_name(repo, terms)
        shared = _without_paths(info)
        if shared.get(MEASURED, {}).get("model"):  # scores from before 0.2.0 lack this field
            from model_preparation.checkpoint.model_digests import recorded_weights  # imports torch

            if current_score(shared, recorded_weights(directory)) is None:
                del shared[MEASURED]  # it was measured on other weights than the recorded ones
                shared["mmlu_score"] = None
        if what != "recipe":
            shared |= {"files": recorded, "format": what}
        if card_content is None:
            card_content = card_text(shared, repo=repo, hub=hub, what=what, licence=licence, revision=revision)
    except (KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{directory / INFO} lacks a field or has a wrong one ({first_line(error)}). Build the checkpoint again."
        ) from error
    texts = {CARD: card_content, INFO: with_checksum(shared).decode()}
    if terms:
        texts[NOTICE] = "".join(f"{term.notice}\n" for term in terms)
    files = (path.relative_to(directory) for path in directory.rglob("*") if not path.is_dir())
    present = {f"{EVALUATIONS}/" if file.parts[0] == EVALUATIONS else file.as_posix() for file in files}
    return UploadPlan(
        directory=directory,
        repo=repo,
        hub=hub,
        revision=revision,
        licence=licence,
        recorded=recorded,
        texts={name: text.encode() for name, text in texts.items()},
        left_out=sorted(present - recorded.keys() - {INFO}),
    )


def upload(plan: UploadPlan, *, private: bool = False, message: str | None = None, verify: bool = True) -> str:
    """Upload the files of a plan; returns the address of the repository's page.

    Args:
        private: make a new repository private; refuse an existing public one.
        message: the commit's message.
        verify: before the upload, compare every recorded file with its SHA-256.

    Raises:
        SurgeryError: if there is no token, the hub cannot be reached or refuses, or a file is changed.
    """
    hub = HUBS[plan.hub]()
    is_private = hub.look_up(plan.repo)
    if private and is_private is False:
        raise SurgeryError(
            f"{plan.repo} exists on {hub.title} and is public, so nothing was uploaded. Make it private on its page, "
            "or choose another --repo."
        )
    if verify:
        verify_files(plan.directory, plan.recorded)
    uploaded: dict[str, str] = {}
    if is_private is None:
        hub.create(plan.repo, private=private, licence=plan.licence)
    else:
        uploaded = hub.digests(plan.repo, plan.revision)
    digests = {name: entry["sha256"] for name, entry in plan.recorded.items()}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in plan.texts.items()}
    missing = {name for name, digest in digests.items() if uploaded.get(name) != digest}
    if missing:
        with tempfile.TemporaryDirectory(prefix="share-") as temporary:
            _stage(plan, missing, Path(temporary))
            message = message or f"Upload {plan.directory.resolve().name}"
            hub.upload(Path(temporary), plan.repo, plan.revision, message)
    return f"{hub.endpoint}/{'models/' if plan.hub == 'modelscope' else ''}{plan.repo}"


def verify_files(directory: Path, recorded: Mapping[str, dict]) -> None:
    """Raise SurgeryError if a file's size or SHA-256 differs from the recorded one."""
    with bar("Verifying", sum(entry["bytes"] for entry in recorded.values()), in_bytes=True) as advance:
        for name, entry in recorded.items():
            if fault := fault_of(directory / name, entry, advance):
                raise SurgeryError(f"{directory / name} is {fault}. Build or copy the checkpoint again.")


def _select(info: dict[str, Any], what: str, directory: Path) -> tuple[dict[str, dict], str]:
    """The recorded files that `what` selects, and their format: "pt", "hf", "both" or "recipe"."""
    built_format = info.get("format", "pt")
    if what == "recipe" and needs_parent(info):
        raise SurgeryError(
            f"{directory} cannot be rebuilt from a recipe alone: it was healed, or needs its parent checkpoint. "
            "Share the files: leave --what out."
        )
    if what == "auto":
        what = built_format
    elif what in ("pt", "hf") and built_format not in (what, "both"):
        raise SurgeryError(
            f"{directory} has the format {built_format}, not {what}. Leave --what out, or build with --format {what}."
        )
    pt_only = {name for name in info["files"] if name in (MODULE, STATE_DICT) or name.startswith(f"{TOKENIZER}/")}
    hf_only = {name for name in info["files"] if "/" not in name and any(fnmatch(name, one) for one in _HF_ONLY)}
    left_out = {"both": set(), "recipe": set(info["files"]) - {README}, "pt": hf_only, "hf": pt_only}[what]
    # The upload has its own texts under these names.
    left_out |= {CARD, NOTICE, INFO}
    return {name: entry for name, entry in sorted(info["files"].items()) if name not in left_out}, what


def _check_file(directory: Path, name: str, recorded: Mapping[str, Any]) -> None:
    parts = PureWindowsPath(name)  # splits at / and \ alike
    path = directory / name
    if parts.anchor or ".." in parts.parts or not _real(path).is_relative_to(_real(directory)):
        raise SurgeryError(
            f"{path} leads out of the checkpoint's folder, so it is not uploaded. Replace it by the file itself."
        )
    if not path.is_file():
        raise SurgeryError(what_it_is(path) or f"{path} is missing. Build or copy the checkpoint again.")
    if (size_bytes := path.stat().st_size) != recorded["bytes"]:
        raise SurgeryError(
            stand_in(path)
            or f"{path} is {size_bytes} bytes long instead of {recorded['bytes']}. Build or copy the checkpoint again."
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, it accepts a link that points to itself


def _read_card_file(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The card {path} cannot be read ({error}). Give a Markdown file with --card.") from error


def _without_paths(value: Any) -> Any:
    """A field's value for the hub: of this machine's paths, only the last part stays."""
    if isinstance(value, dict):
        named = {"name": value["id"]} if value.get("hub") == "local" and "name" in value else {}
        fields = {_without_paths(name): _without_paths(field) for name, field in value.items() if name != "path"}
        return fields | named
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _LOCAL_PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _stage(plan: UploadPlan, names: set[str], folder: Path) -> None:
    """Fill `folder` with the files `names`: links to files of the checkpoint, and the texts of the plan."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in plan.texts:
            path.write_bytes(plan.texts[name])
        else:
            path.symlink_to((plan.directory / name).resolve())
