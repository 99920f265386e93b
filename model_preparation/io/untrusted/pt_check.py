"""Checks a zip file of torch.save before torch reads it, so that all programs find the same contents in the file.

Only files as torch writes them are accepted: every entry is stored uncompressed, entries do not overlap, nothing lies
between them, and the directory is at the very end. Python's zipfile reads the directory. This module checks what
zipfile does not check: gaps, unknown fields, and two end records that differ. It also limits how much zipfile reads.

Source of the layout: the zip format's APPNOTE, sections 4.3.7 (local header), 4.3.14 to 4.3.16 (the directory's end),
4.5.3 (zip64).
"""

import contextlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.pickle_check import MAX_PICKLE_BYTES, Allowed, PickleScan, scan
from model_preparation.io.untrusted.untrusted_files import regular_file

PICKLE = "data.pkl"
_MAX_RECORDS = 100_000
_MAX_SMALL_BYTES = 1024  # for every record that is neither a tensor nor the pickle
_MAX_DIRECTORY_BYTES = 64_000_000

_NAME = re.compile(
    r"([^/\\\0]{1,255})/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|data/[0-9]{1,9})"
)
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY_BYTES, _LENGTHS_AT = 46, 28  # a directory entry without name and fields; where it has their lengths
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # such a number means that a zip64 field has the real one
_UTF8, _SIZES_FOLLOW = 0x0800, 0x0008  # flags: the name is UTF-8; the sizes follow the data
_MAX_GAP_BYTES = 24  # for the sizes that may follow an entry's data


@dataclass(frozen=True)
class PtRecord:
    """A record's bytes: `size_bytes` of them from `start` on."""

    start: int
    size_bytes: int


def pt_records(path: Path) -> dict[str, PtRecord]:
    """The records of a file that torch.save wrote, by name without the folder in the zip ("data.pkl", "data/0", ...).

    Raises:
        ValueError: with what is wrong.
        SurgeryError, OSError: as from `untrusted_files.regular_file`.
    """
    with regular_file(path).open("rb") as file:
        return _records(file, os.fstat(file.fileno()).st_size)


def check_pt(path: Path, allowed: Allowed) -> PickleScan:
    """Check a .pt file's structure, and its pickle against `allowed`; returns what the pickle refers to.

    Raises:
        ValueError, SurgeryError, OSError: as from `pt_records` and `pickle_check.scan`; also if a storage
            and its record differ.
    """
    with regular_file(path).open("rb") as file:
        return check_archive(file, os.fstat(file.fileno()).st_size, allowed)


@contextlib.contextmanager
def reading_tensors(path: Path, advice: str = "Make or download it again.") -> Iterator[None]:
    """While the file is read, turn errors into a SurgeryError that ends with `advice`. OSError is not changed."""
    try:
        yield
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # a file that passes the checks may still make pickle or torch raise any error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SurgeryError(f"{path} cannot be read as tensors ({reason:.300}). {advice}") from error


def check_archive(file: BinaryIO, file_bytes: int, allowed: Allowed) -> PickleScan:
    """As `check_pt`, for an open file of `file_bytes` bytes."""
    records = _records(file, file_bytes)
    found = scan(_read(file, records[PICKLE].start, records[PICKLE].size_bytes), allowed)
    stored = {name.removeprefix("data/"): rec.size_bytes for name, rec in records.items() if name.startswith("data/")}
    for key in found.storages.keys() | stored.keys():
        if found.storages.get(key) != stored.get(key):
            raise ValueError(
                f"its storage {key!r:.40} has {stored.get(key, 'no')} bytes, "
                f"but its pickle says {found.storages.get(key, 'no')}"
            )
    return found


