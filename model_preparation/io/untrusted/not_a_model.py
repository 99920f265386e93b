"""Recognises files and folders that are not a model, such as a Git LFS pointer, an adapter or a training state.

For each of these, a message says what it is and what to do. Only names and the first bytes of files are read. This
module also finds the snapshot inside a hub's cache.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # endings of files that hold tensors

_READ_BYTES = 512
_MOST_FOLDERS = 5_000  # at most so many are searched, because a user may give /
_CHECKED = (*WEIGHTS, ".json", ".jsonl", ".model")  # only these: other files, such as texts, may begin with anything

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".7z")

_GGUF = "{} is a GGUF file, which is quantised for llama.cpp. Give the folder of the model it was made from."
_AGAIN = "Download it again: the same command continues where it stopped."
_UNFINISHED = (
    *("*.incomplete", "*.aria2", "*.part", "*.crdownload", "*.download", "*.tmp"),
    *("._____temp", ".____temp", ".*.safetensors.??????"),
)
# (patterns of file names, what a folder with such files holds, what to do). The first match counts.
_KINDS = (
    (
        ("adapter_config.json", "adapter_model.*"),
        "an adapter (LoRA or another of peft's), not a model",
        "Merge it into its model first, with peft's merge_and_unload and save_pretrained. If it was trained on a "
        "checkpoint of this program, use heal_checkpoint.py --merge_adapter.",
    ),
    (
        ("*.gguf",),
        "a GGUF file, which is quantised for llama.cpp",
        "Give the folder of the model it was made from, with config.json and model.safetensors.",
    ),
    (
        ("consolidated.*", "params.json"),
        "a model in its maker's original format",
        "Download it in Hugging Face's format, with config.json and model.safetensors, or convert it with "
        "transformers' convert_llama_weights_to_hf.py.",
    ),
    (
        ("*.onnx", "tf_model.h5", "flax_model.msgpack"),
        "weights for ONNX, TensorFlow or Flax",
        "Give a folder with config.json and model.safetensors or pytorch_model.bin.",
    ),
    (
        ("*.distcp", "global_step*", "zero_to_fp32.py"),
        "the shards of a training run (FSDP or DeepSpeed)",
        "Merge them first, with `accelerate merge-weights` or zero_to_fp32.py, and give the new folder.",
    ),
    (
        ("optimizer.*", "scheduler.pt", "trainer_state.json", "rng_state*", "resume_state.json", "checkpoint-*"),
        "states of a training run, not the model it made",
        "Give the folder that the training wrote at its end.",
    ),
    (
        ("layer_*.pt",),
        "the layers of a model, one file each",
        "Give it as --llama_layers_dir; here a whole model or checkpoint is needed.",
    ),
    (
        ("*.parquet", "*.arrow", "dataset_info*.json", "dataset_dict.json"),
        "a data set",
        "Give the folder of a model; data is given by --data, --mmlu_data or --tasks.",
    ),
)
_OF_A_MODEL = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")


def stand_in(path: Path) -> str | None:
    """What a file with the name of a model's file really is, and what to do. None if it looks right."""
    if path.suffix not in _CHECKED:
        return None
    if path.with_name(f"{path.name}.aria2").exists():
        return f"{path} is an unfinished download: {path.name}.aria2 is beside it. {_AGAIN}"
    with path.open("rb") as file:
        data = file.read(_READ_BYTES)
    text = data.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return (
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in the folder that git cloned, or "
            "download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return (
            f"{path} is a web page (HTML or XML) in place of the file: the server refused the download, or asked for a "
            "login. Log in or give a token, and download the file again."
        )
    beginning = data[:64].decode("ascii", errors="replace")
    is_text = "".join(beginning.split()).isprintable() and "\ufffd" not in beginning
    if path.suffix in WEIGHTS and len(data) >= 8 and is_text:
        return f"{path} cannot be read as tensors: it is text and begins {beginning!r}. Download the file again."
    if data.startswith(b"GGUF"):
        return _GGUF.format(path)
    if path.suffix in WEIGHTS and len(data) >= 64 and not any(data[:64]):
        return f"{path} begins with zeros, like an unfinished download or copy. Download it again."
    return None


