"""Finds models: turns a name, a folder or a hub id into a local folder with every file needed.

`resolve` takes a short name of `TABLE`, the path of a folder, or `org/name[@revision]`. With `modelscope:` or
`huggingface:` before the id, only that hub is asked; `embedded:name` is a model in this package. download.py fetches
the files, and this module reports each missing file.
"""

import argparse
import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.hub.download import TITLES, TOKENIZER_PATTERNS, Need, NoSnapshot, fetch_model, first_line
from model_preparation.io.untrusted.not_a_model import snapshot_in, what_it_is
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json

# The target of each short name: anything that `resolve` takes. `--source NAME=TARGET` and the environment variable
# MODEL_PREPARATION_NAME replace it.
TABLE = {
    "llama": "modelscope:LLM-Research/Meta-Llama-3.1-8B-Instruct",
    "llama_tokenizer": "llama",  # so a folder given for llama also gives its tokenizer
    "llamba": "huggingface:cartesia-ai/Llamba-8B-untied",
    "unaligned_llamba": "huggingface:goombalab/Llamba-8B-untied-unaligned",
    "qwen3": "modelscope:Qwen/Qwen3-8B",
    "qwen2.5": "modelscope:Qwen/Qwen2.5-7B-Instruct",
    "mistral": "modelscope:LLM-Research/Mistral-7B-Instruct-v0.3",
    "tiny_llama": "embedded:tiny_llama",
    "tiny_llamba": "embedded:tiny_llamba",
}
# Both Llambas are published without their tokenizer, which is Llama's.
_TOKENIZER_OF = {"llamba": "llama_tokenizer", "unaligned_llamba": "llama_tokenizer"}
_ENVIRONMENT_PREFIX = "MODEL_PREPARATION_"  # the name follows in capitals, with _ for a dot

EMBEDDED = Path(__file__).parents[1] / "embedded"  # the models in this package, one folder each
_EMBEDDED_PREFIX = "embedded:"

