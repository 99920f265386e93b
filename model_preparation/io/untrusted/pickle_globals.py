"""Which globals the pickle in a file names, found without unpickling it: it is only cut into its instructions.

In: a file that torch.save wrote, as a zip (torch 1.6 and newer) or as a row of pickles (older). Out: dotted names.
"""

import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from model_preparation.errors import SurgeryError

_MAX_PICKLE_BYTES = 64_000_000  # tensors lie beside it, so a layer's has some 10 KB
_OLD_FORMAT_PICKLES = 4  # magic number, protocol, system, the object; then the tensors

_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


def globals_in(path: Path) -> set[str]:
    """Every class or function that loading `path` would import, such as "collections.OrderedDict".

    Raises:
        SurgeryError: if it is not a file torch.save wrote.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _names(pickletools.genops(_pickle_of(file)))
            file.seek(0)
            return set().union(*(_names(pickletools.genops(file)) for _ in range(_OLD_FORMAT_PICKLES)))
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise SurgeryError(
            f"{path} is not a file that torch.save wrote ({' '.join(str(error).split())[:100]}). Copy it again."
        ) from error


def _pickle_of(file: BinaryIO) -> bytes:
    with zipfile.ZipFile(file) as archive:
        inner = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in inner:
            raise ValueError("it is a TorchScript program")
        if "data.pkl" not in inner:
            raise ValueError("it is a zip file without data.pkl")
        with archive.open(inner["data.pkl"]) as member:
            data = member.read(_MAX_PICKLE_BYTES + 1)
    if len(data) > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {_MAX_PICKLE_BYTES} bytes")
    return data


def _names(operations: Iterable[tuple[Any, Any, Any]]) -> set[str]:
    """The globals of one pickle. Newer protocols put a name's two halves on the stack, perhaps by way of the memo."""
    found = set()
    memo: dict[int, str] = {}
    texts = ["", ""]
    for operation, argument, _ in operations:
        name = operation.name
        if name in _TEXT:
            texts.append(argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = texts[-1]
        elif name in _PUT:
            memo[argument] = texts[-1]
        elif name in _GET:
            texts.append(memo.get(argument, ""))
        elif name in ("GLOBAL", "INST"):
            found.add(argument.replace(" ", "."))
        elif name == "STACK_GLOBAL":
            found.add(f"{texts[-2]}.{texts[-1]}")
    return found
