"""The states from which a run resumes: `checkpoint-N` folders, each complete or absent.

In a state, `resume_state.json` is written last and has the digest of every other file. A folder without this file is no
state. transformers has no such file, so it would load a half-written state (transformers#35525).
heal_trainer.py decides what a state holds, and restores it.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import sync
from model_preparation.io.digests import FILE_FIELDS, describe_files, fault_of
from model_preparation.io.linked_files import share_file
from model_preparation.io.untrusted.distcp_files import SHARD_METADATA, check_shards
from model_preparation.io.untrusted.pickle_check import TENSORS
from model_preparation.io.untrusted.pt_check import check_pt
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json

FORMAT_VERSION = 1
STATE_FILE, TRAINER_STATE = "resume_state.json", "trainer_state.json"
PREFIX = "checkpoint"
_NAME = re.compile(rf"{PREFIX}-(\d+)(-world\d+)?")
_PICKLES = (".pt", ".pth", ".bin")
_FIELDS = {
    "format_version": int,
    "iter_num": int,
    "sequences_seen": int,
    "world_size": int,
    "settings": dict,
    "model_args": dict,
    "parent": {"id": str, "tensor_digests_sha256": str},
    "data": {"blake3": str, "sequences": int, "held_out_blake3": (str, NoneType)},
    "unlogged": {"losses": [(int, float)], "last_logged": int},
    "files": {"*": FILE_FIELDS},
    "run_id?": str,
    "started_world_size?": int,
    "texts?": [{"prompt": (str,), "text": (str,)}],
}
_TRAINER_FIELDS = {
    "global_step": int,
    "log_history": [{"step": int, "loss?": (int, float), "eval_loss?": (int, float), "learning_rate?": (int, float)}],
    "best_metric?": (int, float, NoneType),
    "best_global_step?": (int, NoneType),
    "best_model_checkpoint?": (str, NoneType),
}


@dataclass(frozen=True)
class ResumeState:
    """A complete state: its folder, and its resume_state.json.

    Attributes:
        info: the fields of resume_state.json: `iter_num` steps, `sequences_seen`, `best_val_loss`, `world_size`,
            `settings` (of the run), `model_args` (the model's config), `run_id` (for the tracker), and others.
    """

    folder: Path
    info: dict[str, Any]

    @property
    def steps(self) -> int:
        """The optimizer steps done, with `world_size` processes."""
        return self.info["iter_num"]

    @property
    def sequences_seen(self) -> int:
        """The training sequences seen by all processes together."""
        return self.info["sequences_seen"]


def read_state(folder: Path) -> ResumeState:
    """The state in a folder. Only its resume_state.json is read.

    Raises:
        SurgeryError: if the state is not there, incomplete, or of an unknown version.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise SurgeryError(f"{folder} is {what}. Give a {PREFIX}-N folder, or --resume auto.")
    if not (folder / STATE_FILE).is_file():
        inner = list_states(folder, damaged_too=True)[0]
        what = f"holds states, the newest {inner[-1].folder.name}, but is no state" if inner else f"has no {STATE_FILE}"
        raise SurgeryError(f"{folder} {what}. Give a complete {PREFIX}-N folder, or --resume auto.")
    try:
        return _read_state_file(folder)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"{folder / STATE_FILE} cannot be read ({error}). {_earlier_state(folder)}") from error


def _read_state_file(folder: Path) -> ResumeState:
    info = read_json(folder / STATE_FILE)
    check_fields(info, _FIELDS)
    if info["format_version"] != FORMAT_VERSION:
        raise SurgeryError(
            f"{folder} has format version {info['format_version']}; this program knows {FORMAT_VERSION}."
        )
    if len(info["unlogged"]["losses"]) != info["world_size"]:
        raise ValueError(f"unlogged has {len(info['unlogged']['losses'])} losses for {info['world_size']} processes")
    return ResumeState(folder, info)


def list_states(folder: Path, *, damaged_too: bool = False) -> tuple[list[ResumeState], list[str]]:
    """The complete states in a run's folder, sorted by the sequences seen, and the names of incomplete states.

    An unreadable resume_state.json is an error. With `damaged_too`, its state counts as incomplete instead.
    """
    states, incomplete = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and _NAME.fullmatch(path.name.partition(".partial")[0]):
            if not (_NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()):
                incomplete.append(path.name)
                continue
            try:
                states.append(_read_state_file(path) if damaged_too else read_state(path))
            except (OSError, ValueError, SurgeryError):
                if not damaged_too:
                    raise
                incomplete.append(path.name)
    return sorted(states, key=lambda state: (state.sequences_seen, state.folder.name)), incomplete


def check_state(state: ResumeState) -> None:
    """Check the digest of every file of a state, and that its pickles hold tensors and plain values only.

    Raises:
        SurgeryError: if a file is missing, changed, cut or refused. The message names the file and an earlier state.
    """
    found = _fault_of_state(state)
    if found is not None:
        name, fault = found
        raise SurgeryError(f"{state.folder / name} is {fault}. {_earlier_state(state.folder)}")


