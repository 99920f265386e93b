"""What is scored: a checkpoint, or a model to hold against it, such as its base or its donor.

In: a checkpoint's folder, or the name, folder or hub id of a model. Out: a `ScoredModel`: what its weights are, and how
it is loaded. No code that lies in a folder is run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.other_models import OtherModel, load_other
from model_preparation.surgery.checkpoint_info import INFO, STATE_DICT, read_info
from model_preparation.surgery.checkpoint_loading import load_checkpoint
from model_preparation.surgery.sources import has_tokenizer, resolve
from model_preparation.untrusted.no_model import snapshot_in, what_it_is
from model_preparation.untrusted.tokenizer_files import load_tokenizer
from model_preparation.untrusted.untrusted_files import read_json


@dataclass(frozen=True)
class ScoredModel:
    """A model on the disk.

    Attributes:
        name: of the folder of its results.
        config: as its JSON file has it.
        dtype: of the weights, as torch spells it.
        weight_files: what is read of it, by name.
        tokenizer: the folder of its tokenizer; None for a checkpoint, which has its own.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    dtype: str
    weight_files: list[str]
    tokenizer: Path | None

    @property
    def is_checkpoint(self) -> bool:
        return self.tokenizer is None

    def load(
        self, device: str | torch.device, dtype: torch.dtype | None, parallelize: bool
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer; the arguments are those of `load_checkpoint`."""
        if self.tokenizer is None:
            return load_checkpoint(self.folder, device=device, dtype=dtype, parallelize=parallelize)
        other = OtherModel(self.name, self.folder, is_checkpoint=False)
        return load_other(other, load_tokenizer(self.tokenizer), device=device, dtype=dtype)


def find_model(given: str | Path, tokenizer: str | None = None) -> ScoredModel:
    """What a user wants scored.

    Args:
        given: a checkpoint's folder; else what `resolve` takes.
        tokenizer: of a model that is published without one, as Llamba is; what `resolve` takes.

    Raises:
        SurgeryError: if there is no such thing, or it has no tokenizer and none is named.
    """
    folder = Path(given).expanduser()
    model = snapshot_in(folder) or folder
    is_plain_model = (model / "config.json").is_file() and not (model / INFO).is_file()
    is_path = folder.exists() or folder.is_absolute() or ".." in folder.parts
    if is_path and not is_plain_model:
        info = read_info(folder)
        is_hf = info.get("format") == "hf"
        files = [name for name in info["files"] if name.endswith(".safetensors")] if is_hf else [STATE_DICT]
        for name in files:
            if not (folder / name).is_file():
                raise SurgeryError(
                    what_it_is(folder) or f"{folder / name} is missing. Copy it, or build the checkpoint again."
                )
        return ScoredModel(folder.resolve().name, folder, info["config"], info["dtype"], files, None)
    folder = resolve(str(given)).folder
    own = folder if has_tokenizer(folder) else None
    if own is None and tokenizer is None:
        raise SurgeryError(f"{folder} has no tokenizer. Name one by --tokenizer, such as llama_tokenizer.")
    config = read_json(folder / "config.json")
    files = [path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "as stored")
    name = Path(given).name
    return ScoredModel(name, folder, config, dtype, files, own or resolve(str(tokenizer), need="tokenizer").folder)
