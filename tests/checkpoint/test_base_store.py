"""BaseStore: what is shared, what is made again, several builders at once, and what `clean_checkpoints` removes."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from model_preparation.checkpoint import base_store
from model_preparation.checkpoint.base_store import STORE, BaseStore, clean_checkpoints
from model_preparation.io import linked_files
from model_preparation.io.known_digests import describe_source_file
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.safetensors_writer import Shard
from model_preparation.io.tensors.tensor_ranges import TensorRange, bytes_of

FLOAT32 = DType("float32", 4)


def make_base(folder: Path, seed: int = 0) -> list[Path]:
    """Two files that stand for a base's."""
    folder.mkdir(exist_ok=True)
    weights = torch.randn(1000, 3, generator=torch.Generator().manual_seed(seed))
    (folder / "weights").write_bytes(bytes_of(weights))
    (folder / "config.json").write_text("{}")
    return [folder / "config.json", folder / "weights"]


def shards_of(base_paths: list[Path], dtype=FLOAT32) -> list[Shard]:
    places = [TensorRange(base_paths[1], start, (500, 3), FLOAT32) for start in (0, 6000)]
    return [Shard(f"layer_{i:02d}.safetensors", {"weight": place}, dtype) for i, place in enumerate(places)]


class Checkpoints:
    """A folder in which checkpoints of one base are made."""

    def __init__(self, folder: Path, base: Path, dtype=FLOAT32):
        self.folder, self.base_paths, self.dtype = folder, make_base(base), dtype
        folder.mkdir(exist_ok=True)

    def build(self, name: str, layers=(0, 1)) -> tuple[BaseStore, dict[str, dict]]:
        store = self.store()
        target = self.folder / name
        target.mkdir()
        shards = [shards_of(self.base_paths, self.dtype)[layer] for layer in layers]
        provided = {shard.file: store.provide(shard, target / shard.file, lambda size_bytes: None) for shard in shards}
        for shard in shards:
            data = load_file(target / shard.file)["weight"]
            assert provided[shard.file][1] == {"weight": blake3(bytes_of(data)).hexdigest()}
        files = {file: described for file, (described, _) in provided.items()}
        (target / "checkpoint_info.json").write_text(json.dumps({"files": files}))
        return store, files

    def store(self) -> BaseStore:
        files = {path.name: describe_source_file(path) for path in self.base_paths}
        return BaseStore(self.folder, files, self.dtype)

    def stored(self) -> list[Path]:
        return sorted((self.folder / STORE).glob("*/*.safetensors"))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", tmp_path / "base")


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the shards that are written from here on."""
    names = []
    write = Shard.write
    monkeypatch.setattr(Shard, "write", lambda shard, *args: (names.append(shard.file), write(shard, *args))[1])
    return names


def test_the_second_checkpoint_shares_the_files_of_the_first(checkpoints, written):
    _, first = checkpoints.build("first")
    assert written == ["layer_00.safetensors", "layer_01.safetensors"]
    store, second = checkpoints.build("second")
    assert second == first
    assert len(written) == 2
    assert store.missing(shards_of(checkpoints.base_paths)) == []
    for name, described in first.items():
        data = (checkpoints.folder / "second" / name).read_bytes()
        assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    weights = load_file(checkpoints.folder / "second" / "layer_01.safetensors")["weight"]
    assert bytes(bytes_of(weights)) == checkpoints.base_paths[1].read_bytes()[6000:]


@pytest.mark.skipif(os.name != "posix", reason="hard links")
def test_hard_links_are_read_only(checkpoints, monkeypatch):
    monkeypatch.setattr(linked_files, "_reflink", lambda source, target: False)
    checkpoints.build("first")
    path = checkpoints.folder / "first" / "layer_00.safetensors"
    assert path.samefile(checkpoints.stored()[0])
    assert path.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("change", ["weights", "config", "dtype"])
def test_another_base_or_dtype_has_another_store(checkpoints, change):
    checkpoints.build("first")
    if change == "weights":
        make_base(checkpoints.base_paths[0].parent, seed=1)
    elif change == "config":
        checkpoints.base_paths[0].write_text("[]")
    else:
        checkpoints.dtype = DType("bfloat16", 2)
    shards = shards_of(checkpoints.base_paths, checkpoints.dtype)
    assert checkpoints.store().missing(shards) == shards
    checkpoints.build("second")
    assert len({path.parent for path in checkpoints.stored()}) == 2
    found = load_file(checkpoints.folder / "second" / "layer_00.safetensors")["weight"]
    data = checkpoints.base_paths[1].read_bytes()[:6000]
    assert torch.equal(found, torch.frombuffer(bytearray(data), dtype=torch.float32).view(500, 3).to(found.dtype))


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "no record", "bad record", "gone", "folder"])
def test_a_stored_shard_that_is_not_as_it_was_made_is_made_again(checkpoints, written, damage):
    _, first = checkpoints.build("first")
    path = checkpoints.stored()[0]
    record = path.with_suffix(".json")
    data = bytearray(path.read_bytes())
    if damage in ("cut", "flipped", "header"):
        data[{"cut": 0, "flipped": -5, "header": 20}[damage]] ^= 1
        path.unlink()  # the checkpoint's own file stays as it is
        path.write_bytes(data[:-1] if damage == "cut" else data)
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{}")
    else:
        path.unlink()
        if damage == "folder":
            shutil.rmtree(path.parent)
    _, second = checkpoints.build("second")
    assert second == first
    assert written[2:] == sorted(first)[: 2 if damage == "folder" else 1]
    for name, described in first.items():
        data = (checkpoints.folder / "second" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == described["sha256"]


def test_a_store_that_came_with_the_folder_is_made_anew(checkpoints, written, tmp_path):
    """A stranger may have put other weights into it, with records that fit them."""
    _, first = checkpoints.build("first")
    shutil.copytree(checkpoints.folder, tmp_path / "copy")
    checkpoints.folder = tmp_path / "copy"
    shard = checkpoints.stored()[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    record = json.loads(shard.with_suffix(".json").read_text())
    shard.with_suffix(".json").write_text(json.dumps(record | {"digest": hashlib.sha256(data).hexdigest()}))
    _, second = checkpoints.build("second")
    assert second == first
    assert len(written) == 4
    checkpoints.build("third")
    assert len(written) == 4


def test_builders_at_the_same_time_make_each_shard_once(checkpoints, written):
    barrier = threading.Barrier(4)
    failures = []

    def build(number: int) -> None:
        try:
            barrier.wait()
            checkpoints.build(f"checkpoint{number}")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(written) == ["layer_00.safetensors", "layer_01.safetensors"]
    assert not list((checkpoints.folder / STORE).rglob("*.partial-*"))


@pytest.mark.parametrize("reason", ["no links", "no locks", "not mine"])
def test_where_nothing_can_be_shared_the_files_are_written(checkpoints, monkeypatch, written, reason):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    if reason == "no links":
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(linked_files, "_reflink", lambda source, target: False)
    elif reason == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        opened = os.open
        monkeypatch.setattr(os, "open", lambda p, *args: (refuse if str(p).endswith("/lock") else opened)(p, *args))
    for name in ("first", "second"):
        _, files = checkpoints.build(name)
        for file, described in files.items():
            data = (checkpoints.folder / name / file).read_bytes()
            assert hashlib.sha256(data).hexdigest() == described["sha256"]
    assert len(written) == 4
    assert not checkpoints.stored()


def test_a_failure_leaves_no_half_file(checkpoints, monkeypatch, written):
    """Each of the two shards needs three fsyncs: shard, record and folder. Each of the six fails in turn."""
    sync = os.fsync
    for number in range(6):
        calls = []

        def fail(descriptor, calls=calls, number=number):
            calls.append(descriptor)
            if len(calls) > number:
                raise OSError(5, "Input/output error")
            sync(descriptor)

        shutil.rmtree(checkpoints.folder)
        checkpoints.folder.mkdir()
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            checkpoints.build("first")
        monkeypatch.setattr(os, "fsync", sync)
        assert not list((checkpoints.folder / STORE).rglob("*.partial-*"))
        written.clear()
        _, files = checkpoints.build("second")
        assert len(written) == (2 if number < 2 else 1 if number < 5 else 0)
        for name, described in files.items():
            data = (checkpoints.folder / "second" / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == described["sha256"]


def test_clean_removes_what_nobody_uses(checkpoints):
    checkpoints.build("both")
    checkpoints.build("one", layers=[1])
    killed = checkpoints.stored()[0].with_name("layer_09.safetensors.partial-123")
    killed.write_bytes(bytes(10))
    assert clean_checkpoints(checkpoints.folder, dry_run=True).paths == [killed]
    assert killed.exists()
    shutil.rmtree(checkpoints.folder / "both")
    unused = checkpoints.stored()[0]
    assert unused.name == "layer_00.safetensors"
    size_bytes = unused.stat().st_size
    cleaned = clean_checkpoints(checkpoints.folder)
    assert (cleaned.paths, cleaned.size_bytes) == ([killed, unused], size_bytes + 10)
    assert [path.name for path in checkpoints.stored()] == ["layer_01.safetensors"]
    assert clean_checkpoints(checkpoints.folder).paths == []
    shutil.rmtree(checkpoints.folder / "one")
    assert [path.name for path in clean_checkpoints(checkpoints.folder).paths] == ["layer_01.safetensors"]
    assert not (checkpoints.folder / STORE).exists()
    assert clean_checkpoints(checkpoints.folder).paths == []
    store, files = checkpoints.build("again")  # afterwards the store starts anew
    shutil.rmtree(checkpoints.folder / "again")
    clean_checkpoints(checkpoints.folder)
    (checkpoints.folder / "late").mkdir()  # a build that began before `clean_checkpoints` works too
    shard = shards_of(checkpoints.base_paths)[0]
    described, _ = store.provide(shard, checkpoints.folder / "late" / shard.file, lambda size_bytes: None)
    assert described == files[shard.file]
    assert len(checkpoints.stored()) == 1


def test_clean_keeps_what_a_checkpoint_has_as_a_copy(checkpoints, monkeypatch):
    """A copy is a separate file, as a reflink is. Only its SHA-256 ties it to the store."""
    monkeypatch.setattr(linked_files, "_hard_link", lambda source, target: False)
    monkeypatch.setattr(base_store, "can_share", lambda folder: True)
    checkpoints.build("first")
    assert checkpoints.stored()[0].stat().st_nlink == 1
    assert clean_checkpoints(checkpoints.folder).paths == []
    (checkpoints.folder / "first" / "checkpoint_info.json").write_text("{")
    assert len(clean_checkpoints(checkpoints.folder).paths) == 2


def test_reflinks_take_no_room_and_can_be_changed_alone(sharing_disk, tmp_path):
    checkpoints = Checkpoints(sharing_disk / "checkpoints", tmp_path / "base")
    checkpoints.build("first")
    path, stored = checkpoints.folder / "first" / "layer_00.safetensors", checkpoints.stored()[0]
    assert not path.samefile(stored)
    assert path.stat().st_nlink == 1
    assert _first_block(path) == _first_block(stored)
    before = stored.read_bytes()
    path.write_bytes(bytes(100))
    assert stored.read_bytes() == before


def _first_block(path: Path) -> str:
    """Where on the disk the file's data begin, in the words of filefrag."""
    listing = subprocess.run(["filefrag", "-s", "-v", path], check=True, capture_output=True, text=True).stdout
    return listing.splitlines()[3].split()[3]
