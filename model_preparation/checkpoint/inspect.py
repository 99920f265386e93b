"""Shows the contents of files and folders of tensors (names, numbers, digests), and the differences between two.

It reads .safetensors files, torch.save's files of tensors and plain values, and our `model.pt`. A folder may be a
checkpoint, a state of a healing run, extracted layers, an adapter, or a Hugging Face model. A few megabytes are in
memory at a time. No code of a file is run: a file with a global that could run code is refused.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, read_info
from model_preparation.checkpoint.model_digests import tensors_of
from model_preparation.checkpoint.tensor_statistics import difference_of, statistics_of
from model_preparation.errors import SurgeryError, one_line
from model_preparation.hub.sources import TABLE, resolve
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange, pt_ranges, safetensors_ranges
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.pickle_check import TENSORS, allowed_in_module
from model_preparation.io.untrusted.pt_check import check_pt

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_SHOWN_DIGITS = 16  # of each digest


@dataclass
class Contents:
    """Tensors by name, and plain values (numbers, strings, None) by name."""

    tensors: dict[str, TensorRange] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def inspect_checkpoint(
    path: str | Path,
    pattern: str = "*",
    *,
    diff: str | Path | None = None,
    as_json: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Lines to print: one per tensor of a file or folder, then one per plain value, then the totals.

    Args:
        path: a file or folder of tensors, a model's name, or a hub id with its prefix (huggingface:org/name).
        pattern: show only names that match, such as "*.mlp.*", or that begin with `pattern` and a dot.
        diff: another such path; the lines then say which tensors differ, and how.
        as_json: one JSON object per tensor or plain value, with digests in full, and no totals. With `diff`,
            it has no effect.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if the path has no tensors, no name fits, a file is damaged, or a file names a global that could
            run code.
    """
    place = place_of(path, sources)
    if diff is not None:
        return _differences(place, place_of(diff, sources), pattern)
    return _lines(place, pattern, as_json)


def place_of(given: str | Path, sources: Mapping[str, str] | None = None) -> Path:
    """The model's folder if `given` is a model's name or a hub id with a prefix; otherwise the given path.

    A path that exists comes first.
    """
    path = Path(given).expanduser()
    if path.exists() or (str(given) not in TABLE and ":" not in str(given)):
        return path
    return resolve(str(given), overrides=sources).folder


def _lines(path: Path, pattern: str, as_json: bool) -> Iterator[str]:
    everything = contents_of(path)
    contents = _matching(everything, pattern)
    if not (contents.tensors or contents.values) and everything.tensors:
        known = ", ".join(list(everything.tensors)[:3])
        raise SurgeryError(f"No name in {path} fits {pattern!r}. Among its names are {known}.")
    width = max(map(len, contents.tensors), default=0)
    for name, place in contents.tensors.items():
        found = statistics_of(place)
        if as_json:
            fields: dict[str, Any] = {"name": name, "dtype": place.dtype.name}
            fields |= {"shape": list(place.shape), "bytes": place.size_bytes} | asdict(found)
            # JSON has no NaN.
            yield json.dumps({what: None if value != value else value for what, value in fields.items()})
            continue
        numbers = f"mean {found.mean:+.3e}  std {found.std:.3e}  min {found.least:+.3e}  max {found.most:+.3e}"
        not_finite = f"  NOT FINITE: {found.not_finite}" if found.not_finite else ""
        size = decimal(place.size_bytes)
        yield f"{name:<{width}}  {_kind(place)}  {size}  {numbers}  {found.blake3[:_SHOWN_DIGITS]}{not_finite}"
    for name, value in contents.values.items():
        yield json.dumps({"name": name, "value": repr(value)}) if as_json else f"{name} = {value!r:.100}"
    if not as_json:
        size_bytes = sum(place.size_bytes for place in contents.tensors.values())
        numel = sum(place.numel for place in contents.tensors.values())
        yield f"{len(contents.tensors)} tensors, {numel:,} numbers, {decimal(size_bytes)} in {path}"


