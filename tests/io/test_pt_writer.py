"""write_together: files that torch.load reads, from placeholders and ranges of other files."""

import copy
import ctypes
import errno
import fcntl
import hashlib
import io
import mmap
import os
import struct
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from model_preparation.io import block_io
from model_preparation.io.block_io import ALIGNMENT
from model_preparation.io.tensors.dtypes import dtype_of
from model_preparation.io.tensors.pt_archive import Archive
from model_preparation.io.tensors.pt_dict import dict_ranges
from model_preparation.io.tensors.pt_writer import write_dict, write_together
from model_preparation.io.tensors.tensor_ranges import TensorRange, bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def saved_by_torch(content) -> dict[str, bytes]:
    """The records of the zip file torch.save makes of `content`, by name."""
    buffer = io.BytesIO()
    with config.patch("save.storage_alignment", ALIGNMENT):
        torch.save(content, buffer)
    return records_of(buffer)


def records_of(file) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # the CRCs are right
        named = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    named.pop(".data/serialization_id")  # depends on the records' order
    return named


def in_file(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorRange]:
    """The tensors' bytes in a file, one after another, and where each is."""
    places = {}
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            places[name] = TensorRange(path, file.tell(), tensor.shape, dtype_of(tensor.dtype))
            file.write(bytes_of(tensor))
    return places


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=8
    ),
    block_bytes=st.sampled_from([4096, 8192, 65536]),
)
def test_any_dict_of_tensors(tmp_path_factory, shapes, block_bytes):
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        str(i): torch.empty(tuple(shape), dtype=dtype).copy_(torch.rand(shape) * 100)
        for i, (shape, dtype) in enumerate(shapes)
    }
    places = in_file(folder / "raw", tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_io, "BLOCK_BYTES", block_bytes)
        files, digests = write_together([folder / "x.pt"], places, lambda held: [held])
        assert write_dict(folder / "y.pt", places) == (files["x.pt"], digests)
    data = (folder / "x.pt").read_bytes()
    assert (folder / "y.pt").read_bytes() == data
    assert files == {"x.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert records_of(folder / "x.pt") == saved_by_torch(tensors)
    loaded = torch.load(folder / "x.pt", mmap=True)
    ranges = dict_ranges(folder / "x.pt", "")
    assert list(ranges) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
        assert digests[name] == blake3(bytes_of(tensor)).hexdigest()
        assert (ranges[name].shape, ranges[name].dtype) == (tuple(tensor.shape), dtype_of(tensor.dtype))
        assert data[ranges[name].start :].startswith(bytes(bytes_of(tensor)))


def test_several_files_begin_alike_and_are_fed_from_one_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(30, 700), torch.nn.BatchNorm1d(700), torch.nn.Linear(700, 3))
    contents = {"model.pt": module, "state.pt": module.state_dict(), "part.pt": {"w": module[2].weight}}
    reads = []

    @dataclass(frozen=True)
    class Reading(TensorRange):
        def read_into(self, view, start):
            reads.append((self.start, start))
            super().read_into(view, start)

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    sources = {name: Reading(**vars(place)) for name, place in in_file(tmp_path / "raw", parameters).items()}

    def filled_in(held):
        other = copy.deepcopy(module)
        other.load_state_dict(held, strict=False, assign=True)
        return [other, other.state_dict()]

    write_together([tmp_path / "model.pt", tmp_path / "state.pt"], sources, filled_in)
    assert len(reads) == len(set(reads)) == len(parameters)
    whole, state = (tmp_path / "model.pt").read_bytes(), (tmp_path / "state.pt").read_bytes()
    weights_end = sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in module.parameters()) + ALIGNMENT
    assert whole[:weights_end] == state[:weights_end]

    write_together([tmp_path / name for name in contents], {}, lambda _: list(contents.values()))
    for name, content in contents.items():
        loaded = torch.load(tmp_path / name, weights_only=name != "model.pt")
        tensors = loaded.state_dict() if name == "model.pt" else loaded
        for key, tensor in (content.state_dict() if name == "model.pt" else content).items():
            assert torch.equal(tensors[key], tensor)
            storage = tensors[key].untyped_storage()
            assert storage.nbytes() == tensor.untyped_storage().nbytes()