_HUB_ID = re.compile(r"(?:(modelscope|huggingface):)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A local folder with a model's or a tokenizer's files, and where they came from.

    Attributes:
        hub: "local", "embedded", "modelscope" or "huggingface".
        id: the hub's id, or a local folder's name.
        revision: as in `Snapshot`.
    """

    folder: Path
    hub: str
    id: str
    revision: str | None

    def as_dict(self) -> dict[str, str | None]:
        """The fields for metadata.json and checkpoint_info.json; `path` only for a local folder."""
        origin = {"hub": self.hub, "id": self.id, "revision": self.revision}
        return origin | {"path": str(self.folder)} if self.hub == "local" else origin


def resolve(name: str, *, need: Need = "model", overrides: Mapping[str, str] | None = None) -> Source:
    """The model or tokenizer that `name` means. It is downloaded if necessary, and has every file that `need` asks for.

    A name of `TABLE` is looked up in `overrides`, then in the environment (MODEL_PREPARATION_LLAMA, ...), then in
    `TABLE`. An existing folder comes before a hub id of the same spelling; a target that starts with `./`, `../`, `/`
    or `~` is never a hub id. For a hub id without prefix, ModelScope is asked first, then Hugging Face. If a hub
    cannot be reached, its cached copy is used, with a logged warning.

    Args:
        name: a name of `TABLE`, a folder's path, or `[modelscope:|huggingface:]org/name[@revision]`.
        need: "model" asks for config.json and all weights, and downloads a tokenizer if there is one. "tokenizer", and
            the name `llama_tokenizer`, ask only for a tokenizer.
        overrides: other targets for names of `TABLE`, by name, as `--source` collects them.

    Raises:
        SurgeryError: if the name is unknown; if a folder or snapshot lacks files (the error lists them); if an index
            names files outside its folder; or if hubs have no such repository, or cannot be reached.
    """
    names, target = _look_up(name, overrides or {})
    if "llama_tokenizer" in names:
        need = "tokenizer"
    source = _local_or_embedded(target, need)
    if source is not None:
        return source
    hub, repo, revision = _hub_id(target)
    return _hub_source([hub] if hub else list(TITLES), repo, revision, need, name)


def donor_name(base: str, overrides: Mapping[str, str] | None = None) -> str | None:
    """The donor of a base, as a name or target for `resolve`; None if the donor is unknown. No hub is asked.

    The donor comes from distillation.json in the base's folder, or otherwise from the base's name.

    Raises:
        SurgeryError: if the base's name is unknown, or if its folder holds no model.
    """
    source = source_here(base, overrides)
    if source is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SurgeryError):
            donor = read_json(source.folder / "distillation.json")["donor"]
            target = hub_target(donor)
            if donor["hub"] != "local":
                return next((name for name in TABLE if TABLE[name] == target), target)
    return "llama" if base in _TOKENIZER_OF else None


def source_here(name: str, overrides: Mapping[str, str] | None = None) -> Source | None:
    """The model that `name` means, if it is on this machine; None for a hub id. No hub is asked.

    Raises:
        SurgeryError: if the name is unknown, or the folder lacks files.
    """
    target = target_named(name, overrides)
    source = _local_or_embedded(target, "model")
    if source is None:
        _hub_id(target)
    return source


def check_recorded(source: Mapping[str, Any]) -> None:
    """Raise ValueError unless `source` has the form of `Source.as_dict()`: model cards and commands quote its id."""
    check_fields(source, {"hub": str, "id": str, "revision": (NoneType, str), "path?": str})
    hub, name = source["hub"], source["id"]
    if hub in TITLES:
        target = hub_target(source)
        if _HUB_ID.fullmatch(target) is None or ".." in target:
            raise ValueError(f"{target!r:.200} is not a repository of {TITLES[hub]}")
    elif hub not in ("local", "embedded") or "/" in name:
        raise ValueError(f"its hub is {hub!r:.80} and its id {name!r:.80}")


def donors_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record of every donor in a checkpoint_info.json, the first donor first."""
    return [info["replacement_source"], *info.get("other_donors", [])]


def hub_target(source: Mapping[str, Any]) -> str:
    """The target of a recorded source from a hub or this package, such as huggingface:org/name@revision."""
    return f"{source['hub']}:{source['id']}" + (f"@{source['revision']}" if source["revision"] else "")


def target_of(source: Mapping[str, Any], advice: str) -> str:
    """The target, for `resolve`, of a source that a checkpoint_info.json records.

    Raises:
        SurgeryError: if the source is a local folder that does not exist; the message ends with `advice`.
    """
    if source["hub"] != "local":
        return hub_target(source)
    path = source.get("path")
    if path is None or not Path(path).is_dir():
        raise SurgeryError(f"The recipe names {path or source['id']}, but it is not here. {advice}")
    return path


def target_named(name: str, overrides: Mapping[str, str] | None = None) -> str:
    """The target that `name` means: a folder's path or a hub id.

    No model file is opened, and no hub is asked.

    Raises:
        SurgeryError: if the sources point to each other in a circle.
    """
    return _look_up(name, overrides or {})[1]


def folder_named(target: str) -> Path | None:
    """The folder of a local or embedded target; None if there is no such folder, as for a hub id."""
    if target.startswith(_EMBEDDED_PREFIX):
        return _embedded_source(target.removeprefix(_EMBEDDED_PREFIX)).folder
    folder = Path(os.path.expanduser(target))
    return folder if folder.is_dir() else None


def names_behind(name: str, overrides: Mapping[str, str] | None = None) -> list[str]:
    """All names of `TABLE` that `resolve` looks up for `name`."""
    return _look_up(name, overrides or {})[0]


def tokenizer_name(name: str) -> str | None:
    """The tokenizer's name in `TABLE`, for a model that is published without a tokenizer; otherwise None."""
    return _TOKENIZER_OF.get(name)


def is_replaced(name: str, overrides: Mapping[str, str]) -> bool:
    """Whether `overrides` or the environment give another target for a name of `TABLE`."""
    return name in TABLE and (name in overrides or bool(_in_environment(name)))


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer's files."""

    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    return (
        has("tokenizer.json")
        or has("tokenizer.model")
        or has("tokenizer_config.json", "vocab.json")
        or has("tokenizer_config.json", "vocab.txt")
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in the folder, and config.json, which loading needs too; sorted."""
    return sorted({path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()})


def add_source_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--source NAME=TARGET`, which may be repeated; its value is a dict for `resolve(overrides=...)`."""

    class AddSource(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            name, equals, target = values.partition("=")
            if not (equals and target):
                raise argparse.ArgumentError(self, f"{values!r} is not NAME=TARGET, such as llama=/path/to/folder")
            if name not in TABLE:
                raise argparse.ArgumentError(self, f"{name!r} is not one of the names {', '.join(TABLE)}")
            given = getattr(namespace, self.dest)
            if name in given:
                raise argparse.ArgumentError(self, f"{name} is given more than once")
            setattr(namespace, self.dest, given | {name: target})

    parser.add_argument(
        "--source",
        action=AddSource,
        default={},
        metavar="NAME=TARGET",
        help=f"take NAME ({', '.join(TABLE)}) from TARGET: a folder, or a hub id such as "
        f"huggingface:org/name@revision; may be repeated (environment: {_ENVIRONMENT_PREFIX}LLAMA and so on)",
    )


def _look_up(name: str, overrides: Mapping[str, str]) -> tuple[list[str], str]:
    """Follow `name` through overrides, environment and table; returns all names found, and the target.

    If the target is a repository's folder in a hub's cache, its snapshot is returned instead.
    """
    for unknown in overrides.keys() - TABLE.keys():
        raise SurgeryError(f"--source gives {unknown!r}, but the names are {', '.join(TABLE)}. Use one of them.")
    names: list[str] = []
    target = name
    while target in TABLE:
        if target in names:
            raise SurgeryError(
                f"The sources for {' and '.join(names)} point to each other in a circle. "
                f"If {target} is a folder, write ./{target}."
            )
        names.append(target)
        target = overrides.get(target) or _in_environment(target) or TABLE[target]
    return names, str((target and snapshot_in(Path(os.path.expanduser(target)))) or target)


def _in_environment(name: str) -> str | None:
    return os.environ.get(_ENVIRONMENT_PREFIX + name.upper().replace(".", "_"))


def _local_or_embedded(target: str, need: Need) -> Source | None:
    """The source of an embedded target or a folder; None for a hub id."""
    if target.startswith(_EMBEDDED_PREFIX):
        return _embedded_source(target.removeprefix(_EMBEDDED_PREFIX))
    folder = Path(os.path.expanduser(target))
    is_path = target.startswith(("/", "./", "../", "~")) or target in (".", "..")
    return _local_source(folder, need) if target and (folder.exists() or is_path) else None


def _hub_id(target: str) -> tuple[str | None, str, str | None]:
    """(hub or None, repository, revision or None) of a hub id; raises SurgeryError for anything else."""
    match = _HUB_ID.fullmatch(target)
    if match is None or ".." in target:
        raise SurgeryError(
            f"{target!r} is neither one of the names {', '.join(TABLE)}, nor a folder, nor a hub id such as "
            "org/name or org/name@revision. Check its spelling, or give the path of a folder."
        )
    return match[1], match[2], match[3]


# --- Folders ----------------------------------------------------------------------------------------------------------


def _local_source(folder: Path, need: Need) -> Source:
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise SurgeryError(
            what_it_is(folder)
            or f"{folder} is {'a file' if folder.exists() else 'not there'}. Give the path of a folder that holds "
            f"{'a tokenizer' if need == 'tokenizer' else 'config.json and the weights'}."
        )
    missing = _missing_files(folder, need)
    if missing and need == "model" and (base := _base_of_checkpoint(folder)):
        raise SurgeryError(
            f"{folder} is a checkpoint that this program made, not a model's folder. "
            f"Give the folder or name of a model. This checkpoint was built from {base}."
        )
    if missing and need == "model" and (what := what_it_is(folder)):
        raise SurgeryError(what)
    if missing:
        raise SurgeryError(f"The folder {folder} lacks {', '.join(missing)}. Copy the missing files into it.")
    return Source(folder, "local", folder.name, None)


def _base_of_checkpoint(folder: Path) -> str | None:
    """The base's name in a checkpoint_info.json; None if the file or the name is missing."""
    try:
        return str(read_json(folder / "checkpoint_info.json")["base_model"]["name"])
    except (OSError, ValueError, KeyError, TypeError, SurgeryError):
        return None


def _missing_files(folder: Path, need: Need) -> list[str]:
    """The files that `folder` lacks, in words for an error."""
    if need == "tokenizer":
        words = "a tokenizer (tokenizer.json, tokenizer.model, or tokenizer_config.json with a vocab)"
        return [] if has_tokenizer(folder) else [words]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            return missing
        if index.is_file():
            return missing + [shard for shard in _shards(index) if not (folder / shard).is_file()]
    return [*missing, "weights (model.safetensors or pytorch_model.bin, whole or as an index with its shards)"]


def _shards(index: Path) -> list[str]:
    """The file names in an index, sorted. Raises SurgeryError if a name leads out of the index's folder."""
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("it lists no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{index} is not an index of weight files ({first_line(error)}). Download or copy it again."
        ) from error
    for shard in shards:
        inside(index.parent, shard)
    return shards


def _embedded_source(name: str) -> Source:
    folder = EMBEDDED / name
    if "/" in name or not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))
        raise SurgeryError(
            f"This package has no model {name!r}; it has {', '.join(known) or 'none, so install it again'}."
        )
    return Source(folder, "embedded", name, None)


# --- Hubs -------------------------------------------------------------------------------------------------------------


def _hub_source(hubs: list[str], repo: str, revision: str | None, need: Need, name: str) -> Source:
    """Ask one hub after the other for a complete snapshot of `repo`. `name` is what the user wrote, for the error."""
    failures = []
    advice = "Check the id and the network connection"
    for hub in hubs:
        try:
            snapshot = fetch_model(hub, repo, revision, need)
        except NoSnapshot as failure:
            failures.append(f"{TITLES[hub]} {failure}")
            continue
        missing = ", ".join(_missing_files(snapshot.folder, need) or snapshot.known_missing)
        if not missing:
            if snapshot.trouble:
                logger.warning("%s %s; using %s", TITLES[hub], snapshot.trouble, snapshot.folder)
            return Source(snapshot.folder, hub, repo, snapshot.revision)
        if snapshot.trouble:
            failures.append(f"{TITLES[hub]} {snapshot.trouble}, and the copy in {snapshot.folder} lacks {missing}")
            advice = "Run this again when the hub answers, to complete the copy (if this fails, delete the copy)"
        else:
            failures.append(f"{TITLES[hub]}'s repository, now in {snapshot.folder}, lacks {missing}")
    instead = f"--source {name}=/path/to/folder" if name in TABLE else "its path instead of the id"
    wanted = ("The tokenizer of " if need == "tokenizer" else "") + repo + (f"@{revision}" if revision else "")
    raise SurgeryError(
        f"{wanted} is not available: {'; '.join(failures)}. {advice}, or give a folder that holds the files: {instead}."
    )
