"""verify_checkpoint: a whole checkpoint passes, any changed byte is found, and every fault is told by its name."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from blake3 import blake3

import model_preparation
from model_preparation.checkpoint.verify import verify, verify_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import describe_file, read_digests
from model_preparation.io.self_checksum import checksum_fault, with_checksum
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import assert_refused, run_command, run_fresh_command, seeded, tiny_config
from tests.io.untrusted.test_hostile_files import SYSTEM, put_pickle

Q_PROJ = "backbone.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(checkpoint_dir, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


def write_checksum(folder: Path, **changes) -> None:
    """Change fields of checkpoint_info.json, and record every file as it is now."""
    info = json.loads((folder / "checkpoint_info.json").read_text())
    info["files"] = {name: describe_file(folder / name) for name in info["files"]}
    (folder / "checkpoint_info.json").write_bytes(with_checksum(info | changes))


def describe_anew(folder: Path) -> None:
    """Write the tensors' digests and the checksum anew, so that they fit what is in the folder now."""
    info = json.loads((folder / "checkpoint_info.json").read_text())
    state_dict = torch.load(folder / "model_state_dict.pt", weights_only=True)
    donors = tuple(f"backbone.layers.{index}." for index in info["replaced_layers"])
    tensors = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "blake3": blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
            "from": "donor" if name.startswith(donors) else "base",
            "source_name": name,
        }
        for name, tensor in state_dict.items()
    }
    digests = folder / "tensor_digests.json"
    digests.write_text(json.dumps({"format_version": 1, "algorithm": "blake3", "tensors": tensors}, indent=2))
    info["files"][digests.name] = describe_file(digests)
    (folder / "checkpoint_info.json").write_bytes(with_checksum(info))


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        file.seek(position)
        file.write(bytes([old ^ 1 << bit]))


def told(found) -> str:
    return "\n".join(map(str, found))


def test_a_whole_checkpoint_passes_with_base_and_donor(checkpoint, base_dir, layers_dir):
    result = run_command("verify_checkpoint", checkpoint, "--base", base_dir, "--llama_layers_dir", layers_dir)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == f"Checkpoint {checkpoint} is as it was built."
    checks = {line.split()[0]: line for line in lines if line}
    assert "6 of 6 against their SHA-256" in checks["Files"]
    assert "86 against their BLAKE3" in checks["Tensors"]  # 43 in each of the two files
    assert "25 tensors" in checks["Base"]
    assert "18 tensors" in checks["Donor"]
    assert "globals of model.pt" in checks["Pickle"]
    assert "FAULT" not in result.stdout


def test_what_was_not_compared_is_said_with_the_flag_that_does_it(checkpoint):
    checks = "\n".join(verify(checkpoint).checks)
    assert "--base NAME|PATH compares them" in checks
    assert "--llama_layers_dir DIR compares them" in checks


def test_each_of_many_flipped_bytes_is_found(checkpoint):
    """Flips bits in each file at least 20 times, and more often in large files."""
    rng = random.Random(0)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    chosen = [path for path in paths for _ in range(20)]
    chosen += rng.choices(paths, sizes, k=350 - len(chosen))
    for path in chosen:
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        found = verify_checkpoint(checkpoint, files_only=True)
        assert path.relative_to(checkpoint).as_posix() in {fault.where for fault in found}, (path, position, bit)
        flip(path, position, bit)
    assert not verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model.pt", "model_state_dict.pt"])
def test_a_flipped_byte_is_told_by_the_tensor_it_is_in(checkpoint, name):
    weights = torch.load(checkpoint / "model_state_dict.pt", weights_only=True)[Q_PROJ].numpy().tobytes()
    flip(checkpoint / name, (checkpoint / name).read_bytes().index(weights) + 7, 3)
    result = run_command("verify_checkpoint", "--checkpoint", checkpoint)
    assert_refused(result, "2 faults in", str(checkpoint))
    faults = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if line.startswith("FAULT")]
    assert [fault.split()[0] for fault in faults] == [name, Q_PROJ]
    assert f"in {name} is changed" in faults[1]