def test_every_tensor_is_aligned_for_direct_io(tmp_path):
    content = {str(size): torch.ones(size) for size in (1, 1024, 1025, 3)}
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert [reader.get_record_offset(f"data/{key}") % ALIGNMENT for key in range(4)] == [0] * 4


def test_tensors_that_share_a_storage_are_written_once(tmp_path):
    tensor = torch.randn(50, 20)
    content = {"a": tensor, "view": tensor[3:9], "again": tensor, "other": torch.ones(3)}
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    found, wanted = records_of(tmp_path / "x.pt"), saved_by_torch(content)
    assert found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted if name != "data.pkl")
    loaded = torch.load(tmp_path / "x.pt")
    assert loaded["view"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()
    assert torch.equal(loaded["view"], content["view"])


def test_sets_are_the_same_whatever_their_order(tmp_path):
    """The order depends on the process, and on what was added first."""
    words = [f"word{i:03}" for i in range(500)]
    one, other = {*words}, {*reversed(words)}
    assert list(one) != list(other)
    for name, each in (("one", one), ("other", other)):
        content = {"t": torch.ones(2), "s": each, "f": frozenset(each), "n": {3, (1, 2)}}
        write_together([tmp_path / name], {}, lambda _, content=content: [content])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    pickled = records_of(tmp_path / "one")["data.pkl"]
    assert sorted(words, key=lambda word: pickled.index(word.encode())) == words  # they are sorted
    assert torch.load(tmp_path / "one", weights_only=False)["s"] == one


def test_without_direct_io_the_bytes_are_the_same(tmp_path, monkeypatch):
    content = {"a": torch.randn(300, 1000)}
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    direct = (tmp_path / "x.pt").read_bytes()
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "posix_fallocate")
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    assert (tmp_path / "x.pt").read_bytes() == direct