def what_it_is(path: Path) -> str | None:
    """What a path is instead of the folder of a model or checkpoint, and what to do.

    None if the path looks like a model or checkpoint, perhaps with missing files, or if it is not recognised.
    """
    if path.is_symlink() and not path.exists():
        return _dangling(path)
    if path.is_file() and path.suffix in _ARCHIVES:
        return f"{path} is an archive. Unpack it, and give the folder that was in it."
    if path.suffix == ".gguf":
        return _GGUF.format(path)
    if not path.is_dir():
        return None
    entries = sorted(path.iterdir())
    if not entries:
        return f"{path} is an empty folder. Give the folder that the model or checkpoint is in."
    if snapshot := snapshot_in(path):
        return f"{path} is a hub's cache. Give the snapshot in it: {snapshot}"
    for entry in entries:
        reason = None
        if entry.is_file() and not entry.is_symlink():  # links are not opened: they may lead out of the folder
            reason = stand_in(entry)
        elif entry.suffix in _CHECKED and not entry.exists():
            reason = _dangling(entry)
        if reason:
            return reason
    if unfinished := next(_unfinished(path), None):
        return f"{path} holds an unfinished download ({unfinished.name}). {_AGAIN}"
    names = [entry.name for entry in entries]
    if _fitting(names, _OF_A_MODEL):
        return None
    if deeper := _deeper(path):
        return deeper
    for patterns, kind, advice in _KINDS:
        if found := _fitting(names, patterns):
            return f"{path} holds {kind} ({found}). {advice}"
    return None


def snapshot_in(folder: Path) -> Path | None:
    """The snapshot in `folder`, if that is a repository's folder in a hub's cache; otherwise None.

    It is the snapshot that refs/main names, or else `main`, `master`, or the only one.
    """
    root = folder.parent if folder.name == "snapshots" else folder
    snapshots = root / "snapshots"
    if (root / "config.json").exists() or not snapshots.is_dir():
        return None
    held = {entry.name: entry for entry in snapshots.iterdir() if entry.is_dir()}
    main = root / "refs" / "main"
    if main.is_file():
        with main.open("rb") as file:
            named = file.read(_READ_BYTES).decode(errors="replace").strip()
        if named in held:
            return held[named]
    only = next(iter(held.values())) if len(held) == 1 else None
    return held.get("main") or held.get("master") or only


def _dangling(path: Path) -> str:
    return (
        f"{path} is a link to {os.readlink(path)}, which is not there. Copy the files again with cp -rL, which copies "
        "them in place of links, or download them again."
    )


def _unfinished(folder: Path) -> Iterator[Path]:
    """Files that unfinished downloads left: in the folder, and where huggingface_hub keeps them."""
    places = [folder, *folder.glob(".cache/huggingface/download")]
    if folder.parent.name == "snapshots":
        places += folder.parent.parent.glob("blobs")
    for place in places:
        for entry in sorted(place.iterdir()):
            if _fitting([entry.name], _UNFINISHED) and (entry.is_file() or any(entry.iterdir())):
                yield entry


def _fitting(names: list[str], patterns: tuple[str, ...]) -> str | None:
    """A name that matches a pattern; earlier patterns are tried first. None if no name matches."""
    return next((name for pattern in patterns for name in names if fnmatch(name, pattern)), None)


def _deeper(path: Path) -> str | None:
    """A message that names the models and checkpoints one or two folders deeper; None if there are none."""
    for depth in ("*", "*/*"):
        first = sorted(islice(path.glob(depth), _MOST_FOLDERS))
        readable = (each for each in first if each.is_dir() and os.access(each, os.R_OK | os.X_OK))
        folders = [snapshot_in(each) or each for each in readable]
        if found := [str(each) for each in folders if _is_whole(each)]:
            more = f" (or another of {len(found)})" if len(found) > 3 else ""
            given = " or ".join(found[:3])
            return f"{path} holds no model or checkpoint itself, but its subfolders do. Give {given}{more}"
    return None


def _is_whole(folder: Path) -> bool:
    names = os.listdir(folder)
    return "checkpoint_info.json" in names or ("config.json" in names and bool(_fitting(names, _OF_A_MODEL)))
