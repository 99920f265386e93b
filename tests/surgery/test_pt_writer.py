"""write_together: the bytes torch.save writes, from placeholders and files."""

import errno
import hashlib
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_preparation.surgery import pt_writer
from model_preparation.surgery.pt_writer import file_blocks, placeholder, write_together
from model_preparation.surgery.tensor_ranges import TensorRange, bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def saved_by_torch(content, path: Path) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(1, 40), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=8
    ),
    block_bytes=st.sampled_from([4096, 8192, 65536]),
)
def test_any_dict_of_tensors(tmp_path_factory, shapes, block_bytes):
    folder = tmp_path_factory.mktemp("any")
    tensors = {str(i): (torch.rand(shape) * 100).to(dtype) for i, (shape, dtype) in enumerate(shapes)}
    raw = folder / "raw"
    places, held = {}, {}
    with raw.open("wb") as file:
        for name, tensor in tensors.items():
            places[name] = TensorRange(raw, file.tell(), tensor.shape, tensor.dtype)
            file.write(bytes_of(tensor))
            held[name] = placeholder(tensor.shape, tensor.dtype)
    blocks_of = {held[name].data_ptr(): places[name].blocks for name in tensors}
    (folder / "torch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt_writer, "BLOCK_BYTES", block_bytes)
        found = write_together({folder / "x.pt": held}, blocks_of)[folder / "x.pt"]
    data = (folder / "x.pt").read_bytes()
    assert data == saved_by_torch(tensors, folder / "torch" / "x.pt")
    assert found == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_files_of_different_content_are_fed_from_one_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(30, 700), torch.nn.BatchNorm1d(700), torch.nn.Linear(700, 3))
    (tmp_path / "torch").mkdir()
    contents = {"model.pt": module, "state.pt": module.state_dict(), "part.pt": {"w": module[2].weight}}
    reads = []

    def reading(tensor):
        reads.append(tensor.data_ptr())
        yield bytes_of(tensor)

    blocks_of = {p.data_ptr(): partial(reading, p.detach()) for p in module.parameters()}
    write_together({tmp_path / name: content for name, content in contents.items()}, blocks_of)
    for name, content in contents.items():
        assert (tmp_path / name).read_bytes() == saved_by_torch(content, tmp_path / "torch" / name)
    assert len(reads) == len(set(reads)) == len(list(module.parameters()))


def test_tensors_that_share_a_storage_are_written_once(tmp_path):
    tensor = torch.randn(50, 20)
    content = {"a": tensor, "view": tensor[3:9], "again": tensor, "other": torch.ones(3)}
    (tmp_path / "torch").mkdir()
    write_together({tmp_path / "x.pt": content}, {})
    assert (tmp_path / "x.pt").read_bytes() == saved_by_torch(content, tmp_path / "torch" / "x.pt")


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
    monkeypatch.setattr(pt_writer, "BLOCK_BYTES", 4096)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_together({tmp_path / "x.pt": {"a": torch.randn(300, 100)}}, {})


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
    with pytest.raises(OSError, match="ends early"):
        write_together(
            {tmp_path / "x.pt": {"a": held}}, {held.data_ptr(): lambda: file_blocks(tmp_path / "raw", 0, 400)}
        )


def test_orders_that_differ_are_refused(tmp_path):
    a, b = torch.ones(3), torch.ones(4)
    with pytest.raises(RuntimeError, match="different orders"):
        write_together({tmp_path / "x.pt": {"a": a, "b": b}, tmp_path / "y.pt": {"b": b, "a": a}}, {})


def test_casting_on_the_way(tmp_path):
    tensor = torch.randn(3, 1000)
    (tmp_path / "raw").write_bytes(bytes_of(tensor))
    place = TensorRange(tmp_path / "raw", 0, tensor.shape, tensor.dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert b"".join(bytes(block) for block in place.blocks(dtype)) == bytes(bytes_of(tensor.to(dtype)))
