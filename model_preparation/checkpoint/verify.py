"""Checks that a checkpoint's folder is as it was built: every file and every tensor.

Every byte is read once, and no code is unpickled. Checks that need the model's classes run while the files are read. If
the base or the donor's layers are given, the checkpoint is compared with them too (verify_tensors.py).
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from model_preparation.checkpoint.graft_parts import find_base
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_code import describe_package_code, listed_code, remark_on_code
from model_preparation.errors import SurgeryError
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.digests import FileDigests, Range, describe_file, read_digests
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import checksum_fault
from model_preparation.io.tensors.tensor_ranges import range_of, safetensors_ranges
from model_preparation.io.untrusted.pt_check import pt_records
from model_preparation.io.untrusted.untrusted_files import inside, regular_file

if TYPE_CHECKING:
    from model_preparation.checkpoint.verify_tensors import TensorChecks

_FILES_AT_ONCE = 2  # one core computes the digests of one file
# Hubs, their clients and share_checkpoint.py add these. No loader reads them. Loaders may read all other files.
_ADDED_BY_HUBS = {
    *(".gitattributes", ".gitignore", "README.md", "LICENSE", "NOTICE"),
    *("configuration.json", ".mdl", ".msc", ".mv"),  # ModelScope's files
}
_LEFT_BEHIND = re.compile(re.escape(INFO) + r"\.partial-\d+")  # from a run killed while it recorded a score
_NOT_LOADED = {EVALUATIONS: "files of evaluations", ".git": "files of git", ".cache": "files of a download"}


@dataclass(frozen=True)
class Fault:
    """A fault: `where` names the file or the tensor, and `what` says what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


@dataclass
class Verification:
    """The results of the checks.

    Attributes:
        checks: a line per check that says what it covered.
        notes: what the user should know, but is no fault.
        faults: the faults.
        elsewhere: how many of the faults only say that the given base or donor is not the checkpoint's own.
    """

    directory: Path
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    elsewhere: int = 0

    def add(self, other: "Verification") -> None:
        """Append the results of other checks."""
        self.checks += other.checks
        self.notes += other.notes
        self.faults += other.faults

    def check(self, title: str, covered: str) -> None:
        self.checks.append(f"{title:<12} {covered}")

    def fault(self, where: str, what: str) -> None:
        self.faults.append(Fault(where, what))

    def compared_with_another(self, what: str) -> None:
        """Add the fault that the given base or donor is not the checkpoint's own."""
        self.fault("comparison:", what)
        self.elsewhere += 1


def verify_checkpoint(
    directory: str | Path,
    base: str | None = None,
    llama_layers_dir: str | Path | None = None,
    *,
    files_only: bool = False,
    sources: Mapping[str, str] | None = None,
) -> list[Fault]:
    """The faults of a checkpoint folder; an empty list if it has none. The arguments are those of `verify`."""
    return verify(directory, base, llama_layers_dir, files_only=files_only, sources=sources).faults


