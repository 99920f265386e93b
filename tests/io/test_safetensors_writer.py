"""`Shard` writes the same bytes every time, and computes digests meanwhile. The safetensors library reads its files."""

import hashlib

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from model_preparation.io.tensors.dtypes import dtype_of
from model_preparation.io.tensors.safetensors_writer import Shard
from model_preparation.io.tensors.tensor_ranges import TensorRange, bytes_of, safetensors_ranges

SHAPES = {"b.weight": (30, 700), "a": (1,), "c.ü": (3, 1, 5), "scalar": (), "empty": (0, 4)}


def ranges_of(tensors, raw) -> dict[str, TensorRange]:
    places = {}
    with raw.open("wb") as file:
        for name, tensor in tensors.items():
            places[name] = TensorRange(raw, file.tell(), tensor.shape, dtype_of(tensor.dtype))
            file.write(bytes_of(tensor))
    return places


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_it_cast_or_not(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    shard = Shard("x.safetensors", ranges_of(tensors, tmp_path / "raw"), dtype_of(dtype))
    pieces = []
    described, digests = shard.write(tmp_path / "x.safetensors", pieces.append)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert len(data) == shard.size_bytes == sum(pieces)
    wanted = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted[name])
        assert digests[name] == blake3(bytes_of(wanted[name])).hexdigest()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("b.weight")[3:5, 100:], wanted["b.weight"][3:5, 100:])
    # `safetensors_ranges` reads these files too. The first tensor starts at a block of the file system.
    places = safetensors_ranges(tmp_path / "x.safetensors")
    assert {name: place.shape for name, place in places.items()} == {name: t.shape for name, t in tensors.items()}
    assert min(place.start for place in places.values()) % 4096 == 0


def test_the_order_of_the_tensors_given_does_not_matter(tmp_path):
    places = ranges_of({name: torch.ones(shape) for name, shape in SHAPES.items()}, tmp_path / "raw")
    for name, given in (("x", places), ("y", dict(reversed(places.items())))):
        Shard(name, given, dtype_of(torch.float32)).write(tmp_path / name)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_header_longer_than_a_block(tmp_path):
    tensors = {f"layer.{index}.weight": torch.full((3,), float(index)) for index in range(100)}
    Shard("x", ranges_of(tensors, tmp_path / "raw"), dtype_of(torch.float32)).write(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_source_that_ends_early_is_an_error(tmp_path):
    places = ranges_of({"a": torch.ones(100)}, tmp_path / "raw")
    (tmp_path / "raw").write_bytes(bytes(399))
    with pytest.raises(OSError, match="ends early"):
        Shard("x", places, dtype_of(torch.float32)).write(tmp_path / "x")
