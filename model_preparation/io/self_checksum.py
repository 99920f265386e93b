"""JSON files that contain a checksum of their own bytes, so that every changed byte is noticed.

The last field, `info_sha256`, is the SHA-256 of the file's bytes with 64 zeros in place of the checksum's digits.
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


def with_checksum(info: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file with the fields of `info` and a new checksum as the last field."""
    fields = {name: value for name, value in info.items() if name != FIELD}
    data = (json.dumps({**fields, FIELD: _ZEROS}, indent=2, ensure_ascii=False) + "\n").encode()
    return _with_digits(data, hashlib.sha256(data).hexdigest())


def checksum_fault(data: bytes) -> str | None:
    """What is wrong with bytes that `with_checksum` made, in a few words; None if no byte has changed."""
    match = _END.fullmatch(data[-_TAIL_BYTES:])
    if match is None:
        return f"does not end in a checksum of itself ({FIELD})"
    if hashlib.sha256(_with_digits(data, _ZEROS)).hexdigest() != match[1].decode():
        return f"is changed (its checksum of itself, {FIELD}, does not match)"
    return None


def _with_digits(data: bytes, digits: str) -> bytes:
    start = len(data) - len(_ZEROS) - len('"\n}\n')
    return data[:start] + digits.encode() + data[start + len(_ZEROS) :]