def _differences(path: Path, other: Path, pattern: str) -> Iterator[str]:
    """A line per tensor that differs, then the counts."""
    ours, theirs = (_matching(contents_of(one), pattern).tensors for one in (path, other))
    if not (ours or theirs):
        raise SurgeryError(f"No tensor in {path} or {other} fits {pattern!r}.")
    equal = differing = 0
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs or name not in ours:
            yield f"{name}  only in {path if name in ours else other}: {_kind((ours | theirs)[name])}"
        elif ours[name].shape != theirs[name].shape:
            yield f"{name}  {_kind(ours[name])} against {_kind(theirs[name])}"
        elif ours[name].dtype == theirs[name].dtype and (
            statistics_of(ours[name]).blake3 == statistics_of(theirs[name]).blake3
        ):
            equal += 1
            continue
        else:
            change = difference_of(ours[name], theirs[name])
            same_dtype = ours[name].dtype == theirs[name].dtype
            kinds = "" if same_dtype else f", {ours[name].dtype} against {theirs[name].dtype}"
            not_finite = f", NOT FINITE in one or both: {change.not_finite}" if change.not_finite else ""
            yield f"{name}  differs: at most {change.largest:.3e}, relative {change.relative:.3e}{kinds}{not_finite}"
        differing += 1
    yield f"{equal} tensors are the same in {path} and {other}, {differing} are not"


def _matching(contents: Contents, pattern: str) -> Contents:
    """The contents with names that fit a pattern such as "*.mlp.*", or that begin with the pattern and a dot."""

    def fits(name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")

    return Contents(
        {name: place for name, place in contents.tensors.items() if fits(name)},
        {name: value for name, value in contents.values.items() if fits(name)},
    )


def _kind(place: TensorRange) -> str:
    return f"{place.dtype.name} {list(place.shape)}"


def contents_of(path: Path) -> Contents:
    """The content of a file or folder.

    If a folder has several files that are not shards of one model, every name begins with its file's name.

    Raises:
        SurgeryError: as `inspect_checkpoint`.
    """
    if path.is_file():
        return _in_file(path)
    if not path.is_dir():
        raise SurgeryError(
            what_it_is(path) or f"{path} is not there. Give a file of tensors or a folder with such files."
        )
    if (path / INFO).is_file() and read_info(path).get("format") != "hf":
        return _in_file(path / STATE_DICT)
    if (path / "config.json").is_file():
        return Contents(TensorFiles(path).ranges)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise SurgeryError(
            what_it_is(path)
            or f"{path} holds no {', '.join(SUFFIXES)} files. Give a file of tensors or a folder of them."
        )
    if len(files) == 1:
        return _in_file(files[0])
    found = Contents()
    for file in files:
        inside = _in_file(file)
        found.tensors |= {f"{file.name}:{name}": place for name, place in inside.tensors.items()}
        found.values |= {f"{file.name}:{name}": value for name, value in inside.values.items()}
    return found


def _in_file(path: Path) -> Contents:
    if path.suffix == ".safetensors":
        return Contents(safetensors_ranges(path))
    try:
        try:
            check_pt(path, TENSORS)
        except ValueError:
            check_pt(path, allowed_in_module())
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = dict(tensors_of(loaded)) if isinstance(loaded, nn.Module) else dict(_flat(loaded, ""))
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
        return Contents(pt_ranges(path, tensors), values)
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # torch may raise any error, even for a file that passes the checks
        raise SurgeryError(
            f"{path} is refused: {one_line(error)}. Only tensors and plain values can be shown."
        ) from error


def _flat(value: object, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor or plain value) for each item; dots join names. A list of plain values counts as one item."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple | Tensor) for item in value):
        pairs = list(enumerate(value))
    else:
        yield name, value
        return
    for key, item in pairs:
        yield from _flat(item, f"{name}.{key}" if name else str(key))
