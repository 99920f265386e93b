"""The zip file that torch.save writes, checked before torch sees it.

In: a .pt file. Out: where each of its records lies, or the reason why it is refused. Only what torch writes passes:
every entry stored as it is, none over another, nothing between them, the directory at the very end; so that no two
readers can see different things in it, and nothing is unpacked to more than it is.

Source of the layout: the zip format's APPNOTE, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to
4.3.16 (its end), 4.5.3 (zip64).
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model_preparation.io.untrusted.pickle_check import MAX_PICKLE_BYTES, Allowed, PickleScan, scan
from model_preparation.io.untrusted.untrusted_files import regular_file

PICKLE = "data.pkl"
_MAX_RECORDS = 100_000
_MAX_SMALL_BYTES = 1024  # of every record that is neither a tensor nor the pickle
_MAX_DIRECTORY_BYTES = 64_000_000

_NAME = re.compile(
    rb"([^/\\\0]{1,255})/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    rb"|data/\d{1,9})"
)
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8
_MAX_GAP_BYTES = 24  # the sizes that follow the data


@dataclass(frozen=True)
class PtRecord:
    """A record's bytes: `size_bytes` of them from `start` on."""

    start: int
    size_bytes: int


def pt_records(path: Path) -> dict[str, PtRecord]:
    """The records of a file that torch.save wrote, by name without the archive's ("data.pkl", "data/0", ...).

    Raises:
        ValueError: saying what is wrong with it.
        SurgeryError, OSError: as from `untrusted_files.regular_file`.
    """
    with regular_file(path).open("rb") as file:
        return _records(file, os.fstat(file.fileno()).st_size)


def check_pt(path: Path, allowed: Allowed) -> PickleScan:
    """Check a .pt file's structure, and its pickle against `allowed`; returns what the pickle refers to.

    Raises:
        ValueError, SurgeryError, OSError: as from `pt_records` and `pickle_scan.scan`; also for a storage that is not
            exactly one record.
    """
    with regular_file(path).open("rb") as file:
        return check_archive(file, os.fstat(file.fileno()).st_size, allowed)


def check_archive(file: BinaryIO, file_bytes: int, allowed: Allowed) -> PickleScan:
    """`check_pt` for what torch.save wrote into an open file of `file_bytes` bytes."""
    records = _records(file, file_bytes)
    found = scan(_read(file, records[PICKLE].start, records[PICKLE].size_bytes), allowed)
    stored = {name.removeprefix("data/"): rec.size_bytes for name, rec in records.items() if name.startswith("data/")}
    for key in found.storages.keys() | stored.keys():
        if found.storages.get(key) != stored.get(key):
            raise ValueError(
                f"its storage {key!r:.40} has {stored.get(key, 'no')} bytes, "
                f"and its pickle means {found.storages.get(key, 'no')}"
            )
    return found


def _records(file: BinaryIO, file_bytes: int) -> dict[str, PtRecord]:
    directory, count, directory_start = _directory(file, file_bytes)
    headers = []
    archives = set()
    position = 0
    while position < len(directory):
        if len(directory) - position < _ENTRY.size:
            raise ValueError("its zip directory is damaged")
        fields = _ENTRY.unpack_from(directory, position)
        signature, flags, method, packed, size, header = (fields[i] for i in (0, 3, 4, 8, 9, 16))
        lengths = fields[10:13]  # of name, extra field and comment
        position += _ENTRY.size
        raw_name = directory[position : position + lengths[0]]
        extra = directory[position + lengths[0] : position + lengths[0] + lengths[1]]
        position += sum(lengths)
        if signature != b"PK\x01\x02" or position > len(directory) or lengths[2] or fields[13]:
            raise ValueError("its zip directory is damaged")
        match = _NAME.fullmatch(raw_name)
        if match is None:
            raise ValueError(f"its zip directory lists {raw_name!r:.100}, which torch.save never writes")
        size, packed, header = _with_zip64(extra, size, packed, header)
        if method or flags & ~_FLAGS or packed != size:
            raise ValueError(f"its entry {raw_name.decode(errors='replace')!r:.100} is compressed or encrypted")
        archives.add(match[1])
        headers.append((header, raw_name, match[2].decode(), size))
    if len(headers) != count:
        raise ValueError(f"its zip directory lists {len(headers)} entries instead of {count}")
    if len(archives) != 1:
        raise ValueError("its entries lie in more than one folder")
    return _placed(file, sorted(headers), directory_start)


