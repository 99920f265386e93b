"""checkpoint_info.json with a digest of itself, so that no byte of it can change unseen.

In: the fields. Out: the file's bytes, whose last field, `info_sha256`, is the SHA-256 of those same bytes with zeros in
the place of its 64 digits. A file that lists every other file's digest is checked by this one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

FIELD = "info_sha256"
_ZEROS = "0" * 64
_END = re.compile(rb'\n  "info_sha256": "([0-9a-f]{64})"\n}\n')
_TAIL_BYTES = len(f'\n  "{FIELD}": "{_ZEROS}"\n}}\n')


def seal(info: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file with the fields of `info`, and the seal last; a seal already in `info` is made anew."""
    fields = {name: value for name, value in info.items() if name != FIELD}
    data = (json.dumps({**fields, FIELD: _ZEROS}, indent=2, ensure_ascii=False) + "\n").encode()
    return _with_digits(data, _digest(data))


def check_seal(data: bytes) -> str | None:
    """What is wrong with the seal of a file that `seal` made, in a few words; None if no byte has changed."""
    match = _END.fullmatch(data[-_TAIL_BYTES:])
    if match is None:
        return f"does not end in its seal ({FIELD})"
    if _digest(_with_digits(data, _ZEROS)) != match[1].decode():
        return f"is changed (its seal, {FIELD}, does not fit it)"
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _with_digits(data: bytes, digits: str) -> bytes:
    start = len(data) - len(_ZEROS) - len('"\n}\n')
    return data[:start] + digits.encode() + data[start + len(_ZEROS) :]
