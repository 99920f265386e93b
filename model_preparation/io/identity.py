"""What a result was computed from, and whether that is what is asked for now.

In: per name a value, or a digest of contents; never a path or a name that somebody typed. Out: one digest of all, to
keep a result under; or what differs, in words. Searches, batch builds, evaluations, distillation, healing and recipes
all decide here whether what is there may be used.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.io.digests import blake3_of
from model_preparation.io.known_digests import remembered
from model_preparation.io.progress import bar

Inputs = Mapping[str, Any]  # JSON's kinds of values

_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST = 60  # characters of a value that are shown


def digest_of(inputs: Inputs) -> str:
    """BLAKE3, in hex, of all inputs."""
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digests_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """BLAKE3 of files by their names; a large file that has not changed since is not read again."""
    paths = sorted(paths)
    digests = {}
    with bar("Reading what has changed", len(paths)) as advance:
        for path in paths:
            digests[path.name] = remembered(path, "file", lambda path: {"": blake3_of(path)})[""]
            advance(1)
    return digests


def differences(recorded: Inputs, asked: Inputs, *, of_both: bool = False) -> list[str]:
    """What is not the same in both, each in words: `limit: 5 there, 9 now`; none if what is there is what is asked for.

    Args:
        of_both: only compare what both name, as for records of older versions.
    """
    told = []
    for name in sorted(recorded.keys() | asked.keys()):
        there, now = recorded.get(name), asked.get(name)
        if there == now or (of_both and not (name in recorded and name in asked)):
            continue
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            told += [f"{name} {difference}" for difference in differences(there, now, of_both=of_both)]
        elif _is_digest(there) and _is_digest(now):
            told.append(f"{name}: other contents")
        else:
            told.append(f"{name}: {_in_words(there)} there, {_in_words(now)} now")
    return told


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _in_words(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    if isinstance(value, Mapping) or _is_digest(value):
        return "given"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