def test_flipped_bytes_anywhere_with_all_checks(checkpoint, base_dir):
    """What is changed may be what the checks themselves read: no traceback, and a fault each time."""
    rng = random.Random(1)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for _ in range(15):
        path = rng.choice(paths)
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        assert verify_checkpoint(checkpoint, str(base_dir)), (path, position, bit)
        flip(path, position, bit)


def test_every_byte_of_the_checksum_counts():
    data = with_checksum({"description": '"info_sha256": "0', "é": [1], "info_sha256": "old"})
    assert checksum_fault(data) is None
    for position in range(len(data)):
        for change in (0x01, 0x20, 0x80):  # 0x20: upper case
            changed = bytearray(data)
            changed[position] ^= change
            assert checksum_fault(bytes(changed)), position
    for changed in (data[:-1], data + b"\n", data.replace(b"\n", b"\r\n"), b"", data[:1] + b" " + data[1:]):
        assert checksum_fault(changed)


def test_missing_cut_and_added_files(checkpoint, tmp_path):
    (checkpoint / "README.txt").unlink()
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / "evaluations").mkdir()
    (checkpoint / "evaluations" / "mmlu.json").write_text("{}")
    (checkpoint / "tokenizer" / "added_tokens.json").write_text("{}")
    with (checkpoint / "model_state_dict.pt").open("r+b") as file:
        file.truncate(100_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    (checkpoint / "tokenizer" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    found = verify(checkpoint)
    text = told(found.faults)
    assert "README.txt is missing" in text
    assert "model_state_dict.pt has 100000 bytes instead of" in text
    assert "tokenizer/added_tokens.json is not listed" in text
    assert "'tokenizer/tokenizer.json' is not a valid path in checkpoint_info.json" in text
    assert {note.split()[0] for note in found.notes} == {"notes.txt", "evaluations/"}
    assert "notes.txt" not in text


def test_in_the_hf_format_every_file_that_is_not_listed_is_a_fault(checkpoint):
    """Except files of hubs, git or a killed run. In the pt format, each unlisted file here is a note."""
    unasked = {"modeling_llamba.py", "extra.safetensors", "adapter_config.json", "notes.txt", "lib/x.so", "evaluations"}
    unasked |= {"additional_chat_templates/default.jinja", "processor_config.json", "x/.git/config", "x/README.md"}
    harmless = {"configuration.json", "README.md", ".gitattributes", ".msc"}
    killed = "checkpoint_info.json.partial-123"
    unasked |= {f"{killed}.json", f"x/{killed}"}
    below = {".git/config", ".git/hooks/x", ".cache/huggingface/x"}
    for name in unasked | harmless | below | {killed}:
        (checkpoint / name).parent.mkdir(exist_ok=True, parents=True)
        (checkpoint / name).write_text("{}")
    found = verify(checkpoint, files_only=True)
    assert {note.split()[0] for note in found.notes} == unasked | harmless | {".git/", ".cache/", killed}
    assert f"{killed} was left by a killed run, and nothing reads it. Remove it." in found.notes
    assert ".git/ holds 2 files of git, not listed in checkpoint_info.json." in found.notes
    assert not found.faults
    write_checksum(checkpoint, format="both")
    found = verify(checkpoint, files_only=True)
    assert {note.split()[0] for note in found.notes} == harmless | {".git/", ".cache/", killed}
    # config.json is missing, and the hf format needs it.
    assert {fault.where for fault in found.faults} == unasked | {"config.json"}


def test_fifos_are_faults_and_not_waited_for(checkpoint):
    for name in ("model.pt", "README.txt"):
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
    assert {fault.where for fault in verify_checkpoint(checkpoint)} >= {"model.pt", "README.txt"}


def test_globals_that_are_not_allowed_are_named(checkpoint):
    put_pickle(checkpoint / "model.pt", SYSTEM)
    write_checksum(checkpoint)
    text = told(verify_checkpoint(checkpoint))
    assert "model.pt" in text
    assert "posix.system" in text


def test_a_checksum_written_anew_after_a_change_the_tensors_tell(checkpoint, base_dir, layers_dir, tmp_path):
    """Whoever records every digest anew fools this folder's checks, but not the base and the donor."""
    state_dict = torch.load(checkpoint / "model_state_dict.pt", weights_only=True)
    kept = "backbone.layers.0.mixer.D"
    state_dict[kept] += 1
    state_dict[Q_PROJ][0, 0] += 1
    torch.save(state_dict, checkpoint / "model_state_dict.pt")
    write_checksum(checkpoint)
    faults = [fault.where for fault in verify_checkpoint(checkpoint)]
    assert faults == [kept, Q_PROJ]  # against tensor_digests.json
    describe_anew(checkpoint)
    write_checksum(checkpoint)
    text = told(verify_checkpoint(checkpoint, str(base_dir), layers_dir))
    assert f"{kept} differs from the base's" in text
    assert f"{Q_PROJ} differs from the donor's" in text


def test_another_base_or_donor_is_told_in_one_line(checkpoint, base_dir, donor_dir, tmp_path):
    """The checkpoint is not to blame, and a fault for each of its tensors would say that it is."""
    other = seeded(LlambaForCausalLM(tiny_config()), seed=77)
    shutil.copytree(base_dir, tmp_path / "base")
    torch.save(other.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    result = run_command("verify_checkpoint", checkpoint, "--base", tmp_path / "base")
    assert_refused(result, f"{checkpoint} has not changed", "built from another base or other layers")
    faults = [line for line in result.stdout.splitlines() if line.startswith("FAULT")]
    assert len(faults) == 1
    assert f"{tmp_path / 'base'} is not the base" in faults[0]
    assert str(base_dir) in faults[0]  # the right base
    assert_refused(run_command("verify_checkpoint", checkpoint, "--base", donor_dir), "is a llama model")
    run_command("extract_layers", "--model_name", base_dir, "--output_dir", tmp_path / "mixers")
    result = run_command("verify_checkpoint", checkpoint, "--llama_layers_dir", tmp_path / "mixers")
    assert_refused(result, "holds layers of a llamba model")


def test_shapes_names_and_origins_against_the_config(checkpoint):
    digests = json.loads((checkpoint / "tensor_digests.json").read_text())
    tensors = digests["tensors"]
    tensors[Q_PROJ]["shape"] = [*tensors[Q_PROJ]["shape"], 1]
    tensors["lm_head.weight"]["from"] = "donor"
    tensors["backbone.final_layernorm.weight"]["dtype"] = "bfloat16"
    tensors["made.up"] = tensors.pop("backbone.embedding.weight")
    (checkpoint / "tensor_digests.json").write_text(json.dumps(digests))
    write_checksum(checkpoint)
    text = told(verify_checkpoint(checkpoint))
    assert f"{Q_PROJ} has shape [32, 32, 1], but the config needs [32, 32]" in text
    assert "lm_head.weight has the origin donor, but the config needs base" in text
    assert "backbone.final_layernorm.weight is bfloat16, but checkpoint_info.json says float32" in text
    assert "made.up has shape" in text
    assert "backbone.embedding.weight is not listed in tensor_digests.json" in text


@pytest.mark.parametrize(
    "entry",
    [
        *({"source_name": ["x"]}, {"dtype": "save"}, {"blake3": None}, {"from": 1}),
        *({"shape": [-1]}, {"shape": [1.5]}, {"shape": [2**62, 8]}, {"shape": [10**30]}),
    ],
)
def test_tensor_digests_that_are_none(checkpoint, base_dir, entry):
    digests = json.loads((checkpoint / "tensor_digests.json").read_text())
    digests["tensors"]["lm_head.weight"] |= entry
    digests["tensors"][f"backbone.layers.{'9' * 5000}.x"] = digests["tensors"][Q_PROJ]
    (checkpoint / "tensor_digests.json").write_text(json.dumps(digests))
    write_checksum(checkpoint)
    found = verify_checkpoint(checkpoint, str(base_dir))
    assert "tensor_digests.json" in {fault.where for fault in found}


def test_a_donor_whose_files_are_not_those_of_its_metadata(checkpoint, layers_dir, tmp_path):
    shutil.copytree(layers_dir, tmp_path / "layers")
    path = tmp_path / "layers" / "layer_01.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    faults = verify_checkpoint(checkpoint, None, tmp_path / "layers")
    assert [fault.where for fault in faults] == ["layer 1 of the donor"]
    assert "layer_01.pt is changed" in faults[0].what


def test_digests_of_layers_that_cannot_be(checkpoint, layers_dir):
    digests = json.loads((checkpoint / "tensor_digests.json").read_text())
    names = [f"backbone.layers.{number}.x" for number in ("9" * 5000, "٣", "-1", "")]
    digests["tensors"] |= dict.fromkeys(names, digests["tensors"][Q_PROJ])
    (checkpoint / "tensor_digests.json").write_text(json.dumps(digests))
    write_checksum(checkpoint)
    assert {fault.where for fault in verify_checkpoint(checkpoint, None, layers_dir)} == set(names)


def test_a_checkpoint_in_another_dtype_is_compared_with_its_base_cast(base_dir, layers_dir, tmp_path):
    folder = tmp_path / "half"
    model_preparation.build_checkpoint(str(base_dir), [2], layers_dir, folder, dtype=torch.bfloat16)
    assert not verify_checkpoint(folder, str(base_dir), layers_dir)


def test_folders_that_are_no_checkpoints(tmp_path, checkpoint, base_dir):
    assert_refused(run_command("verify_checkpoint", tmp_path / "none"), "is not there")
    assert_refused(run_command("verify_checkpoint", base_dir), "no checkpoint_info.json")
    assert_refused(run_command("verify_checkpoint", checkpoint, "--base", tmp_path / "none"), "is not there")
    for flags, words in (
        (("--files_only", "--base", base_dir), "--base compares tensors"),
        (("--source", f"llama={base_dir}"), "--source belongs to --base"),
    ):
        assert_refused(run_command("verify_checkpoint", checkpoint, *flags), words, code=2)
    (checkpoint / "checkpoint_info.json").write_text("{}")
    assert [fault.where for fault in verify_checkpoint(checkpoint)] == ["checkpoint_info.json"] * 2


def test_large_files_are_read_block_by_block(tmp_path):
    """Tensors across the blocks' edges, beside each other, over each other, and empty."""
    data = random.Random(0).randbytes(11_000_003)
    path = tmp_path / "large"
    path.write_bytes(data)
    ranges = [(0, 10), (10, 10), (5, 9_000_000), (4 << 20, 8 << 20), (9_000_000, len(data)), (len(data), len(data))]
    seen = []
    found = read_digests(path, ranges, seen.append)
    assert (found.size_bytes, sum(seen)) == (len(data), len(data))
    assert found.sha256 == describe_file(path)["sha256"]
    assert found.blake3 == {(start, end): blake3(data[start:end]).hexdigest() for start, end in ranges}
    with pytest.raises(FileNotFoundError):
        read_digests(tmp_path / "none")


def test_help_comes_before_torch():
    result = run_fresh_command("verify_checkpoint", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "--llama_layers_dir" in result.stdout
    assert "examples:" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "blake3"}


def test_it_is_exported():
    assert model_preparation.verify_checkpoint is verify_checkpoint
    with pytest.raises(SurgeryError):
        model_preparation.verify_checkpoint("/no/such/folder")
