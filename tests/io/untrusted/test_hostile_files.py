"""Files made to do harm. Each is refused with one clear sentence, and none makes us run its code, hang,
allocate too much memory or read another file.
"""

import builtins
import codecs
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Watch
from benchmarks.mutations import mutate, unzip, zip_of
from model_preparation import load_checkpoint
from model_preparation.checkpoint.graft_plan import plan
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve
from model_preparation.io.tensors.sharded_weights import TensorFiles, load_tensors
from model_preparation.io.tensors.tensor_ranges import safetensors_ranges
from model_preparation.io.untrusted import pickle_check
from model_preparation.io.untrusted.pt_check import check_pt, pt_records
from model_preparation.io.untrusted.untrusted_files import parse_json
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from tests.conftest import assert_refused, run_command

SYSTEM = b"cposix\nsystem\nX\x04\0\0\0true\x85R."


class Runs:
    """An object whose pickle calls `function` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def layers(layers_dir, tmp_path) -> Path:
    return Path(shutil.copytree(layers_dir, tmp_path / "layers"))


@pytest.fixture
def checkpoint(checkpoint_dir, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


@pytest.fixture
def base(base_dir, tmp_path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


@pytest.fixture
def donor(donor_dir, tmp_path) -> Path:
    return Path(shutil.copytree(donor_dir, tmp_path / "donor"))


def refused(path: Path, *words: str) -> None:
    """`load_tensors` refuses the file, names it, and says why."""
    with pytest.raises(SurgeryError) as caught:
        load_tensors(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def put_pickle(path: Path, content: bytes) -> None:
    """Exchange the file's data.pkl, all else being right."""
    entries = [(name, content if name.endswith("/data.pkl") else old) for name, old in unzip(path.read_bytes())]
    path.write_bytes(zip_of(entries))


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [(os.system, ("true",), "posix.system"), (builtins.eval, ("1",), "builtins.eval")],
)
def test_code_is_refused_by_the_name_of_its_global(protocol, function, arguments, name):
    code = pickle.dumps({"w": Runs(function, *arguments)}, protocol=protocol)
    for allowed in (pickle_check.TENSORS, pickle_check.allowed_in_module()):
        with pytest.raises(ValueError, match=name):
            pickle_check.scan(code, allowed)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"(X\x04\0\0\0trueiposix\nsystem\n.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93.", "posix.system"),  # out of the memo
        # Two globals with garbage between: both are named.
        (b"\x80\x02}NNcos\nsystem\n0l0cbuiltins\nexec\n.", "os.system, builtins.exec"),
        (b"\x80\x02cposix\nsystem\x1b[2J\n.", r"posix.system\x1b[2J"),  # the escape sequence is spelled out
        (b"\x80\x04N\x8c\x06system\x93.", "unknown.name"),
    ],
)
def test_no_disguise_hides_a_global(code, name):
    with pytest.raises(ValueError, match=re.escape(f"names {name}")):
        pickle_check.scan(code, pickle_check.TENSORS)


def test_commands_name_the_global(layers, base_dir, base, checkpoint, tmp_path):
    out = tmp_path / "out"
    torch.save({"w": Runs(os.system, f"touch {tmp_path}/ran")}, layers / "layer_01.pt")
    entry = json.loads((layers / "metadata.json").read_text())
    from model_preparation.io.digests import describe_file

    entry["layers"]["1"] |= describe_file(layers / "layer_01.pt")
    (layers / "metadata.json").write_text(json.dumps(entry))
    build = ("create_replaced_model_checkpoint", "--output_dir", out, "--layers", 1)
    assert_refused(run_command(*build, "--base", base_dir, "--llama_layers_dir", layers), "layer_01.pt", "posix.system")
    put_pickle(base / "pytorch_model.bin", SYSTEM)
    assert_refused(
        run_command(*build, "--base", base, "--llama_layers_dir", layers), "pytorch_model.bin", "posix.system"
    )
    put_pickle(checkpoint / "model_state_dict.pt", SYSTEM)
    assert_refused(run_command("test_checkpoint", "--checkpoint", checkpoint), "model_state_dict.pt", "posix.system")
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


@pytest.mark.parametrize(
    "call",
    [
        Runs(bytearray, 10**13),
        Runs(torch.nn.Embedding, 10**6, 10**6),
        Runs(torch._tensor._rebuild_from_type_v2, torch.nn.Embedding, torch.Tensor, (10**6, 10**6), {}),
        Runs(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1,), (1,), False),
    ],
)
def test_calls_that_torch_would_run_are_refused_before(call):
    for allowed in (pickle_check.TENSORS, pickle_check.allowed_in_module()):
        with pytest.raises(ValueError, match=r"names|calls"):
            pickle_check.scan(pickle.dumps(call, protocol=2), allowed)