def verify(
    directory: str | Path,
    base: str | None = None,
    llama_layers_dir: str | Path | None = None,
    *,
    files_only: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Verification:
    """Check a checkpoint folder; returns the results.

    Args:
        directory: a folder written by `build_checkpoint`.
        base: a name, folder or hub id of the base. Then the kept tensors are compared with it.
        llama_layers_dir: the donor's extracted layers. Then the replaced layers are compared with them. By default
            extracted_llama_layers/, if that folder holds the layers that the checkpoint was built from.
        files_only: check only the digests of whole files. This finds every changed byte, but names no tensor.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if the checkpoint, the base or the layers are missing.
    """
    directory = Path(directory).expanduser()
    found = Verification(directory)
    store = None if llama_layers_dir is None else LayerStore(llama_layers_dir)
    if store is not None:
        store.check_is_donor()
    base_folder = None if base is None else find_base(base, sources)[0].folder
    info = _checked_info(found)
    if info is None:
        return found
    recorded = _recorded_files(found, info)
    _check_code(found, info, recorded)
    _check_unlisted(found, info, recorded)
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
    from model_preparation.checkpoint.verify_tensors import TensorChecks  # slow to import: torch and the model

    return TensorChecks(found, info, recorded)


def _tensor_places(directory: Path, recorded: Mapping[str, dict]) -> dict[str, set[Range]]:
    """The ranges that may hold tensors, by file: every record of a .pt file, every tensor of a safetensors file.

    A file that cannot be read gets no ranges here; `TensorChecks` reports its fault.
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
    """Compare checkpoint_info.json with its checksum; returns its fields, or None if they cannot be used."""
    path = found.directory / INFO
    if not path.exists():
        return read_info(found.directory)  # raises the error that says what is missing
    data = regular_file(path).read_bytes()
    fault = checksum_fault(data)
    if fault:
        found.fault(INFO, fault)
    found.check("Recipe", f"{INFO} against the checksum in it, {decimal(len(data))}")
    try:
        return read_info(found.directory)
    except SurgeryError as error:
        if not fault:
            raise
        found.fault(INFO, f"cannot be used: {error}")
        return None


def _recorded_files(found: Verification, info: dict[str, Any]) -> dict[str, dict]:
    """The entries of checkpoint_info.json's "files", by path. A path outside the folder is a fault."""
    recorded = {}
    for name, entry in info["files"].items():
        try:
            real = os.path.realpath(inside(found.directory, name))
            if not Path(real).is_relative_to(os.path.realpath(found.directory)):
                raise SurgeryError(f"it is a link to {real}, outside the folder")
            recorded[name] = entry
        except SurgeryError as error:
            found.fault(f"{name!r:.200}", f"is not a valid path in {INFO} ({error})")
    needed = {"pt": (MODULE, STATE_DICT), "hf": ("config.json",)}
    for name in (TENSOR_DIGESTS, *(name for format in sorted(formats_of(info)) for name in needed.get(format, ()))):
        if name not in recorded:
            found.fault(name, f"is not listed in {INFO}")
    return recorded


def _check_code(found: Verification, info: dict[str, Any], recorded: dict[str, dict]) -> None:
    """Add a note if code differs from this package's. A file equal to the package's is no fault, listed or not."""
    if "hf" not in formats_of(info):
        return
    if remark := remark_on_code(found.directory, listed_code(info)):
        found.notes.append(remark)
    for name, entry in describe_package_code().items():
        path = found.directory / name
        if recorded.get(name) != entry and path.is_file() and not path.is_symlink() and describe_file(path) == entry:
            recorded[name] = entry


def _check_unlisted(found: Verification, info: dict[str, Any], recorded: Mapping[str, dict]) -> None:
    """Report files that are not listed. If a loader of this or a later version may read the file, this is a fault."""
    count = 0
    below: Counter[str] = Counter()  # files in folders that no loader reads
    has_hf = "hf" in formats_of(info)
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
                found.notes.append(f"{shown} was left by a killed run, and nothing reads it. Remove it.")
            elif top == TOKENIZER or (has_hf and shown not in _ADDED_BY_HUBS):
                found.fault(shown, f"is not listed in {INFO}, but loaders would read it")
            else:
                found.notes.append(f"{shown} is not listed in {INFO}.")
    found.notes += [f"{top}/ holds {below[top]} {_NOT_LOADED[top]}, not listed in {INFO}." for top in below]
    found.check("Folder", f"{count} files, {len(recorded)} of them listed with their digests")


def _read_files(
    found: Verification, recorded: Mapping[str, dict], places: Mapping[str, set[Range]] | None = None
) -> dict[str, FileDigests]:
    """Read every file once, large files first, and compare size and SHA-256; returns the digests by file."""
    names = sorted(recorded, key=lambda name: -recorded[name]["bytes"])
    total = sum(entry["bytes"] for entry in recorded.values())
    digests: dict[str, FileDigests] = {}
    with bar("Verifying", total, in_bytes=True) as advance, BackgroundTasks(_FILES_AT_ONCE) as tasks:

        def advance_or_stop(size_bytes: int) -> None:
            tasks.check()
            advance(size_bytes)

        def read(name: str) -> None:
            path = found.directory / name
            try:
                regular_file(path)
                digests[name] = read_digests(path, (places or {}).get(name, ()), advance_or_stop)
            except FileNotFoundError:
                found.fault(name, "is missing")
            except (SurgeryError, OSError) as error:
                found.fault(name, f"cannot be read ({error})")

        for reading in [tasks.start(read, name) for name in names]:
            reading.result()
    for name in sorted(digests):
        if digests[name].size_bytes != recorded[name]["bytes"]:
            found.fault(name, f"has {digests[name].size_bytes} bytes instead of {recorded[name]['bytes']}")
        elif digests[name].sha256 != recorded[name]["sha256"]:
            found.fault(name, "is changed (its SHA-256 differs from the recorded one)")
    read_bytes = sum(digest.size_bytes for digest in digests.values())
    found.check("Files", f"{len(digests)} of {len(recorded)} against their SHA-256, {decimal(read_bytes)}")
    return digests
