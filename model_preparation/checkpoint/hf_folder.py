"""A checkpoint in the form that transformers and lm-eval open without this package.

In: `GraftParts`, and later a `GraftPlan`; or a model in memory. Out: one safetensors file per layer with an index,
config.json, generation_config.json, the tokenizer, and copies of the model's own source files, to which `auto_map` in
config.json points. The folder opens with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.base_store import BaseStore
from model_preparation.checkpoint.graft_parts import GraftParts
from model_preparation.checkpoint.model_code import AUTO_MAP, package_code
from model_preparation.errors import SurgeryError
from model_preparation.io.block_io import Advance
from model_preparation.io.tensors.safetensors_writer import Shard
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from model_preparation.checkpoint.graft import GraftPlan
    from model_preparation.llamba import LlambaForCausalLM
    from model_preparation.llamba.configuration_llamba import LlambaConfig

INDEX = "model.safetensors.index.json"


class HfFolder:
    """What the folder of a graft will hold.

    Args:
        graft: its parts.
        checkpoints: the folder that the checkpoint's folder will be in; the store of base shards is there too.

    Attributes:
        store: where the shards of untouched layers are kept.
    """

    def __init__(self, graft: GraftParts, checkpoints: Path):
        self._shards, self._grafted_shards = _shards(graft)
        self.store = BaseStore(checkpoints, graft.base_paths, graft.dtype)

    def bytes_to_write(self, *, read_base: bool = False) -> int:
        """Size of the shards that are not on the disk yet.

        Args:
            read_base: read a base whose digests are not known; without it, such a base has nothing stored.
        """
        grafted_bytes = sum(shard.size_bytes for shard in self._grafted_shards)
        return grafted_bytes + self.store.bytes_missing(self._shards, read_base=read_base)

    def write_weights(self, folder: Path, advance: Advance) -> tuple[dict[str, dict], dict[str, str]]:
        """Write the shards; returns {"bytes", "sha256"} of each by its file name, and BLAKE3 by tensor name.

        Args:
            advance: told the bytes of every piece written or found in the store.

        Raises:
            OSError: from the file system: disk full, input/output error.
        """
        files: dict[str, dict] = {}
        digests: dict[str, str] = {}
        for shard in self._shards:
            files[shard.file], digests_in_it = self.store.provide(shard, folder / shard.file, advance)
            digests |= digests_in_it
        for shard in self._grafted_shards:
            files[shard.file], digests_in_it = shard.write(folder / shard.file, advance)
            digests |= digests_in_it
        return files, digests

    def write_rest(
        self,
        folder: Path,
        graft: "GraftPlan",
        tokenizer: "PreTrainedTokenizerBase",
        generation_config: Mapping[str, Any],
    ) -> None:
        """Write everything else that `from_pretrained` reads."""
        shards = [*self._shards, *self._grafted_shards]
        weight_map = {name: shard.file for shard in shards for name in shard.ranges}
        sizes = {"total_parameters": graft.parameters, "total_size": graft.weight_bytes}
        _write_rest(folder, weight_map, sizes, graft.config, tokenizer, generation_config)


def write_model(
    folder: Path,
    model: "LlambaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: Mapping[str, Any],
    advance: Advance,
) -> None:
    """Write a model that is in memory in this form.

    Args:
        advance: told the bytes of every shard written.

    Raises:
        OSError, SafetensorError: from the file system: disk full, input/output error.
    """
    from safetensors.torch import save_file

    by_file: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        by_file.setdefault(_shard_file(name), {})[name] = parameter.detach().contiguous()
    for file, tensors in by_file.items():
        save_file(tensors, folder / file, {"format": "pt"})
        advance(sum(tensor.nbytes for tensor in tensors.values()))
    weight_map = {name: file for file, tensors in by_file.items() for name in tensors}
    parameters = list(model.parameters())
    sizes = {"total_parameters": sum(p.numel() for p in parameters), "total_size": sum(p.nbytes for p in parameters)}
    _write_rest(folder, weight_map, sizes, model.config, tokenizer, generation_config)


def read_state_dict(folder: Path, model: "LlambaForCausalLM") -> "dict[str, Tensor]":
    """The state dict in the shards, mapped: nothing is read before it is used.

    Args:
        model: the one it is for; a tensor that is tied in it is in the shards once.

    Raises:
        SurgeryError: if a shard is missing or cannot be read as tensors, or a file beside them stands in for them.
    """
    from transformers.utils import SAFE_WEIGHTS_NAME

    foreign = folder / SAFE_WEIGHTS_NAME
    if foreign.exists():
        raise SurgeryError(f"{foreign} is not of this checkpoint, and would be read in its place. Move it elsewhere.")
    files = TensorFiles(folder)
    state_dict = {name: files[name] for name in files.names()}
    if model.config.tie_embeddings:
        state_dict |= {tied: state_dict[name] for tied, name in model._tied_weights_keys.items() if name in state_dict}
    return state_dict


def _write_rest(
    folder: Path,
    weight_map: Mapping[str, str],
    sizes: Mapping[str, int],
    config: "LlambaConfig",
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: Mapping[str, Any],
) -> None:
    from transformers import GenerationConfig

    _write_json(folder / INDEX, {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})
    _write_json(folder / "config.json", {**config.file_fields(), "auto_map": AUTO_MAP})
    GenerationConfig(**generation_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, path in package_code().items():
        shutil.copyfile(path, folder / name)


def _shards(graft: GraftParts) -> tuple[list[Shard], list[Shard]]:
    """(what is the base's, what is the donor's), each in the model's order."""
    by_file: dict[str, dict[str, TensorRange]] = {}
    for name, place in graft.tensors.items():
        by_file.setdefault(_shard_file(name), {})[name] = place
    grafted = {_shard_file(f"backbone.layers.{index}.") for index in graft.layers}
    shards = [Shard(file, ranges_in_it, graft.dtype) for file, ranges_in_it in by_file.items()]
    return [s for s in shards if s.file not in grafted], [s for s in shards if s.file in grafted]


def _shard_file(name: str) -> str:
    """The file that the tensor called `name` goes into."""
    if name.startswith("backbone.layers."):
        return f"layer_{int(name.split('.')[2]):02d}.safetensors"
    return "embedding.safetensors" if name.startswith("backbone.embedding.") else "head.safetensors"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