def _records(file: BinaryIO, file_bytes: int) -> dict[str, PtRecord]:
    count, directory_start, directory_end = _checked_end(file, file_bytes)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"its zip directory is damaged ({error})") from error
    if len(entries) != count:
        raise ValueError(f"its zip directory lists {len(entries)} entries instead of {count}")
    if len({entry.orig_filename.partition("/")[0] for entry in entries}) != 1:
        raise ValueError("its entries lie in more than one folder")
    # zipfile cuts the last entry's name and fields off at the directory's end, so compare the lengths in the file.
    name_and_fields = _raw_name(entries[-1]) + entries[-1].extra
    lengths = struct.pack("<3H", len(_raw_name(entries[-1])), len(entries[-1].extra), 0)
    if _read(file, directory_end - len(name_and_fields) - _ENTRY_BYTES + _LENGTHS_AT, len(lengths)) != lengths:
        raise ValueError("its zip directory is damaged")
    found: dict[str, PtRecord] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = _checked_name(entry)
        gap = entry.header_offset - end
        if not (0 <= gap <= _MAX_GAP_BYTES if found else gap == 0):
            raise ValueError(f"its entry {name} does not start where the entry before it ends")
        local = _LOCAL.unpack(_read(file, entry.header_offset, _LOCAL.size))
        start = entry.header_offset + _LOCAL.size + local[9] + local[10]
        same_name = _read(file, entry.header_offset + _LOCAL.size, local[9]) == _raw_name(entry)
        if local[0] != b"PK\x03\x04" or local[3] or not same_name:
            raise ValueError(f"its entry {name} differs from its zip directory")
        end = start + entry.file_size
        if end > directory_start:
            raise ValueError(f"its entry {name} does not end before its zip directory")
        limit = MAX_PICKLE_BYTES if name == PICKLE else _MAX_SMALL_BYTES
        if not name.startswith("data/") and entry.file_size > limit:
            raise ValueError(f"its entry {name} has {entry.file_size} bytes; at most {limit} are sensible")
        if name in found:
            raise ValueError(f"its zip directory lists {name} twice")
        found[name] = PtRecord(start, entry.file_size)
    if directory_start - end > _MAX_GAP_BYTES:
        raise ValueError("there is something between its last entry and its zip directory")
    if PICKLE not in found:
        raise ValueError("it has no data.pkl")
    return found


def _raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")


def _checked_name(entry: zipfile.ZipInfo) -> str:
    """The record's name without the folder; raises ValueError for a directory entry that torch never writes."""
    match = _NAME.fullmatch(entry.orig_filename)
    if match is None:
        raise ValueError(f"its zip directory lists {entry.orig_filename!a:.100}, which torch.save never writes")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.flag_bits & ~(_UTF8 | _SIZES_FOLLOW):
        raise ValueError(f"its entry {entry.orig_filename!a:.100} is compressed or encrypted")
    wide = sum(number >= _FULL32 for number in (entry.file_size, entry.compress_size, entry.header_offset))
    zip64 = struct.pack("<2H", 1, 8 * wide) if wide else b""
    if entry.comment or entry.volume or entry.extra[:4] != zip64 or len(entry.extra) != len(zip64) + 8 * wide:
        raise ValueError("its zip directory has fields that torch.save never writes")
    return match[2]


def _checked_end(file: BinaryIO, file_bytes: int) -> tuple[int, int, int]:
    """Check the end of the zip file. Return the number of entries in its directory, and where that starts and ends."""
    end_start = file_bytes - _END.size
    if end_start < 0 or _read(file, 0, 4) != b"PK\x03\x04":
        raise ValueError("it is not a zip file; torch.save writes zip files since torch 1.6")
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
        count, size, start = wide = end64[7:10]
        if locator[1:] != (0, after, 1) or end64[0] != b"PK\x06\x06" or end64[1] != 44 or end64[4:7] != (0, 0, count):
            raise ValueError("the end of its zip directory is damaged")
        fulls = (_FULL16, _FULL32, _FULL32)
        if any(short not in (value, full) for short, value, full in zip(end[4:7], wide, fulls, strict=True)):
            raise ValueError("the two end records of its zip directory differ")
    if end[1:3] != (0, 0) or end[3] not in (count, _FULL16) or end[7]:
        raise ValueError("the end of its zip directory is damaged")
    if start + size != after or size > _MAX_DIRECTORY_BYTES or not 0 < count <= _MAX_RECORDS:
        raise ValueError(f"its zip directory has {count} entries in {size} bytes at {start}, which is impossible")
    return count, start, after


def _read(file: BinaryIO, start: int, size_bytes: int) -> bytes:
    file.seek(start)
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise ValueError("it is cut short")
    return data
