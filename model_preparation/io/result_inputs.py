"""Compares the inputs of an earlier result with the inputs of a new request.

All long commands use this to decide whether to reuse the result. Inputs are values, or digests of contents, by name.
They are never paths.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.io.known_digests import known_blake3
from model_preparation.io.progress import bar

Inputs = Mapping[str, Any]  # by name; values that JSON can hold

_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST = 60  # characters of a value in a message; the others are cut off


def digest_of(inputs: Inputs) -> str:
    """BLAKE3, in hex, of all inputs."""
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digests_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """The BLAKE3 of each file, by file name; a large file is read again only if it has changed."""
    paths = sorted(paths)
    digests = {}
    with bar("Reading what has changed", len(paths)) as advance:
        for path in paths:
            digests[path.name] = known_blake3(path)
            advance(1)
    return digests


def differences(recorded: Inputs, asked: Inputs, *, of_both: bool = False) -> list[str]:
    """Each difference in words, such as `limit: was 5, is now 9`. If the list is empty, the result can be reused.

    Args:
        of_both: compare only names that are in both (records of older versions lack some names).
    """
    found = []
    for name in sorted(recorded.keys() | asked.keys()):
        was, now = recorded.get(name), asked.get(name)
        if was == now or (of_both and not (name in recorded and name in asked)):
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += [f"{name} {difference}" for difference in differences(was, now, of_both=of_both)]
        elif _is_digest(was) and _is_digest(now):
            found.append(f"{name}: the content has changed")
        else:
            found.append(f"{name}: was {_in_words(was)}, is now {_in_words(now)}")
    return found


def name_of(given: str | Path) -> str:
    """The name of a file or folder, with links, `.` and `..` resolved; of a missing path, the last part."""
    path = Path(given).expanduser()
    return path.resolve().name if path.exists() else path.name


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _in_words(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    if isinstance(value, Mapping) or _is_digest(value):
        return "given"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
