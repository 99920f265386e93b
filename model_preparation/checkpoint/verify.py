"""Whether a checkpoint folder is, byte for byte, what was built: every file, every tensor, and what they claim to be.

In: the folder; to go further, the base and the extracted layers. Out: a `Verification`: a line per check with what was
looked at, and every fault by the name of its file or tensor. Every byte is read once, and no code is unpickled. What
must import the model to be checked is checked while the files are read.
"""

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import (
    EVALUATIONS,
    INFO,
    MODULE,
    STATE_DICT,
    TENSOR_DIGESTS,
    TOKENIZER,
    formats_of,
    read_info,
)
from model_preparation.checkpoint.findings import Fault, Verification
from model_preparation.checkpoint.model_code import describe_package_code, listed_code, remark_on_code
from model_preparation.checkpoint.model_configs import type_and_depth
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.digests import FileDigests, Range, describe_file, read_digests
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import checksum_fault
from model_preparation.io.tensors.tensor_ranges import range_of, safetensors_ranges
from model_preparation.io.untrusted.pt_check import pt_records
from model_preparation.io.untrusted.untrusted_files import inside, regular_file

if TYPE_CHECKING:
    from model_preparation.checkpoint.layer_store import LayerStore
    from model_preparation.checkpoint.verify_tensors import TensorChecks

_FILES_AT_ONCE = 2  # each is hashed by one core
# What hubs and their clients add, and share_checkpoint.py: no loader reads it. All else in a folder may be read.
_ADDED_BY_HUBS = {
    *(".gitattributes", ".gitignore", "README.md", "LICENSE", "NOTICE"),
    *("configuration.json", ".mdl", ".msc", ".mv"),  # ModelScope's
}
_LEFT_BEHIND = re.compile(re.escape(INFO) + r"\.partial-\d+")  # by write_file, when a score is entered
_NOT_LOADED = {EVALUATIONS: "results, which come after the build", ".git": "a clone's", ".cache": "a download's"}


def verify_checkpoint(
    directory: str | Path,
    base: str | None = None,
    llama_layers_dir: str | Path | None = None,
    *,
    files_only: bool = False,
) -> list[Fault]:
    """The faults of a checkpoint folder; none if it is what was built. The arguments are those of `inspect`."""
    return inspect(directory, base, llama_layers_dir, files_only=files_only).faults


