"""Find and load the models that are tested, scored and compared: checkpoints, bases, donors, any model in a folder.

All models are found before one is loaded. No code in a model's folder is run.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, INFO, MODULE, STATE_DICT, TOKENIZER, read_info
from model_preparation.checkpoint.layer_store import HEAD, text_part, without_head
from model_preparation.checkpoint.load import load_checkpoint, spread
from model_preparation.checkpoint.model_configs import read_generation_config
from model_preparation.checkpoint.model_digests import digest_of_checkpoint
from model_preparation.errors import SurgeryError, one_line
from model_preparation.hub.sources import (
    has_tokenizer,
    is_replaced,
    resolve,
    target_of,
    tokenizer_files,
    tokenizer_name,
)
from model_preparation.io.complete_folder import existing_parent
from model_preparation.io.result_inputs import digest_of, digests_of_files, name_of
from model_preparation.io.untrusted.not_a_model import snapshot_in, what_it_is
from model_preparation.io.untrusted.untrusted_config import generation_config_from
from model_preparation.io.untrusted.untrusted_files import read_json, without_links
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.llamba.donor_kinds import KINDS

# A checkpoint's donor and base: {word for --compare_with: field of checkpoint_info.json}.
RECORDED = {"donor": "replacement_source", "base": "base_model"}

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class OtherModel:
    """A model to compare a checkpoint with. `name` is the text by which the user asked for the model."""

    name: str
    folder: Path
    is_checkpoint: bool


def find_others(
    names: Sequence[str], checkpoint: str | Path, *, sources: Mapping[str, str] | None = None
) -> list[OtherModel]:
    """Find the models to compare a checkpoint with. Download those that are not on this disk.

    Args:
        names: each is "donor" or "base" (the checkpoint's own), the folder of another checkpoint, or anything that
            `resolve` takes.
        checkpoint: the checkpoint's folder.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them. If checkpoint_info.json has one of
            these names for the donor or the base, `sources` replaces that model too.

    Raises:
        SurgeryError: if a folder is missing or not complete, or a model cannot be downloaded.
    """
    return [_find_other(name, Path(checkpoint).expanduser(), sources or {}) for name in names]


def _find_other(name: str, checkpoint: Path, sources: Mapping[str, str]) -> OtherModel:
    if name not in RECORDED:
        folder = Path(name).expanduser()
        if (folder / INFO).is_file():
            read_info(folder)
            return OtherModel(name, folder, is_checkpoint=True)
        return OtherModel(name, resolve(name, overrides=sources).folder, is_checkpoint=False)
    recorded = read_info(checkpoint).get(RECORDED[name])
    try:
        if not isinstance(recorded, dict):
            raise TypeError(f"{RECORDED[name]} is {recorded!r}")
        if recorded.get("legacy"):
            raise SurgeryError(
                f"The {name} of {checkpoint} was imported from old layer files, and these are not a whole model. "
                "Give --compare_with the folder of the model that the layers come from."
            )
        replaced = is_replaced(recorded["name"], sources)
        target = recorded["name"] if replaced else target_of(recorded, "Say where it is by --compare_with DIR.")
    except (KeyError, TypeError) as error:
        raise SurgeryError(
            f"{checkpoint / INFO} does not say what its {name} is ({error!r}). Give that model's folder instead."
        ) from error
    return OtherModel(name, resolve(target, overrides=sources).folder, is_checkpoint=False)


def load_other(
    other: OtherModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    parallelize: bool = False,
) -> Loaded:
    """Load a model and its tokenizer. The model is in eval mode, without its own decoding settings.

    Args:
        other: the model.
        tokenizer: the checkpoint's. A model that is published without a tokenizer, such as Llamba, gets this one.
        device, dtype, parallelize: as in `load_checkpoint`.

    Raises:
        SurgeryError: if the model cannot be loaded, lacks weights, or has a smaller vocabulary than `tokenizer` and no
            tokenizer of its own.
    """
    if other.is_checkpoint:
        return load_checkpoint(other.folder, device=device, dtype=dtype, parallelize=parallelize)
    own = has_tokenizer(other.folder)
    if own:
        tokenizer = load_tokenizer(other.folder)
    model = load_folder(other.folder, dtype)
    if not own and model.config.vocab_size < len(tokenizer):
        raise SurgeryError(
            f"{other.folder} has no tokenizer, and the checkpoint's does not fit: it has {len(tokenizer)} tokens, but "
            f"the model has only {model.config.vocab_size}. Copy the model's own tokenizer into the folder."
        )
    given = model.generation_config
    eos = tokenizer.eos_token_id if given.eos_token_id is None else given.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    model.generation_config = GenerationConfig(bos_token_id=given.bos_token_id, eos_token_id=eos, pad_token_id=pad)
    if parallelize:
        return spread(model), tokenizer
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method's own signature
    return model, tokenizer


def load_folder(folder: Path, dtype: torch.dtype | str | None) -> PreTrainedModel:
    """Load the model in a folder, in eval mode, on the CPU. Of a multimodal model, load the text part.

    Raises:
        SurgeryError: if the model cannot be loaded, or lacks weights.
    """
    loading: dict[str, Any]
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' bar; in a log it is noise
    try:
        text = text_part(folder)
        kind = KINDS[text["config"].model_type] if text else None
        model_class = kind.transformers_class("ForCausalLM") if kind else AutoModelForCausalLM
        model, loading = model_class.from_pretrained(
            None if text else folder,
            **text,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if text and (fields := read_generation_config(folder)):
            model.generation_config = generation_config_from(fields)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise SurgeryError(
            what_it_is(folder) or f"No model can be loaded from {folder} ({one_line(error)}). Give another folder."
        ) from error
    if set(loading["missing_keys"]) == {HEAD}:
        raise without_head(folder)
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(loading["missing_keys"])
        raise SurgeryError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them. Download the model again.")
    return model.eval()


def digest_of_weights(folder: Path, is_checkpoint: bool) -> str:
    """The digest that identifies a model's weights in results.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    return digest_of_checkpoint(folder) if is_checkpoint else digest_of(digests_of_files(_weight_files(folder)))


def _weight_files(folder: Path) -> list[Path]:
    return [path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]


@dataclass(frozen=True)
class ScoredModel:
    """A model that is tested or scored.

    Attributes:
        name: the name of its results folder.
        config: the contents of its config file.
        dtype: of the weights, as torch spells it; "as stored" or "as served" if it is unknown.
        weight_files: the names of the files that have its weights.
        tokenizer: the folder of its tokenizer.
        is_checkpoint: whether this package built it.
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
        """Digests of everything that the model's answers depend on, computed from the current files.

        Raises:
            OSError: if a file is missing or cannot be read.
        """
        inputs = {"weights": digest_of_weights(self.folder, self.is_checkpoint)}
        if self.is_checkpoint and (self.folder / MODULE).is_file():  # model.pt, the pickled module
            inputs |= digests_of_files([self.folder / MODULE])
        tokenizer = digest_of(digests_of_files(tokenizer_files(self.tokenizer)))
        return {**inputs, "config": digest_of(self.config), "tokenizer": tokenizer}

    def results_root(self, results_dir: str | Path | None) -> Path:
        """The folder of all its evaluations: NAME in `results_dir`, by default `evaluations` in the checkpoint.

        Raises:
            SurgeryError: if the folder cannot be written, or if there is neither a checkpoint nor a `results_dir`.
        """
        if results_dir is None and not self.is_checkpoint:
            raise SurgeryError(
                f"{self.folder} is a model, not a checkpoint. Name a folder for its results with --results_dir."
            )
        root = self.folder / EVALUATIONS if results_dir is None else Path(results_dir).expanduser() / self.name
        nearest = without_links(root) if root.exists() else existing_parent(root)
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            reason = f"{nearest} is {'read-only' if nearest.is_dir() else 'a file'}"
            raise SurgeryError(f"Results cannot be kept in {root} ({reason}). Name another folder with --results_dir.")
        return root

    def load(self, device: str | torch.device, dtype: torch.dtype | None, parallelize: bool) -> Loaded:
        """Load model and tokenizer; the arguments are those of `load_checkpoint`."""
        if self.is_checkpoint:
            return load_checkpoint(self.folder, device=device, dtype=dtype, parallelize=parallelize)
        other = OtherModel(self.name, self.folder, is_checkpoint=False)
        return load_other(other, load_tokenizer(self.tokenizer), device=device, dtype=dtype, parallelize=parallelize)


def find_model(
    given: str | Path, tokenizer: str | None = None, *, sources: Mapping[str, str] | None = None
) -> ScoredModel:
    """Find the model that a user wants to test or score.

    Args:
        given: a checkpoint's folder, or anything that `resolve` takes.
        tokenizer: anything that `resolve` takes, for a model that is published without a tokenizer, such as Llamba.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if the model cannot be found, if it has a tokenizer and `tokenizer` is given too, or if it
            has no tokenizer and neither `tokenizer` nor `tokenizer_name` names one.
    """
    folder = Path(given).expanduser()
    model = snapshot_in(folder) or folder
    is_plain_model = (model / "config.json").is_file() and not (model / INFO).is_file()
    is_path = folder.exists() or folder.is_absolute() or ".." in folder.parts
    is_path |= folder.name != str(folder) and folder.parent.is_dir()  # a missing checkpoint, not a hub id
    if is_path and not is_plain_model:
        info = read_info(folder)
        is_hf = info.get("format") == "hf"
        files = [name for name in info["files"] if name.endswith(".safetensors")] if is_hf else [STATE_DICT]
        for name in files:
            if not (folder / name).is_file():
                raise SurgeryError(
                    what_it_is(folder) or f"{folder / name} is missing. Copy it, or build the checkpoint again."
                )
        _refuse_tokenizer(tokenizer, folder)
        own = folder if is_hf else folder / TOKENIZER
        return ScoredModel(name_of(folder), folder, info["config"], info["dtype"], files, own, True)
    name, folder = name_of(given), resolve(str(given), overrides=sources).folder
    if has_tokenizer(folder):
        _refuse_tokenizer(tokenizer, folder)
        own = folder
    elif chosen := tokenizer or tokenizer_name(str(given)):
        own = resolve(chosen, need="tokenizer", overrides=sources).folder
    else:
        raise SurgeryError(f"{folder} has no tokenizer. Name one by --tokenizer, such as llama_tokenizer.")
    config = read_json(folder / "config.json")
    files = [path.name for path in _weight_files(folder)]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "as stored")
    return ScoredModel(name, folder, config, dtype, files, own, False)


def served_model(name: str, tokenizer: str, *, sources: Mapping[str, str] | None = None) -> ScoredModel:
    """A model on a server. Only the model's tokenizer is on this disk."""
    folder = resolve(tokenizer, need="tokenizer", overrides=sources).folder
    return ScoredModel(name_of(name), folder, {}, "as served", [], folder, False)


def _refuse_tokenizer(tokenizer: str | None, folder: Path) -> None:
    if tokenizer is not None:
        raise SurgeryError(f"{folder} has a tokenizer of its own. Leave out --tokenizer {tokenizer}.")
