"""Compares the inputs of an earlier result with the present inputs. All long commands decide here whether to reuse it.

Inputs are values, or digests of contents, by name. They are never paths.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.io.known_digests import known_blake3
from model_preparation.io.progress import bar

Inputs = Mapping[str, Any]  # JSON's kinds of values

_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST = 60  # characters of a value that are shown


def digest_of(inputs: Inputs) -> str:
    """BLAKE3, in hex, of all inputs."""
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digests_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """BLAKE3 of files by name; a large file is read again only if it has changed."""
    paths = sorted(paths)
    digests = {}
    with bar("Reading what has changed", len(paths)) as advance:
        for path in paths:
            digests[path.name] = known_blake3(path)
            advance(1)
    return digests


def differences(recorded: Inputs, asked: Inputs, *, of_both: bool = False) -> list[str]:
    """Each difference in words: `limit: was 5, is now 9`; none if the earlier result is the one asked for.

    Args:
        of_both: compare only names that both have (for records of older versions).
    """
    found = []
    for name in sorted(recorded.keys() | asked.keys()):
        there, now = recorded.get(name), asked.get(name)
        if there == now or (of_both and not (name in recorded and name in asked)):
            continue
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            found += [f"{name} {difference}" for difference in differences(there, now, of_both=of_both)]
        elif _is_digest(there) and _is_digest(now):
            found.append(f"{name}: the content has changed")
        else:
            found.append(f"{name}: was {_in_words(there)}, is now {_in_words(now)}")
    return found


def name_of(given: str | Path) -> str:
    """The real name of a file or folder, after links, `.` and `..`; of a path that does not exist, its last part."""
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