def _fault_of_state(state: ResumeState) -> tuple[str, str] | None:
    """The name and the fault of the first file that is not as it was written, or None."""
    for name, entry in state.info["files"].items():
        try:
            path = inside(state.folder, name)
            fault = fault_of(path, entry)
            if fault is None and path.suffix in _PICKLES:
                check_pt(path, TENSORS)
            elif fault is None and path.name == SHARD_METADATA:
                check_shards(path.parent)
            elif fault is None and name == TRAINER_STATE:
                _check_trainer_state(path)
        except (OSError, ValueError, SurgeryError) as error:
            fault = f"refused ({error})"
        if fault is not None:
            return name, fault
    return None


def _check_trainer_state(path: Path) -> None:
    """Raise ValueError unless transformers can make a TrainerState from the file, and its fields have valid types."""
    from transformers import TrainerState

    try:
        found = json.loads(path.read_bytes())  # a loss may be NaN, which read_json refuses
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    if unknown := sorted(found.keys() - {field.name for field in fields(TrainerState)}):
        raise ValueError(f"it has {unknown[0]!r:.80}, which transformers does not know")
    check_fields(found, _TRAINER_FIELDS)


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around code that loads a file of a state: if the file does not fit the run, the error becomes a SurgeryError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SurgeryError(f"{path} does not fit this run ({reason}). {_earlier_state(path.parent)}") from error


def load_plain(path: Path) -> Any:
    """Load a file that torch.save wrote, with tensors and plain values (numbers, strings, lists, tuples, dicts).

    Raises:
        SurgeryError: if the file is damaged or holds anything else.
    """
    try:
        check_pt(path, TENSORS)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError) as error:
        raise SurgeryError(f"{path} is refused: {error}. {_earlier_state(path.parent)}") from error


def finish_state(staging: Path, info: Mapping[str, Any]) -> None:
    """Write resume_state.json, with the digests of all other files, into a folder that already has them."""
    content = {"format_version": FORMAT_VERSION, **info, "files": describe_files(staging, excluded=[STATE_FILE])}
    write_json(staging / STATE_FILE, content)


def place_for(folder: Path, step: int, world_size: int, protected: Collection[str]) -> Path:
    """The folder for the state of a step: `checkpoint-N`, or another name if a protected state has that name."""
    path = folder / f"{PREFIX}-{step}"
    return folder / f"{path.name}-world{world_size}" if path.name in protected else path


def rotate(folder: Path, limit: int, best: str | None) -> list[str]:
    """Remove the oldest states until `limit` are left, but never the newest nor `best`; returns their names.

    Incomplete states are not counted, and stay.
    """
    states = [state.folder for state in list_states(folder)[0]]
    removable = [path for path in states[:-1] if path.name != best]
    surplus = removable[: max(0, len(states) - limit)]
    remove_states(surplus)
    return [path.name for path in surplus]


def remove_states(folders: Iterable[Path]) -> None:
    """Remove states, resume_state.json first: if the removal is killed, the rest does not count as a state."""
    for path in folders:
        (path / STATE_FILE).unlink(missing_ok=True)
        sync(path)
        shutil.rmtree(path)


def set_aside(folders: Iterable[Path]) -> dict[str, str]:
    """Rename folders to NAME.aside, or NAME.aside-2 and so on, to free their names. Returns the new name of each."""
    renamed = {}
    for path in folders:
        asides = (path.with_name(f"{path.name}.aside{end}") for end in ("", *(f"-{n}" for n in range(2, 1000))))
        renamed[path.name] = path.rename(next(aside for aside in asides if not aside.exists())).name
        sync(path.parent)
    return renamed


def set_aside_after(folder: Path, state: ResumeState) -> dict[str, str]:
    """Set aside the states in `folder` that have seen more sequences than `state`. Returns as `set_aside`."""
    states = list_states(folder, damaged_too=True)[0]
    return set_aside(other.folder for other in states if other.sequences_seen > state.sequences_seen)


def copy_state(source: Path, target: Path) -> None:
    """Copy a state into `target`, an empty folder. If the file system can, both share the space on the disk."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        elif path.name != STATE_FILE:
            share_file(path, place)
    shutil.copyfile(source / STATE_FILE, target / STATE_FILE)


def _earlier_state(folder: Path) -> str:
    """A sentence that names the newest undamaged state before `folder`."""

    def step_of(path: Path) -> int:
        match = _NAME.fullmatch(path.name)
        return int(match[1]) if match else 0

    for state in reversed(list_states(folder.parent, damaged_too=True)[0]):
        if step_of(state.folder) < step_of(folder) and _fault_of_state(state) is None:
            return f"An earlier state is undamaged: --resume {state.folder}"
    return "No earlier state is undamaged: start again with --resume never --overwrite."