def cached_pages(path: Path) -> int:
    """How many pages of the file the page cache holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages) == 0
        del start
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize("slow_way", ["direct", "cached"])
def test_after_a_trial_blocks_go_the_faster_way_and_leave_the_page_cache(tmp_path, monkeypatch, slow_way):
    (tmp_path / "other").write_bytes(bytes(ALIGNMENT))
    with (tmp_path / "other").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(tmp_path / "other"):
        pytest.skip("this file system is in memory")
    ways: list[str] = []
    cached: list[int] = []
    written, synced = os.pwrite, os.fsync

    def slow(descriptor, data, position):
        way = "direct" if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT else "cached"
        if len(data) == ALIGNMENT:
            ways.append(way)
            time.sleep(0.02 * (way == slow_way))
        return written(descriptor, data, position)

    def looking(descriptor):
        cached.append(cached_pages(path))
        synced(descriptor)

    path = tmp_path / "x.pt"
    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(os, "fsync", looking)
    monkeypatch.setattr(block_io, "BLOCK_BYTES", ALIGNMENT)
    monkeypatch.setattr(block_io, "_RUN_BLOCKS", 2)
    monkeypatch.setattr(block_io, "_TRIED_BLOCKS", 8)
    block_io._disk.cache_clear()
    write_together([path], {}, lambda _: [{"a": torch.arange(60 * ALIGNMENT, dtype=torch.uint8)}])
    block_io._disk.cache_clear()
    assert {*ways[:8]} == {"direct", "cached"}
    assert ({"direct", "cached"} - {slow_way}) == {*ways[14:]}  # the trial's last blocks end while others begin
    assert cached[0] < 20  # of more than 60
    assert cached_pages(path) == 0
    assert torch.equal(torch.load(path)["a"], torch.arange(60 * ALIGNMENT, dtype=torch.uint8))


def test_a_write_back_that_fails_is_an_error(tmp_path, monkeypatch):
    """If sync_file_range reports an error, a later fsync does not report it again."""

    def failing(*arguments):
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(block_io, "_sync_file_range", failing)
    with pytest.raises(OSError, match="Input/output") as raised:
        write_together([tmp_path / "x.pt"], {}, lambda _: [{"a": torch.ones(3)}])
    assert raised.value.filename == str(tmp_path / "x.pt")


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 4095, 4096, 10**6, 2**32 - 2, 2**32 - 1, 2**32, 10**10]), max_size=9),
    pickled=st.binary(min_size=1, max_size=9000),
)
def test_the_bytes_around_tensors_of_any_size_are_torch_s(sizes, pickled):
    """Only the id at the end differs: torch makes it from the names and CRCs of the records."""

    class Sink(io.RawIOBase):
        def __init__(self):
            self.gaps, self.position = [b""], 0

        def write(self, data):
            self.gaps[-1] += bytes(data)
            self.position += len(data)
            return len(data)

        def seek(self, offset, whence=os.SEEK_SET):  # over a tensor
            self.gaps.append(b"")
            self.position += offset
            return self.position

    sink, archive, found = Sink(), Archive(), [b""]
    writer = torch._C.PyTorchFileWriter(sink, True, ALIGNMENT)
    for key, size_bytes in enumerate(sizes):
        writer.write_record_metadata(f"data/{key}", size_bytes)
        found[-1] += archive.begin_tensor(size_bytes)
        found += [b""] if size_bytes else []
        found[-1] += archive.finish_tensor(0)
    records = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"4096", "byteorder": b"little"}
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    found[-1] += archive.end(pickled)
    theirs = writer.serialization_id().encode()
    place = sink.gaps[-1].rindex(theirs)
    ours = found[-1][place : place + len(theirs)]
    for a, b in ((ours, theirs), (struct.pack("<I", zlib.crc32(ours)), struct.pack("<I", zlib.crc32(theirs)))):
        found[-1] = found[-1].replace(a, b)
    assert found == sink.gaps


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_comes_through(tmp_path, monkeypatch, code):
    calls = []

    def failing(descriptor, data, position):
        calls.append(position)
        if len(calls) > 2:
            raise OSError(code, os.strerror(code))
        return written(descriptor, data, position)

    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(block_io, "BLOCK_BYTES", 4096)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        write_together([tmp_path / "x.pt"], {}, lambda _: [{"a": torch.randn(300, 100)}])
    assert raised.value.filename == str(tmp_path / "x.pt")


def test_no_failing_write_goes_unnoticed(tmp_path, monkeypatch):
    """Any write may fail, also the last write of another thread. All writes end before the file is synced."""
    content = {"a": torch.randn(10, 1000), "b": torch.randn(3)}
    written, synced, calls, done = os.pwrite, os.fsync, [], []

    def counting(descriptor, data, position):
        number = len(calls)
        calls.append(position)
        if number in failing:
            time.sleep(0.02)  # long after the others
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        count = written(descriptor, data, position)
        done.append(position)
        return count

    monkeypatch.setattr(os, "pwrite", counting)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced(descriptor), done.append("synced")))
    monkeypatch.setattr(block_io, "BLOCK_BYTES", 4096)
    failing: list[int] = []
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    assert done[-1] == "synced"
    count = len(calls)
    assert count > 10
    for number in range(count):
        calls.clear()
        failing[:] = [number]
        with pytest.raises(OSError, match="Input/output"):
            write_together([tmp_path / "x.pt"], {}, lambda _: [content])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    content = {"a": torch.randn(300, 100)}
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    whole = (tmp_path / "x.pt").read_bytes()
    written = os.pwrite
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: written(descriptor, data[:1000], position))
    write_together([tmp_path / "x.pt"], {}, lambda _: [content])
    assert (tmp_path / "x.pt").read_bytes() == whole


def test_a_source_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(100))
    place = TensorRange(tmp_path / "raw", 0, (100,), dtype_of(torch.float32))
    with pytest.raises(OSError, match="ends early"):
        write_dict(tmp_path / "x.pt", {"a": place})


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES[:4]), st.sampled_from(DTYPES[:4])),
)
def test_casting_on_the_way(tmp_path_factory, shape, dtypes):
    folder = tmp_path_factory.mktemp("cast")
    tensor = torch.randn(shape).to(dtypes[0])
    place = in_file(folder / "raw", {"a": tensor})["a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_io, "BLOCK_BYTES", 4096)
        write_dict(folder / "x.pt", {"a": place.cast(dtypes[1])})
    assert torch.equal(torch.load(folder / "x.pt")["a"], tensor.to(dtypes[1]))
