"""Digests of files: SHA-256 of what we write, compared when it is read; BLAKE3 of what we only take from.

SHA-256 is what people have tools for. BLAKE3 is four times as fast, which counts for a base that is read as a whole for
every graft.
"""

import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.io.untrusted.untrusted_files import regular_file

FILE_FIELDS: dict[str, type] = {"bytes": int, "sha256": str}  # of what `describe_file` gives
_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path, advance: Callable[[int], None] = lambda size_bytes: None) -> str:
    """The file's SHA-256 as 64 hex digits; `advance` is told the bytes of every block read."""
    return _digest_of(path, hashlib.sha256(), advance)


def blake3_of(path: Path) -> str:
    """The file's BLAKE3 as 64 hex digits."""
    return _digest_of(path, blake3())


def describe_file(path: Path) -> dict:
    """{"bytes": size, "sha256": digest}, as it stands in our JSON files."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def describe_source_file(path: Path, digest: str | None = None) -> dict:
    """{"bytes": size, "blake3": digest} of a model's file; with "sha256" where the hub's cache names the file by it.

    Args:
        digest: its BLAKE3, if that is known already.
    """
    described = {"bytes": path.stat().st_size, "blake3": digest or blake3_of(path)}
    name = path.resolve().name
    return described | {"sha256": name} if re.fullmatch("[0-9a-f]{64}", name) else described


def describe_files(folder: Path, pattern: str = "**/*", excluded: Collection[str] = ()) -> dict[str, dict]:
    """`describe_file` of the files in `folder` that match, by their path relative to it, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern) if path.is_file()}
    return {name: describe_file(paths[name]) for name in sorted(paths) if name not in excluded}


def fault_of(path: Path, recorded: dict, advance: Callable[[int], None] = lambda size_bytes: None) -> str | None:
    """What is wrong with a file against its `describe_file`, in a few words; None if nothing is.

    `advance` is told the bytes of every block read.

    Raises:
        SurgeryError: for a link that leads out of the file's folder.
    """
    if not path.is_file():
        return "missing"
    regular_file(path)
    size_bytes = path.stat().st_size
    if size_bytes != recorded["bytes"]:
        return f"{size_bytes} bytes long instead of {recorded['bytes']}"
    if sha256_of(path, advance) != recorded["sha256"]:
        return "changed (its SHA-256 differs from the recorded one)"
    return None


def _digest_of(path: Path, digest: Any, advance: Callable[[int], None] = lambda size_bytes: None) -> str:
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
    return digest.hexdigest()