def _placed(file: BinaryIO, headers: list[tuple[int, bytes, str, int]], directory_start: int) -> dict[str, PtRecord]:
    """The records in the file's order, each following the one before it."""
    found: dict[str, PtRecord] = {}
    end = 0
    for header, raw_name, name, size in headers:
        gap = header - end
        if not (0 <= gap <= _MAX_GAP_BYTES if found else gap == 0):
            raise ValueError(f"its entry {name} does not lie where the one before it ends")
        local = _LOCAL.unpack(_read(file, header, _LOCAL.size))
        start = header + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\x03\x04" or local[3] or _read(file, header + _LOCAL.size, local[9]) != raw_name:
            raise ValueError(f"its entry {name} differs from its zip directory")
        end = start + size
        if end > directory_start:
            raise ValueError(f"its entry {name} runs out of the file")
        limit = MAX_PICKLE_BYTES if name == PICKLE else _MAX_SMALL_BYTES
        if not name.startswith("data/") and size > limit:
            raise ValueError(f"its entry {name} has {size} bytes; at most {limit} are sensible")
        if name in found:
            raise ValueError(f"its zip directory lists {name} twice")
        found[name] = PtRecord(start, size)
    if directory_start - end > _MAX_GAP_BYTES:
        raise ValueError("there is something between its last entry and its zip directory")
    if PICKLE not in found:
        raise ValueError("it has no data.pkl")
    return found


def _directory(file: BinaryIO, file_bytes: int) -> tuple[bytes, int, int]:
    """The central directory's bytes, the number of its entries, and where it starts."""
    end_start = file_bytes - _END.size
    if end_start < 0 or _read(file, 0, 4) != b"PK\x03\x04":
        raise ValueError("it is not a zip file, as torch.save writes them since torch 1.6")
    end = _END.unpack(_read(file, end_start, _END.size))
    if end[0] != b"PK\x05\x06":
        raise ValueError("it does not end in a zip directory; it may be cut short")
    count, size, start = end[4:7]
    after = end_start
    locator_start = end_start - _LOCATOR.size
    if locator_start >= _END64.size and _read(file, locator_start, 4) == b"PK\x06\x07":
        locator = _LOCATOR.unpack(_read(file, locator_start, _LOCATOR.size))
        after = locator_start - _END64.size
        end64 = _END64.unpack(_read(file, after, _END64.size))
        if locator[1:] != (0, after, 1) or end64[0] != b"PK\x06\x06" or end64[1] != 44 or end64[4:6] != (0, 0):
            raise ValueError("the end of its zip directory is damaged")
        wide = end64[7:10]
        if any(short not in (value, full) for short, value, full in zip(end[4:7], wide, _FULLS, strict=True)):
            raise ValueError("the two ends of its zip directory differ")
        if end64[6] != wide[0]:
            raise ValueError("its zip directory is on more than one disk")
        count, size, start = wide
    if end[1:3] != (0, 0) or end[3] not in (count, _FULL16) or end[7]:
        raise ValueError("the end of its zip directory is damaged")
    if start + size != after or size > _MAX_DIRECTORY_BYTES or not 0 < count <= _MAX_RECORDS:
        raise ValueError(f"its zip directory has {count} entries in {size} bytes at {start}, which cannot be")
    return _read(file, start, size), count, start


_FULLS = (_FULL16, _FULL32, _FULL32)


def _with_zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The three numbers, from the zip64 field where they are too large for their own; no other field may be there."""
    numbers = [size, packed, header]
    wide = [i for i, number in enumerate(numbers) if number == _FULL32]
    if extra or wide:
        if len(extra) != 4 + 8 * len(wide) or struct.unpack_from("<2H", extra) != (1, 8 * len(wide)):
            raise ValueError("its zip directory has fields torch.save never writes")
        for i, number in zip(wide, struct.unpack_from(f"<{len(wide)}Q", extra, 4), strict=True):
            numbers[i] = number
    return numbers[0], numbers[1], numbers[2]


def _read(file: BinaryIO, start: int, size_bytes: int) -> bytes:
    file.seek(start)
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise ValueError("it is cut short")
    return data
