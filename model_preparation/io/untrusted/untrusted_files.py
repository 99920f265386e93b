"""Opens strangers' files only if they lie in their own folder, and reads JSON only within limits.

This module refuses links that lead out of the folder, FIFOs and devices, and names with `..`. It refuses JSON that is
too large, nested too deeply, has a key twice, or is not an object.
"""

import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.io.text import decode, kind_of
from model_preparation.io.untrusted.not_a_model import stand_in
from model_preparation.terminal import STEERING

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 64
_MAX_DIGITS = 40  # transformers writes 10**30 for a length without limit
MAX_LAYERS = 1024  # about eight times as many as in the deepest Llama
MAX_WIDTH = 1 << 24  # for any dimension in a config
_OF_NUMBERS = re.compile(
    r".*(factor|theta|beta_fast|beta_slow|mscale|_dim|_size|_heads|_layers|_embeddings|_eps|_token_id)"
)


def regular_file(path: Path) -> Path:
    """As `own_file`, but also refuses a file that only has the name of a model's file, such as a Git LFS pointer.

    Raises:
        SurgeryError, FileNotFoundError: as from `own_file`; SurgeryError also for files that `stand_in` recognises.
    """
    if reason := stand_in(own_file(path)):
        raise SurgeryError(reason)
    return path


def own_file(path: Path) -> Path:
    """Return `path` if it is a regular file in its folder. A link must lead to a file in the same folder or below.

    Links of the Hugging Face cache are accepted too: from `snapshots/<commit>/` into `blobs/`, next to `snapshots/`.

    Raises:
        FileNotFoundError: if nothing is there.
        SurgeryError: for a directory, FIFO, socket or device, and for a link that leads elsewhere.
    """
    try:
        mode = os.stat(path).st_mode  # follows links but opens nothing, because a FIFO would block
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise SurgeryError(f"{path} is a link that leads to itself. Put the file itself there.") from error
    if not stat.S_ISREG(mode):
        raise SurgeryError(f"{path} is {kind_of(mode)}, not a file. Put the file itself there.")
    folder, real = path.parent.resolve(), path.resolve()
    if real.is_relative_to(folder):
        return path
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), None)
    if repository is not None and real.is_relative_to(repository / "blobs"):
        return path
    raise SurgeryError(
        f"{path} is a link to {real}, which is outside its folder. "
        "Put a copy of the file in its place if you trust it, or give the folder the file is in."
    )


def inside(folder: Path, name: object) -> Path:
    """The path of `name`, which an index or list in the folder gives. It must lie in the folder or below.

    Raises:
        SurgeryError: for a name that is absolute, has `..`, or means different files on different systems.
    """
    if isinstance(name, str) and name and not any(ord(char) < 32 or char in "\\:" for char in name):
        path = PurePosixPath(name)
        if not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "." and _short(path):
            return folder / name
    raise SurgeryError(
        f"{folder} lists a file {name!r:.200}, which is outside its folder or not a file name. Do not use this folder."
    )


def without_links(folder: Path) -> Path:
    """Return `folder`, which may be missing, if neither it nor anything in it is a link.

    Call this before writing or deleting in `folder`: writing through a stranger's link would change files elsewhere.

    Raises:
        SurgeryError: naming the link.
    """
    below = (Path(root, name) for root, folders, files in os.walk(folder) for name in folders + files)
    for path in itertools.chain([folder], below):
        if path.is_symlink():
            raise SurgeryError(
                f"{path} is a link to {os.readlink(path)}, and this program writes and removes nothing through links. "
                "Remove the link, or choose another folder."
            )
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: with what is wrong; the caller adds what to do.
        SurgeryError, OSError: as from `regular_file`.
    """
    with regular_file(path).open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    return parse_json(data)


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. It must be UTF-8, with unique keys; its numbers must be finite and not too long.

    Raises:
        ValueError: with what is wrong.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES // 1_000_000} MB of JSON")
    try:
        value = json.loads(
            decode(data), object_pairs_hook=_unique, parse_int=bounded, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    _check_depth_and_strings(value)
    return value


def check_fields(fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise ValueError unless each field in `kinds` is present and has its kind.

    The name of a field that may be missing ends in ?. The name * means every field. A kind is a class, a tuple of kinds
    (one of them must fit), {...} for an object with such fields, or [kind] for a list of items of that kind. The kind
    int does not accept True. The kind str accepts no characters that control a terminal; (str,) accepts any text.
    """
    if "*" in kinds:
        kinds = dict.fromkeys(fields, kinds["*"])
    for name, kind in kinds.items():
        if name.removesuffix("?") in fields:
            name = name.removesuffix("?")
            _check_kind(name, fields[name], kind)
        elif not name.endswith("?"):
            raise ValueError(f"{name} is missing")


def _check_kind(name: str, value: Any, kind: Any) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    classes = tuple(each if isinstance(each, type) else type(each) for each in kinds)
    if (
        not isinstance(value, classes)
        or (isinstance(value, bool) and kind is int)
        or (kind is str and STEERING.search(str(value)))
    ):
        raise ValueError(f"{name} is {value!r:.80}")
    try:
        for each in kinds:
            if isinstance(each, dict) and isinstance(value, dict):
                check_fields(value, each)
            elif isinstance(each, list) and isinstance(value, list):
                for item in value:
                    _check_kind("an item", item, each[0])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_sizes(config: object) -> None:
    """Raise ValueError if a config has sizes that no model has. Call this before a model is made.

    Text in place of a number is refused too, because transformers does not check all parts (rope_parameters).
    """
    waiting = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int | float):
            limit = _limit_of(name)
            if not abs(value) <= limit:
                raise ValueError(f"{name} is {value}; at most {limit} is sensible")
        elif isinstance(value, str) and _OF_NUMBERS.fullmatch(str(name)):
            raise ValueError(f"{name} is {value!r:.80}, which is no number")


def _limit_of(name: str) -> float:
    if name in ("n_layer", "num_hidden_layers"):
        return MAX_LAYERS
    # Positions cost no memory: Llamba's own config has 10**9 of them, and transformers writes 10**30.
    return math.inf if "position" in name or "length" in name else MAX_WIDTH


def _short(path: PurePosixPath) -> bool:
    return len(path.parts) <= MAX_DEPTH and all(len(part.encode()) <= 255 for part in path.parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r:.80} twice")
    return found


def bounded(digits: str) -> int:
    """The integer, for json's `parse_int`; raises ValueError if it has too many digits."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has the number {digits[:24]}...")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text[:24]}")
    return number


def _check_depth_and_strings(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # raises ValueError for half a surrogate pair, which cannot be written
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError("its JSON is nested too deeply")
