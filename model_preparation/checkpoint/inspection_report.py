"""Lines about the inside of files: what is there, and in what two of them differ.

In: `Contents`. Out: text, or one JSON object per tensor.
"""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from model_preparation.checkpoint.inspection_contents import Contents, contents_of
from model_preparation.checkpoint.inspection_statistics import difference_of, statistics_of
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_ranges import TensorRange

_SHOWN_DIGITS = 16  # of a digest


def describe(path: Path, pattern: str = "*", *, as_json: bool = False) -> Iterator[str]:
    """A line per tensor whose name fits `pattern`, then the plain values, then the sums.

    Raises:
        SurgeryError: as from `contents_of`.
    """
    everything = contents_of(path)
    contents = _matching(everything, pattern)
    if not (contents.tensors or contents.values) and everything.tensors:
        known = ", ".join(list(everything.tensors)[:3])
        raise SurgeryError(f"No name in {path} fits {pattern!r}. Among its names are {known}.")
    width = max(map(len, contents.tensors), default=0)
    for name, place in contents.tensors.items():
        found = statistics_of(place)
        if as_json:
            fields: dict[str, Any] = {"name": name, "dtype": str(place.dtype).removeprefix("torch.")}
            fields |= {"shape": list(place.shape), "bytes": place.size_bytes} | asdict(found)
            # JSON has no NaN
            yield json.dumps({what: None if value != value else value for what, value in fields.items()})
            continue
        numbers = f"mean {found.mean:+.3e}  std {found.std:.3e}  min {found.least:+.3e}  max {found.most:+.3e}"
        odd = f"  NOT FINITE: {found.not_finite}" if found.not_finite else ""
        size = decimal(place.size_bytes)
        yield f"{name:<{width}}  {_kind(place)}  {size}  {numbers}  {found.blake3[:_SHOWN_DIGITS]}{odd}"
    for name, value in contents.values.items():
        yield json.dumps({"name": name, "value": repr(value)}) if as_json else f"{name} = {value!r:.100}"
    if not as_json:
        size_bytes = sum(place.size_bytes for place in contents.tensors.values())
        numel = sum(place.numel for place in contents.tensors.values())
        yield f"{len(contents.tensors)} tensors, {numel:,} numbers, {decimal(size_bytes)} in {path}"


def compare(path: Path, other: Path, pattern: str = "*") -> Iterator[str]:
    """A line per tensor that the two do not have in common, then the counts.

    Raises:
        SurgeryError: as from `contents_of`.
    """
    ours, theirs = (_matching(contents_of(one), pattern).tensors for one in (path, other))
    if not (ours or theirs):
        raise SurgeryError(f"No tensor in {path} or {other} fits {pattern!r}.")
    equal = differing = 0
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs or name not in ours:
            yield f"{name}  only in {path if name in ours else other}: {_kind((ours | theirs)[name])}"
        elif ours[name].shape != theirs[name].shape:
            yield f"{name}  {_kind(ours[name])} against {_kind(theirs[name])}"
        elif ours[name].dtype == theirs[name].dtype and _digest(ours[name]) == _digest(theirs[name]):
            equal += 1
            continue
        else:
            change = difference_of(ours[name], theirs[name])
            kinds = (
                "" if ours[name].dtype == theirs[name].dtype else f", {ours[name].dtype} against {theirs[name].dtype}"
            )
            yield f"{name}  differs: at most {change.largest:.3e}, relative {change.relative:.3e}{kinds}"
        differing += 1
    yield f"{equal} tensors are the same in {path} and {other}, {differing} are not"


def _matching(contents: Contents, pattern: str) -> Contents:
    """What fits a pattern such as "*.mlp.*", or begins with it and a dot."""

    def fits(name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")

    return Contents(
        {name: place for name, place in contents.tensors.items() if fits(name)},
        {name: value for name, value in contents.values.items() if fits(name)},
    )


def _digest(place: TensorRange) -> str:
    return statistics_of(place).blake3


def _kind(place: TensorRange) -> str:
    return f"{str(place.dtype).removeprefix('torch.')} {list(place.shape)}"
