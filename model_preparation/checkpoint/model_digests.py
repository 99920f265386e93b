"""What a model consists of, by digests of contents: its tensors, its config, its tokenizer.

In: where its tensors lie, or its folder. Out: digests that are the same wherever the same model lies, under whatever
name, in however many files. Large files that have not changed are not read again (io/known_digests.py).
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, TENSOR_DIGESTS, read_info
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.tensor_digests import read_tensor_digests, state_dict_ranges
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import sha256_of
from model_preparation.io.identity import digest_of, digests_of_files
from model_preparation.io.known_digests import remembered
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange, range_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_BYTES = 1 << 20


def weights_digest(tensors: Mapping[str, tuple[Any, Any, str]]) -> str:
    """BLAKE3 over names, dtypes, shapes and the BLAKE3 of tensors; tensor_digests.json says the same of a checkpoint.

    Args:
        tensors: (dtype, shape, BLAKE3 in hex) by name.
    """
    described = {
        name: [str(dtype).removeprefix("torch."), list(shape), digest]
        for name, (dtype, shape, digest) in tensors.items()
    }
    return digest_of(described)


def digest_of_ranges(ranges: Mapping[str, TensorRange]) -> str:
    """`weights_digest` of tensors that lie in files.

    Raises:
        OSError: if a file cannot be read.
    """
    digests = blake3_of_tensors(ranges)
    return weights_digest({name: (place.dtype, place.shape, digests[name]) for name, place in ranges.items()})


def blake3_of_tensors(ranges: Mapping[str, TensorRange]) -> dict[str, str]:
    """BLAKE3 of each tensor's bytes."""
    files: dict[Path, dict[str, tuple[int, int]]] = {}
    for place in ranges.values():
        start, end = range_of(place)
        files.setdefault(place.path, {})[f"{start}-{end}"] = (start, end)
    found = {}
    for path, wanted in files.items():
        kind = digest_of({"tensors": sorted(wanted)})
        found[path] = remembered(path, kind, partial(_read, wanted=wanted))
    return {name: found[place.path]["{}-{}".format(*range_of(place))] for name, place in ranges.items()}


def _read(path: Path, wanted: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    found = {}
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        for name, (start, end) in sorted(wanted.items(), key=lambda item: item[1]):
            digest = blake3()
            file.seek(start)
            while start < end and (count := file.readinto(block[: min(_BLOCK_BYTES, end - start)])):
                digest.update(block[:count])
                start += count
            found[name] = digest.hexdigest()
    return found


def digest_of_layers(store: LayerStore, layers: Iterable[int]) -> dict[str, str]:
    """By its index, what each layer of a donor is; of extracted layers, metadata.json has the BLAKE3 of tensors."""
    found = {}
    for index in layers:
        ranges = store.ranges(index)
        known = store.layers.get(index, {}).get("tensors")
        digests = known if isinstance(known, dict) and known.keys() == ranges.keys() else blake3_of_tensors(ranges)
        tensors = {name: (place.dtype, place.shape, digests[name]) for name, place in ranges.items()}
        found[str(index)] = weights_digest(tensors)
    return found


def digest_of_model(folder: Path) -> str:
    """What decides on a model's answers beside its tokenizer: its config and its tensors; of a checkpoint too."""
    if (folder / INFO).is_file():
        return digest_of({"config": read_info(folder)["config"], "weights": digest_of_checkpoint(folder)})
    config = digests_of_files([folder / "config.json"])
    return digest_of({"config": config, "weights": digest_of_ranges(TensorFiles(folder).ranges)})


def digest_of_weights(path: Path) -> str:
    """What is in a file of weights, a model's or an adapter's folder, or a checkpoint."""
    if (path / "config.json").is_file() or (path / INFO).is_file():
        return digest_of_model(path)
    return digest_of(digests_of_files([path] if path.is_file() else filter(Path.is_file, path.iterdir())))


def digest_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What decides on how text becomes tokens; the same after `save_pretrained`, which writes other files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest_of(
        {
            "tokens": sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str()),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
            "sides": [tokenizer.padding_side, tokenizer.truncation_side],
            "added": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
        }
    )


def digest_of_checkpoint(folder: Path) -> str:
    """`weights_digest` of the weights that a checkpoint has now, whatever checkpoint_info.json says of them.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    if read_info(folder).get("format") != "hf":
        try:
            return digest_of_ranges(state_dict_ranges(folder / STATE_DICT))
        except SurgeryError:  # views, or what cannot be loaded at all
            return digest_of(digests_of_files([folder / STATE_DICT]))
    from model_preparation.llamba import LlambaForCausalLM

    ranges = TensorFiles(folder).ranges
    for tied, name in LlambaForCausalLM._tied_weights_keys.items():
        ranges.setdefault(tied, ranges[name])
    return digest_of_ranges(ranges)


def recorded_weights(folder: Path) -> str:
    """The same of the weights that a checkpoint was built with, by its tensor_digests.json."""
    tensors = read_tensor_digests(folder / TENSOR_DIGESTS)
    return weights_digest({name: (entry.dtype, entry.shape, entry.blake3) for name, entry in tensors.items()})


def digests_as_recorded(recorded: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[dict, dict]:
    """Digests of a model's files by name, as a checkpoint_info.json records them and as they are in `folder` now.

    A file of another size is not read; before there were BLAKE3s, SHA-256s were recorded.
    """
    there: dict[str, str] = {}
    now: dict[str, str | None] = {}
    for name, entry in recorded.items():
        path, kind = folder / name, "blake3" if "blake3" in entry else "sha256"
        there[name] = entry[kind]
        if not path.is_file():
            now[name] = None
        elif path.stat().st_size != entry["bytes"]:
            now[name] = "0" * 64
        elif kind == "blake3":
            now |= digests_of_files([path])
        else:
            now[name] = remembered(path, kind, lambda path: {"": sha256_of(path)})[""]
    return there, now