def test_nested_tuples_cannot_overflow_the_stack(layers):
    """A dict key of a million nested tuples would crash the interpreter when the key is hashed."""
    put_pickle(layers / "layer_00.pt", b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.")
    refused(layers / "layer_00.pt", "nests tuples")
    doubled = b"\x80\x02}N" + b"".join(b"q\x00h\x00\x86" for _ in range(40)) + b"Ns."  # 2**40 items to be hashed
    with pytest.raises(ValueError, match="nests tuples"):
        pickle_check.scan(doubled, pickle_check.TENSORS)


# --- zip --------------------------------------------------------------------------------------------------------------


def archive(path: Path) -> tuple[bytearray, dict[str, tuple[int, int]]]:
    """The file's bytes, and the starts of each record's directory entry and local header."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as opened:
        entry = opened.start_dir
        places = {}
        for info in opened.infolist():
            places[info.filename.partition("/")[2]] = (entry, info.header_offset)
            entry += 46 + len(info.filename) + len(info.extra) + len(info.comment)
    return data, places


def test_compressed_entries_are_refused(layers):
    path = layers / "layer_00.pt"
    entries = unzip(path.read_bytes())
    path.write_bytes(zip_of(entries))
    assert load_tensors(path)
    path.write_bytes(zip_of([(name, bytes(10**8) if name.endswith("/data/0") else old) for name, old in entries], True))
    assert path.stat().st_size < 10**6
    refused(path, "compressed")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (24, 10**9, "compressed or encrypted"),  # only the uncompressed size is changed
        (8, 1, "compressed or encrypted"),  # encrypted
        (42, 10**6, "directory"),  # its local header is beyond the file
        (42, 0, "does not start where"),  # its local header is another's
    ],
)
def test_numbers_in_the_directory_that_cannot_be(layers, field, value, words):
    path = layers / "layer_00.pt"
    data, places = archive(path)
    struct.pack_into("<I" if field != 8 else "<H", data, places["data/3"][0] + field, value)
    path.write_bytes(data)
    refused(path) if words == "directory" else refused(path, words)


def test_the_last_entry_of_the_directory_ends_where_that_does(layers):
    path = layers / "layer_00.pt"
    data, places = archive(path)
    struct.pack_into("<H", data, max(entry for entry, _ in places.values()) + 32, 200)  # the length of its comment
    path.write_bytes(data)
    refused(path, "damaged")


def test_overlapping_records_are_refused(layers):
    path = layers / "layer_00.pt"
    data, places = archive(path)
    for size in (20, 24):  # packed and not
        struct.pack_into("<I", data, places["data/2"][0] + size, 10_000)
    path.write_bytes(data)
    refused(path, "does not start where the entry before it ends")


@pytest.mark.parametrize(
    "name", ["../data.pkl", "layer_00/code/x.py", "layer_00/constants.pkl", "other/data/0", "layer_00/data/00000000000"]
)
def test_entries_torch_never_writes_are_refused(layers, name):
    path = layers / "layer_00.pt"
    path.write_bytes(zip_of([*unzip(path.read_bytes()), (name, b"x")]))
    refused(path)


def test_the_same_entry_twice_is_refused(layers):
    path = layers / "layer_00.pt"
    entries = unzip(path.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(zip_of([*entries, entries[4]]))
    refused(path, "twice")


def test_bytes_before_between_and_behind_are_refused(layers):
    path = layers / "layer_00.pt"
    data = path.read_bytes()
    for changed in (b"#!/bin/sh\n" + data, data + b"x", data[:-1], data[: len(data) // 2], b"", b"PK\x03\x04"):
        path.write_bytes(changed)
        refused(path)


def test_storages_are_exactly_their_records(layers):
    path = layers / "layer_00.pt"
    entries = unzip(path.read_bytes())
    index = next(i for i, (name, _) in enumerate(entries) if name.endswith("/data/1"))
    for content in (entries[index][1][:-4], entries[index][1] + bytes(4)):
        path.write_bytes(zip_of([*entries[:index], (entries[index][0], content), *entries[index + 1 :]]))
        refused(path, "its storage '1'")
    path.write_bytes(zip_of([*entries, (entries[index][0][:-1] + "99", b"hidden")]))
    refused(path, "its storage '99'")


@pytest.mark.parametrize("view", ["stretched", "beyond"])
def test_tensors_lie_in_their_storages(tmp_path, view):
    path = tmp_path / "tensors.pt"
    tensor = torch.arange(8.0)
    torch.save({"w": tensor.expand(10**6, 8) if view == "stretched" else tensor}, path)
    if view == "beyond":
        name, content = next(entry for entry in unzip(path.read_bytes()) if entry[0].endswith("data.pkl"))
        assert content.count(b"K\x08\x85") == 1  # the shape (8,)
        put_pickle(path, content.replace(b"K\x08\x85", b"J\x00\x00\x00\x40\x85"))
        assert name == "tensors/data.pkl"
    refused(path)


def test_files_larger_than_4_gib_are_read(tmp_path):
    """Their directory has 64-bit fields. The file is sparse."""
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        tensors = {"a": torch.empty(2_300_000_000, dtype=torch.bfloat16), "e": torch.empty(0), "b": torch.empty(100)}
        torch.save(tensors, path)
    found = check_pt(path, pickle_check.TENSORS)
    assert found.storages == {"0": 4_600_000_000, "1": 0, "2": 400}
    assert pt_records(path)["data/2"].start > 4_600_000_000


# --- safetensors and JSON ---------------------------------------------------------------------------------------------


def safetensors_file(path: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-4]},
        {"shape": [4.0]},
        {"shape": [True, 4]},
        {"shape": ["4"]},
        {"shape": 4},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [1 << 63]},
        {"shape": [0] * 100_000},
        {"data_offsets": [0, 16, 32]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": [0, None]},
        {"data_offsets": "016"},
        {"data_offsets": [0, 1 << 64]},
        {"dtype": 4},
        {"dtype": "I8"},
    ],
)
def test_headers_with_numbers_that_cannot_be(tmp_path, entry):
    path = safetensors_file(tmp_path / "model.safetensors", json.dumps({"w": ENTRY | entry}).encode())
    with pytest.raises(SurgeryError, match=r"model\.safetensors"):
        safetensors_ranges(path)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\xff"}',
        b"[1]",
        b"1",
        b"",
        b"{",
        b'{"a": "' + b"x" * 16_000_000 + b'"}',
    ],
)
def test_json_that_is_refused_everywhere(tmp_path, layers, base, checkpoint, text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    with pytest.raises(SurgeryError, match=r"model\.safetensors"):
        safetensors_ranges(safetensors_file(tmp_path / "model.safetensors", text))
    readers = {
        layers / "metadata.json": lambda: LayerStore(layers),
        checkpoint / "checkpoint_info.json": lambda: load_checkpoint(checkpoint),
        base / "config.json": lambda: read_config(base),
        base / "pytorch_model.bin.index.json": lambda: TensorFiles(base),
    }
    (base / "pytorch_model.bin").unlink()
    for path, read in readers.items():
        path.write_bytes(text)
        with pytest.raises(SurgeryError, match=path.name.replace(".", r"\.")):
            read()


def test_configs_of_sizes_no_model_has(base, layers):
    config = json.loads((base / "config.json").read_text())
    for name, value in {"n_layer": 10**9, "d_model": 10**12, "vocab_size": -(10**12)}.items():
        (base / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(SurgeryError, match=name):
            plan(str(base), [1], layers)
    metadata = json.loads((layers / "metadata.json").read_text())
    metadata["config"]["num_hidden_layers"] = 10**9
    (layers / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(SurgeryError, match="num_hidden_layers"):
        _ = LayerStore(layers).config


def test_configs_fetch_no_code_and_replace_no_methods(base):
    config = json.loads((base / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "x.X"}, "_attn_implementation": "org/kernel", "to_dict": "x"}
    (base / "config.json").write_text(json.dumps(config | code))
    found = read_config(base)
    assert not hasattr(found, "auto_map")
    assert found._attn_implementation is None
    assert found.to_dict()["d_model"] == 32


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.bin", "/etc/hostname", "a/../../x.bin", "..\\x.bin", "C:x", "x\0", "", ".", "y" * 300]
)
def test_an_index_names_files_of_its_folder_only(base, tmp_path, name):
    shutil.copy(base / "pytorch_model.bin", tmp_path / "x.bin")
    (base / "pytorch_model.bin").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (lambda: TensorFiles(base), lambda: resolve(str(base))):
        with pytest.raises(SurgeryError, match="outside its folder"):
            read()


def test_metadata_names_files_of_its_folder_only(layers, tmp_path):
    (tmp_path / "secret").write_text("secret")
    metadata = json.loads((layers / "metadata.json").read_text())
    metadata["files"]["../secret"] = {"bytes": 6, "sha256": "0" * 64}
    (layers / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(SurgeryError, match="outside its folder"):
        LayerStore(layers).faults()


def files_read(layers: Path, checkpoint: Path, donor: Path) -> dict[Path, object]:
    return {
        layers / "metadata.json": lambda: LayerStore(layers),
        layers / "layer_01.pt": lambda: LayerStore(layers).check([1]),
        layers / "layer_02.pt": lambda: LayerStore(layers).ranges(2),
        layers / "tokenizer" / "tokenizer.json": lambda: load_tokenizer(layers / "tokenizer"),
        checkpoint / "checkpoint_info.json": lambda: load_checkpoint(checkpoint),
        checkpoint / "model_state_dict.pt": lambda: load_checkpoint(checkpoint),
        donor / "config.json": lambda: read_config(donor),
        donor / "model.safetensors": lambda: TensorFiles(donor),
    }


def test_links_out_of_the_folder_are_refused(layers, checkpoint, donor, tmp_path):
    for path, read in files_read(layers, checkpoint, donor).items():
        elsewhere = tmp_path / path.name
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(SurgeryError, match=r"is a link to .* outside its folder"):
            read()
        path.unlink()
        elsewhere.rename(path)


def test_fifos_devices_folders_and_loops_are_refused_and_never_waited_for(layers, checkpoint, donor):
    for path, read in files_read(layers, checkpoint, donor).items():
        path.unlink()
        for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p.name, p)):
            make(path)
            with pytest.raises(SurgeryError):
                read()
            path.rmdir() if path.is_dir() else path.unlink()


def test_links_of_the_hugging_face_cache_are_followed_into_its_blobs_only(donor, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in donor.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert TensorFiles(snapshot).ranges
    assert read_config(snapshot).model_type == "llama"
    (blobs / "config.json").rename(tmp_path / "config.json")
    (blobs / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(SurgeryError, match="outside its folder"):
        read_config(snapshot)


def test_a_tokenizer_leads_to_no_file_outside(layers, tmp_path):
    folder = layers / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"vocab_file": str(tmp_path / "secret.txt")}))
    with pytest.raises(SurgeryError, match="outside its folder"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"vocab_file": "/of/its/author/vocab.txt"}))
    assert load_tokenizer(folder)("a").input_ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_byte_order_mark_that_transformers_cannot_read_is_named(name, donor):
    (donor / name).write_bytes(codecs.BOM_UTF8 + (donor / name).read_bytes())
    assert read_config(donor).model_type == "llama"  # our own reader skips the mark
    with pytest.raises(SurgeryError, match=rf"{donor / name} begins with a byte-order mark, .* without the mark"):
        load_tokenizer(donor)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "pair": [],
                "special_tokens": {},
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
            },
        ),
    ],
)
def test_a_tokenizer_that_makes_its_library_panic_is_named(part, value, layers):
    path = layers / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(SurgeryError, match=rf"{path.parent} \(tokenizer.json is damaged: .*--tokenizer"):
        load_tokenizer(path.parent)


# --- at random --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readers(layers_dir, base_dir, donor_dir, checkpoint_dir, tmp_path_factory):
    """For each file that can be damaged, the function that reads it. The folders are this module's own."""
    work = tmp_path_factory.mktemp("random")
    layers, base, donor, checkpoint = (
        Path(shutil.copytree(folder, work / name))
        for name, folder in zip("lbdc", (layers_dir, base_dir, donor_dir, checkpoint_dir), strict=True)
    )
    return {
        layers / "layer_01.pt": lambda: LayerStore(layers).ranges(1),
        layers / "metadata.json": lambda: LayerStore(layers).check([0]),
        base / "pytorch_model.bin": lambda: TensorFiles(base),
        base / "config.json": lambda: plan(str(base), [1], layers),
        donor / "model.safetensors": lambda: TensorFiles(donor),
        checkpoint / "checkpoint_info.json": lambda: load_checkpoint(checkpoint),
        checkpoint / "model_state_dict.pt": lambda: load_checkpoint(checkpoint),
    }


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 6))
@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_read_or_refused(readers, seed, which):
    """A sample of what benchmarks/fuzz.py does for hours."""
    path, read = list(readers.items())[which]
    whole = path.read_bytes()
    watch = Watch(path.parents[1], "lbdc")
    try:
        path.write_bytes(mutate(path.name, whole, random.Random(seed)))
        with watch:
            read()
    except SurgeryError:
        pass
    finally:
        path.write_bytes(whole)
    assert not watch.seen


def test_the_watch_sees_what_is_opened_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    watch = Watch(tmp_path, "b")
    with watch:
        (tmp_path / "secret").read_text()
    assert watch.seen == [f"open {os.path.realpath(tmp_path / 'secret')}"]