def inspect(
    directory: str | Path,
    base: str | None = None,
    llama_layers_dir: str | Path | None = None,
    *,
    files_only: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Verification:
    """Check a checkpoint folder.

    Args:
        directory: a folder written by `build_checkpoint`.
        base: a name, folder or hub id of the base, to compare its tensors too.
        llama_layers_dir: the donor's extracted layers, to compare theirs; by default those in extracted_llama_layers/,
            if they are of the same source.
        files_only: the files' digests only, which find any changed byte; nothing about tensors.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if there is no checkpoint in `directory`, or no base or layers where they are said to be.
    """
    directory = Path(directory).expanduser()
    found = Verification(directory)
    store = None if llama_layers_dir is None else _layer_store(llama_layers_dir)
    base_folder = None if base is None else _base_folder(base, sources)
    info = _checked_info(found)
    if info is None:
        return found
    recorded = _recorded_files(found, info)
    _look_at_code(found, info, recorded)
    _look_for_others(found, info, recorded)
    if files_only:
        _read_files(found, recorded)
        return found
    in_files = Verification(directory)
    with BackgroundTasks() as tasks:
        checking = tasks.start(_tensor_checks, found, info, recorded)
        digests = _read_files(in_files, recorded, _tensor_places(directory, recorded))
        tensors = checking.result()
    found.add(in_files)
    tensors.compare(digests)
    tensors.compare_base(base_folder)
    tensors.compare_donor(store)
    return found


def _tensor_checks(found: Verification, info: dict[str, Any], recorded: Mapping[str, dict]) -> "TensorChecks":
    from model_preparation.checkpoint.verify_tensors import TensorChecks  # imports torch and the model: seconds

    return TensorChecks(found, info, recorded)


def _base_folder(base: str, sources: Mapping[str, str] | None) -> Path:
    folder = resolve(base, overrides=sources).folder
    model_type, _ = type_and_depth(folder)
    if model_type != "llamba":
        raise SurgeryError(f"{folder} is a {model_type} model. The base must be a Llamba.")
    return folder


def _layer_store(folder: str | Path) -> "LayerStore":
    from model_preparation.checkpoint.layer_store import LayerStore  # imports torch

    store = LayerStore(folder)
    if store.config.model_type != "llama":
        raise SurgeryError(f"{folder} holds layers of a {store.config.model_type} model. The donor must be a Llama.")
    return store


def _tensor_places(directory: Path, recorded: Mapping[str, dict]) -> dict[str, set[Range]]:
    """By file, where tensors may lie in it: every record of a .pt file, every tensor of a safetensors file.

    What such a file really holds, and what is wrong with one that has no places here, `TensorChecks` says.
    """
    places: dict[str, set[Range]] = {}
    for name in recorded:
        with contextlib.suppress(ValueError, SurgeryError, OSError):
            if name in (MODULE, STATE_DICT):
                records = pt_records(directory / name).values()
                places[name] = {(0, 0)} | {(record.start, record.start + record.size_bytes) for record in records}
            elif name.endswith(".safetensors"):
                places[name] = {range_of(place) for place in safetensors_ranges(directory / name).values()}
    return places


def _checked_info(found: Verification) -> dict[str, Any] | None:
    path = found.directory / INFO
    if not path.exists():
        return read_info(found.directory)  # which says what is missing
    data = regular_file(path).read_bytes()
    trouble = checksum_fault(data)
    if trouble:
        found.fault(INFO, trouble)
    found.check("checksum of itself", f"{INFO}, {decimal(len(data))}")
    try:
        return read_info(found.directory)
    except SurgeryError as error:
        if not trouble:
            raise
        found.fault(INFO, f"cannot be used: {error}")
        return None


def _recorded_files(found: Verification, info: dict[str, Any]) -> dict[str, dict]:
    """What `files` lists, without entries that mean no file of the folder."""
    recorded = {}
    for name, entry in info["files"].items():
        try:
            real = os.path.realpath(inside(found.directory, name))
            if not Path(real).is_relative_to(os.path.realpath(found.directory)):
                raise SurgeryError(f"it is a link to {real}, outside the folder")
            recorded[name] = entry
        except SurgeryError as error:
            found.fault(f"{name!r:.200}", f"is listed in {INFO} in a way that cannot be ({error})")
    for name in _weight_files(info) | {TENSOR_DIGESTS}:
        if name not in recorded:
            found.fault(name, f"is not listed in {INFO}")
    return recorded


def _look_at_code(found: Verification, info: dict[str, Any], recorded: dict[str, dict]) -> None:
    """Say that the code is not this package's; a file of the package's is none of a stranger, whoever put it there."""
    if "hf" not in formats_of(info):
        return
    if remark := remark_on_code(found.directory, listed_code(info)):
        found.notes.append(remark)
    for name, entry in describe_package_code().items():
        path = found.directory / name
        if recorded.get(name) != entry and path.is_file() and not path.is_symlink() and describe_file(path) == entry:
            recorded[name] = entry


def _weight_files(info: dict[str, Any]) -> set[str]:
    formats = formats_of(info)
    files = {MODULE, STATE_DICT} if "pt" in formats else set()
    return files | ({"config.json"} if "hf" in formats else set())


def _look_for_others(found: Verification, info: dict[str, Any], recorded: Mapping[str, dict]) -> None:
    """Files nobody recorded: a fault where a loader may pick them up, be it by a name that it learns next year."""
    count = 0
    below: Counter[str] = Counter()  # in folders of which nothing is recorded nor loaded
    read_by_others = "hf" in formats_of(info)
    for root, folders, files in os.walk(found.directory):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*files, *links]):
            relative = Path(root, name).relative_to(found.directory)
            top, shown = relative.parts[0], relative.as_posix()
            count += 1
            if shown in recorded or shown == INFO:
                continue
            if len(relative.parts) > 1 and top in _NOT_LOADED:
                below[top] += 1
            elif _LEFT_BEHIND.fullmatch(shown):
                found.notes.append(f"{shown} was left by a run that was killed, and nothing reads it. Remove it.")
            elif top == TOKENIZER or (read_by_others and shown not in _ADDED_BY_HUBS):
                found.fault(shown, f"is not listed in {INFO}, and would be read with the checkpoint")
            else:
                found.notes.append(f"{shown} is not listed in {INFO}.")
    found.notes += [f"{top}/ is not listed in {INFO}: {_NOT_LOADED[top]}, {below[top]} files." for top in below]
    found.check("folder", f"{count} files, {len(recorded)} of them listed with their digests")


def _read_files(
    found: Verification, recorded: Mapping[str, dict], places: Mapping[str, set[Range]] | None = None
) -> dict[str, FileDigests]:
    """Read every file once, large ones first; compare size and SHA-256, and return the digests."""
    names = sorted(recorded, key=lambda name: -recorded[name]["bytes"])
    total = sum(entry["bytes"] for entry in recorded.values())
    stop = threading.Event()
    digests: dict[str, FileDigests] = {}

    def read(name: str, advance: Callable[[int], None]) -> None:
        path = found.directory / name
        try:
            regular_file(path)
            digests[name] = read_digests(path, (places or {}).get(name, ()), advance, stop)
        except FileNotFoundError:
            found.fault(name, "is missing")
        except (SurgeryError, OSError) as error:
            found.fault(name, f"cannot be read ({error})")

    with bar("Verifying", total, in_bytes=True) as advance, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        try:
            for future in [pool.submit(read, name, advance) for name in names]:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for name in sorted(digests):
        if digests[name].size_bytes != recorded[name]["bytes"]:
            found.fault(name, f"has {digests[name].size_bytes} bytes instead of {recorded[name]['bytes']}")
        elif digests[name].sha256 != recorded[name]["sha256"]:
            found.fault(name, "is changed (its SHA-256 differs from the recorded one)")
    read_bytes = sum(digest.size_bytes for digest in digests.values())
    found.check("files", f"{len(digests)} of {len(recorded)} against their SHA-256, {decimal(read_bytes)}")
    return digests
