"""write_together: files that torch.load reads, from placeholders and ranges of other files."""

import errno
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from model_preparation.files import block_io
from model_preparation.files.block_io import ALIGNMENT
from model_preparation.tensors.dtypes import dtype_of
from model_preparation.tensors.pt_writer import placeholder, write_together
from model_preparation.tensors.tensor_ranges import TensorRange, bytes_of
from tests.conftest import run_python

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
    held = {name: placeholder(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_io, "BLOCK_BYTES", block_bytes)
        written = write_together(
            {folder / "x.pt": held}, {held[name].data_ptr(): places[name] for name in tensors if tensors[name].numel()}
        )
    data = (folder / "x.pt").read_bytes()
    assert written.files == {folder / "x.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert records_of(folder / "x.pt") == saved_by_torch(tensors)
    loaded = torch.load(folder / "x.pt", mmap=True)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
        if tensor.numel():
            assert written.blake3[held[name].data_ptr()] == blake3(bytes_of(tensor)).hexdigest()


def test_several_files_begin_alike_and_are_fed_from_one_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(30, 700), torch.nn.BatchNorm1d(700), torch.nn.Linear(700, 3))
    contents = {"model.pt": module, "state.pt": module.state_dict(), "part.pt": {"w": module[2].weight}}
    reads = []

    class Reading:
        place = None

        def __init__(self, tensor):
            self.tensor = tensor

        def read_into(self, view, start):
            reads.append((self.tensor.data_ptr(), start))
            view[:] = bytes_of(self.tensor)[start : start + len(view)]

    sources = {parameter.data_ptr(): Reading(parameter.detach()) for parameter in module.parameters()}
    write_together({tmp_path / name: contents[name] for name in ("model.pt", "state.pt")}, sources)
    assert len(reads) == len(set(reads)) == len(list(module.parameters()))
    whole, state = (tmp_path / "model.pt").read_bytes(), (tmp_path / "state.pt").read_bytes()
    weights_end = sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in module.parameters()) + ALIGNMENT
    assert whole[:weights_end] == state[:weights_end]

    write_together({tmp_path / name: content for name, content in contents.items()}, sources)
    for name, content in contents.items():
        loaded = torch.load(tmp_path / name, weights_only=name != "model.pt")
        tensors = loaded.state_dict() if name == "model.pt" else loaded
        for key, tensor in (content.state_dict() if name == "model.pt" else content).items():
            assert torch.equal(tensors[key], tensor)
            storage = tensors[key].untyped_storage()
            assert storage.nbytes() == tensor.untyped_storage().nbytes()


def test_every_tensor_is_aligned_for_direct_io(tmp_path):
    content = {str(size): torch.ones(size) for size in (1, 1024, 1025, 3)}
    write_together({tmp_path / "x.pt": content}, {})
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert [reader.get_record_offset(f"data/{key}") % ALIGNMENT for key in range(4)] == [0] * 4


def test_tensors_that_share_a_storage_are_written_once(tmp_path):
    tensor = torch.randn(50, 20)
    content = {"a": tensor, "view": tensor[3:9], "again": tensor, "other": torch.ones(3)}
    write_together({tmp_path / "x.pt": content}, {})
    found, wanted = records_of(tmp_path / "x.pt"), saved_by_torch(content)
    assert found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted if name != "data.pkl")
    loaded = torch.load(tmp_path / "x.pt")
    assert loaded["view"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()
    assert torch.equal(loaded["view"], content["view"])


def test_sets_are_the_same_in_every_process(tmp_path):
    code = """
import torch
from pathlib import Path
from model_preparation.tensors.pt_writer import write_together
words = [f"word{i}" for i in range(50)]
write_together({Path(path): {"t": torch.ones(2), "s": set(words), "f": frozenset(words), "n": {3, (1, 2)}}}, {})
"""
    exec(code, {"path": tmp_path / "here"})
    script = f"path = {str(tmp_path / 'there')!r}{code}"
    result = run_python("-c", script, cwd=tmp_path, PYTHONHASHSEED="12345")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert torch.load(tmp_path / "here", weights_only=False)["s"] == {f"word{i}" for i in range(50)}


def test_without_direct_io_the_bytes_are_the_same(tmp_path, monkeypatch):
    content = {"a": torch.randn(300, 1000)}
    write_together({tmp_path / "x.pt": content}, {})
    direct = (tmp_path / "x.pt").read_bytes()
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "posix_fallocate")
    write_together({tmp_path / "x.pt": content}, {})
    assert (tmp_path / "x.pt").read_bytes() == direct


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
        write_together({tmp_path / "x.pt": {"a": torch.randn(300, 100)}}, {})
    assert raised.value.filename == str(tmp_path / "x.pt")


def test_no_failing_write_goes_unnoticed(tmp_path, monkeypatch):
    """Whichever it is, the last ones of the other threads too, and all are done before the file is synced."""
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
    write_together({tmp_path / "x.pt": content}, {})
    assert done[-1] == "synced"
    count = len(calls)
    assert count > 10
    for number in range(count):
        calls.clear()
        failing[:] = [number]
        with pytest.raises(OSError, match="Input/output"):
            write_together({tmp_path / "x.pt": content}, {})


def test_short_writes_are_continued(tmp_path, monkeypatch):
    content = {"a": torch.randn(300, 100)}
    write_together({tmp_path / "x.pt": content}, {})
    whole = (tmp_path / "x.pt").read_bytes()
    written = os.pwrite
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: written(descriptor, data[:1000], position))
    write_together({tmp_path / "x.pt": content}, {})
    assert (tmp_path / "x.pt").read_bytes() == whole


def test_a_source_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(100))
    held = placeholder((100,), torch.float32)
    place = TensorRange(tmp_path / "raw", 0, held.shape, dtype_of(held.dtype))
    with pytest.raises(OSError, match="ends early"):
        write_together({tmp_path / "x.pt": {"a": held}}, {held.data_ptr(): place})


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES[:4]), st.sampled_from(DTYPES[:4])),
)
def test_casting_on_the_way(tmp_path_factory, shape, dtypes):
    folder = tmp_path_factory.mktemp("cast")
    tensor = torch.randn(shape).to(dtypes[0])
    place = in_file(folder / "raw", {"a": tensor})["a"]
    held = placeholder(shape, dtypes[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_io, "BLOCK_BYTES", 4096)
        write_together({folder / "x.pt": {"a": held}}, {held.data_ptr(): place.cast(dtypes[1])})
    assert torch.equal(torch.load(folder / "x.pt")["a"], tensor.to(dtypes[1]))
