"""SHA-256 of files: recorded when they are written, compared when they are read."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path, advance: Callable[[int], None] = lambda size_bytes: None) -> str:
    """The file's SHA-256 as 64 hex digits; `advance` is told the bytes of every block read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def describe_file(path: Path) -> dict:
    """{"bytes": size, "sha256": digest}, as it stands in our JSON files."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def describe_files(folder: Path, pattern: str = "**/*", excluded: Collection[str] = ()) -> dict[str, dict]:
    """`describe_file` of the files in `folder` that match, by their path relative to it, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern) if path.is_file()}
    return {name: describe_file(paths[name]) for name in sorted(paths) if name not in excluded}


def fault_of(path: Path, recorded: dict) -> str | None:
    """What is wrong with a file against its `describe_file`, in a few words; None if nothing is."""
    if not path.is_file():
        return "missing"
    size_bytes = path.stat().st_size
    if size_bytes != recorded["bytes"]:
        return f"{size_bytes} bytes long instead of {recorded['bytes']}"
    if sha256_of(path) != recorded["sha256"]:
        return "changed (its SHA-256 differs from the recorded one)"
    return None
