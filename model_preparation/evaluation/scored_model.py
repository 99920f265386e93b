"""What writes and is scored: a checkpoint, or a model to hold against it, such as its base or its donor.

In: a checkpoint's folder, or the name, folder or hub id of a model. Out: a `ScoredModel`: what its weights are, and how
it is loaded. No code that lies in a folder is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, INFO, MODULE, STATE_DICT, TOKENIZER, read_info
from model_preparation.checkpoint.digests import digest_of_checkpoint
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.other_models import OtherModel, load_other
from model_preparation.hub.sources import has_tokenizer, resolve, tokenizer_files, tokenizer_name
from model_preparation.io.identity import digest_of, digests_of_files, name_of
from model_preparation.io.untrusted.not_a_model import snapshot_in, what_it_is
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.io.untrusted.untrusted_files import read_json


@dataclass(frozen=True)
class ScoredModel:
    """A model on the disk.

    Attributes:
        name: of the folder of its results.
        config: as its JSON file has it.
        dtype: of the weights, as torch spells it.
        weight_files: those of its weights, by name.
        tokenizer: the folder of its tokenizer.
        is_checkpoint: whether it was built by this package.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    dtype: str
    weight_files: list[str]
    tokenizer: Path
    is_checkpoint: bool

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What decides on its answers, by digests, as it is now.

        Raises:
            OSError: if a file is missing or cannot be read.
        """
        if self.is_checkpoint:
            inputs = {"weights": digest_of_checkpoint(self.folder)}
            if (self.folder / MODULE).is_file():  # it is not read here, but the score is said to be its too
                inputs |= digests_of_files([self.folder / MODULE])
        else:
            inputs = {"weights": digest_of(digests_of_files(self.folder / name for name in self.weight_files))}
        tokenizer = digest_of(digests_of_files(tokenizer_files(self.tokenizer)))
        return {**inputs, "config": digest_of(self.config), "tokenizer": tokenizer}

    def results_root(self, results_dir: str | Path | None) -> Path:
        """The folder of all its evaluations: of its name in `results_dir`, by default in the checkpoint's own folder.

        Raises:
            SurgeryError: if `results_dir` is None and it is no checkpoint.
        """
        if results_dir is not None:
            return Path(results_dir).expanduser() / self.name
        if not self.is_checkpoint:
            raise SurgeryError(
                f"{self.folder} is a model and no checkpoint. Say where to keep its results by --results_dir."
            )
        return self.folder / EVALUATIONS

    def load(
        self, device: str | torch.device, dtype: torch.dtype | None, parallelize: bool
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer; the arguments are those of `load_checkpoint`."""
        if self.is_checkpoint:
            return load_checkpoint(self.folder, device=device, dtype=dtype, parallelize=parallelize)
        other = OtherModel(self.name, self.folder, is_checkpoint=False)
        return load_other(other, load_tokenizer(self.tokenizer), device=device, dtype=dtype, parallelize=parallelize)


def find_model(
    given: str | Path, tokenizer: str | None = None, *, sources: Mapping[str, str] | None = None
) -> ScoredModel:
    """What a user wants to write or to be scored.

    Args:
        given: a checkpoint's folder; else what `resolve` takes.
        tokenizer: of a model that is published without one, as Llamba is; what `resolve` takes.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if there is no such thing, it has no tokenizer and none is named, or the one named has no use.
    """
    folder = Path(given).expanduser()
    model = snapshot_in(folder) or folder
    is_plain_model = (model / "config.json").is_file() and not (model / INFO).is_file()
    is_path = folder.exists() or folder.is_absolute() or ".." in folder.parts
    is_path |= folder.name != str(folder) and folder.parent.is_dir()  # a checkpoint that is not there, and no hub id
    if is_path and not is_plain_model:
        info = read_info(folder)
        is_hf = info.get("format") == "hf"
        files = [name for name in info["files"] if name.endswith(".safetensors")] if is_hf else [STATE_DICT]
        for name in files:
            if not (folder / name).is_file():
                raise SurgeryError(
                    what_it_is(folder) or f"{folder / name} is missing. Copy it, or build the checkpoint again."
                )
        _check_needed(tokenizer, folder)
        own = folder if is_hf else folder / TOKENIZER
        return ScoredModel(name_of(folder), folder, info["config"], info["dtype"], files, own, True)
    name, folder = name_of(given), resolve(str(given), overrides=sources).folder
    if has_tokenizer(folder):
        _check_needed(tokenizer, folder)
        own = folder
    elif chosen := tokenizer or tokenizer_name(str(given)):
        own = resolve(chosen, need="tokenizer", overrides=sources).folder
    else:
        raise SurgeryError(f"{folder} has no tokenizer. Name one by --tokenizer, such as llama_tokenizer.")
    config = read_json(folder / "config.json")
    files = [path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "as stored")
    return ScoredModel(name, folder, config, dtype, files, own, False)


def _check_needed(tokenizer: str | None, folder: Path) -> None:
    if tokenizer is not None:
        raise SurgeryError(f"{folder} has a tokenizer of its own. Leave out --tokenizer {tokenizer}.")
