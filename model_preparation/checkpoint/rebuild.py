"""Builds a checkpoint again from its checkpoint_info.json, and compares the new files with the recorded digests.

checkpoint_info.json is the recipe: it names base, donor and layers, and has the digest of every file, in a few
kilobytes. Base, donor and recipe are enough to make most checkpoints. `needs_parent` says when they are not.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.build import build_checkpoint
from model_preparation.checkpoint.checkpoint_info import (
    INFO,
    README,
    TENSOR_DIGESTS,
    grafted_heads,
    needs_parent,
    read_info,
    read_info_file,
)
from model_preparation.checkpoint.extract import extract_layers
from model_preparation.checkpoint.graft_plan import GraftPlan
from model_preparation.checkpoint.layer_store import METADATA, LayersOfSeveral, LayerStore
from model_preparation.checkpoint.model_digests import digest_of_layers, digests_as_recorded
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import donors_of, target_of
from model_preparation.io.complete_folder import check_target
from model_preparation.io.digests import sha256_of
from model_preparation.io.result_inputs import differences
from model_preparation.io.tensors.tensor_ranges import MappedFiles

_PROGRAMS = ("model_preparation", "torch", "transformers")  # all bytes outside the tensors depend on these
# The model's computation depends on these fields of a config.
_CONFIG = (
    *("d_model", "n_layer", "vocab_size", "tie_embeddings", "norm_epsilon"),
    *("mlp_cfg", "ssm_cfg", "llama_layers", "llama_cfg", "other_llama_cfgs", "donor_type", "llama_heads"),
    "keep_mixer_heads",
)
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges")


def rebuild_checkpoint(
    recipe: str | Path,
    output_dir: str | Path,
    llama_layers_dir: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    device: str | Callable[[], str] = "cpu",
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> list[str]:
    """Build the checkpoint that a checkpoint_info.json describes, and compare the new digests with the recorded ones.

    Args:
        recipe: a checkpoint_info.json.
        output_dir: the folder to make; it appears whole or not at all.
        llama_layers_dir: a folder of the donor's extracted layers. If it holds no layers, they are extracted into it
            from the recipe's donor. If the recipe has several donors, give a folder for each.
        base: where the base is; by default where the recipe says. If the recipe needs a parent checkpoint, such as a
            healed one, give the folder of that checkpoint.
        device: where the smoke test runs, or a function that chooses it.
        overwrite: replace an existing checkpoint.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Returns:
        Notes: files that differ although the model is equal, with the reason; a left-out MMLU score. Usually none.

    Raises:
        SurgeryError: if the recipe cannot be read; if base or donor are missing, or are not the recipe's; or if
            files differ although the versions of programs are the same.
    """
    target = Path(output_dir).expanduser()
    given = [llama_layers_dir] if isinstance(llama_layers_dir, str | Path) else llama_layers_dir
    folders = [Path(folder).expanduser() for folder in given]
    check_target(target, overwrite=overwrite, marker_file=INFO)  # before any layer is extracted
    info = read_recipe(recipe)
    if "healing" in info:
        raise SurgeryError(
            f"{recipe} describes a healed checkpoint, and no recipe makes trained weights. Copy the checkpoint "
            f"itself, or rebuild {info.get('parent', {}).get('id', 'its parent')} and heal it again."
        )
    step: dict[str, Any] = {"grafted": info["replaced_layers"], "grafted_heads": info.get("grafted_heads", {})}
    if needs_parent(info):
        step = info["descent"][-1]
        _check_parent(recipe, base, step["from"])
    heads = grafted_heads(step)
    notes: list[str] = []

    def review(found: dict[str, Any], graft: GraftPlan) -> None:
        if "descent" in info:
            found["descent"] = info["descent"]
        notes.extend(_compare(found, info, None if graft.parent else graft.base.folder))
        if measured := info.get("mmlu_result"):
            if measured.get("model", {}).get("weights") == found["digests"]["weights"]:
                found["mmlu_result"] = measured
            else:
                found["mmlu_score"] = None
                notes.append("The MMLU score is left out: it was measured on other weights. Evaluate the checkpoint.")

    try:
        tokenizer = info.get("tokenizer_source")  # early recipes lack this field
        build_checkpoint(
            base or target_of(info["base_model"], "Say where it is by --base."),
            step["grafted"],
            _donor_layers(folders, info, sorted([*step["grafted"], *heads]), sources),
            target,
            tokenizer=None if tokenizer is None else target_of(tokenizer, "Say where it is by --tokenizer."),
            description=info["description"],
            score=info["mmlu_score"],
            device=device,
            dtype=info["dtype"],
            format=info.get("format", "pt"),
            overwrite=overwrite,
            sources=sources,
            review=review,
            heads=heads,
            keep_mixer_heads=bool(heads) and info.get("keep_mixer_heads", False),
            ungraft=step.get("ungrafted", []),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SurgeryError(f"{recipe} lacks a field or has a wrong one ({error!r}). Copy it again.") from error
    return notes


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint_info.json, given its path or its folder.

    Raises:
        SurgeryError: if the file is missing or invalid.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path /= INFO
    if not path.is_file():
        raise SurgeryError(f"{path} is not there. Give a checkpoint's checkpoint_info.json.")
    try:
        return read_info_file(path)
    except SurgeryError as error:
        raise SurgeryError(f"{path} is no recipe. Give a checkpoint's {INFO}. ({error})") from error


def _check_parent(recipe: str | Path, base: str | None, recorded: Mapping[str, Any]) -> None:
    """Raise SurgeryError unless `base` is the checkpoint that the recipe starts from."""
    if base is None:
        raise SurgeryError(
            f"{recipe} describes a graft on the checkpoint {recorded['id']}. Base and donors are not enough to "
            "build it. Say where that checkpoint is by --base."
        )
    if read_info(base)["files"][TENSOR_DIGESTS]["sha256"] != recorded.get("tensor_digests_sha256"):
        raise SurgeryError(
            f"{base} is not the checkpoint {recorded['id']} of the recipe. Give that checkpoint by --base."
        )


def _donor_layers(
    folders: Sequence[Path], info: Mapping[str, Any], layers: Sequence[int], sources: Mapping[str, str] | None
) -> LayerStore | Path:
    """The layers of the recipe's donors, compared with the recipe. If a folder has none, they are extracted first."""
    if not layers:
        return folders[0]  # the build does not open it
    taken = [(donor, [index for index in layers if str(index) in donor["layers"]]) for donor in donors_of(info)]
    taken = [(donor, own) for donor, own in taken if own]
    if len(folders) != len(taken):
        raise SurgeryError(
            f"The recipe needs layers of {len(taken)} donors, {', '.join(donor['id'] for donor, _ in taken)}. "
            "Give a folder for each, in this order, by --llama_layers_dir DIR [DIR ...]."
        )
    stores = [
        (_layers_of_one(folder, info, donor, own, sources), own)
        for folder, (donor, own) in zip(folders, taken, strict=True)
    ]
    return stores[0][0] if len(stores) == 1 else LayersOfSeveral(stores)


def _layers_of_one(
    folder: Path,
    info: Mapping[str, Any],
    donor: Mapping[str, Any],
    layers: Sequence[int],
    sources: Mapping[str, str] | None,
) -> LayerStore:
    if not (folder / METADATA).is_file() and donor.get("legacy"):
        raise SurgeryError(
            f"The recipe's donor, {donor['id']}, was imported from old layer files, and {folder} holds no layers. "
            f"Import them: python extract_layers.py --from_legacy DIR --trust_pickle --output_dir {folder}"
        )
    if not (folder / METADATA).is_file():
        extract_layers(
            target_of(donor, "Say where it is by --llama_layers_dir."), folder, layers=layers, sources=sources
        )
    store = LayerStore(folder)
    tensors = info.get("digests", {}).get("donor_layers")  # recipes from before 0.2.0 have none
    for index in layers:
        path, recorded = store.path(index), donor["layers"][str(index)]
        if tensors is not None:
            matches = digest_of_layers(store, [index]) == {str(index): tensors[str(index)]}
        else:
            matches = store.layers[index]["sha256"] == recorded or _sha256_of_old_file(store, index) == recorded
        if not matches:
            raise SurgeryError(
                f"{path} is not the layer of the recipe: its tensors differ. "
                "Give another --llama_layers_dir, or an empty folder."
            )
    return store


def _sha256_of_old_file(store: LayerStore, index: int) -> str:
    """The SHA-256 that a layer's file would have if torch.save had written it, as in the first versions."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / store.path(index).name
        mapped = MappedFiles()
        torch.save({name: mapped.tensor(place).clone() for name, place in store.ranges(index).items()}, path)
        return sha256_of(path)


def _name_of(source: Mapping[str, Any]) -> str:
    return source.get("path") or source["id"] + (f" at revision {source['revision']}" if source["revision"] else "")


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], base: Path | None) -> list[str]:
    """Compare a new checkpoint_info.json (`found`) with the recipe (`wanted`); returns notes.

    A different model is an error. Files that differ because other program versions wrote them give a note.

    Args:
        base: the folder to compare with the recipe's base; None if the graft is on a checkpoint.
    """
    if base is not None and (changes := differences(*digests_as_recorded(wanted["base_model"]["files"], base))):
        raise SurgeryError(
            f"{base} is not the recipe's base ({'; '.join(changes)}). Give the base that the recipe names, "
            f"{_name_of(wanted['base_model'])}, by --base."
        )
    if changes := differences(_model_of(wanted), _model_of(found), of_both=True):
        raise SurgeryError(
            f"The new checkpoint is not the recipe's model ({'; '.join(changes)}). Give the recipe's donor."
        )
    recorded = wanted.get("digests", {}).get("tokenizer")  # equal under all versions of transformers that we support
    is_same_tokenizer = recorded == found["digests"]["tokenizer"]
    if recorded is not None and not is_same_tokenizer:
        source = wanted.get("tokenizer_source")
        holder = _name_of(source) if source else "base or donor"
        raise SurgeryError(
            f"The new checkpoint's tokenizer is not the recipe's: {holder} has another one now. Give the "
            "base and the donor with the tokenizer of that time."
        )
    names = (found["files"].keys() | wanted["files"].keys()) - {TENSOR_DIGESTS}  # compared above
    ids = [[source["id"] for source in (info["base_model"], *donors_of(info))] for info in (found, wanted)]
    if ids[0] != ids[1]:
        names -= {README}  # its text has these ids
    files = [name for name in sorted(names) if found["files"].get(name) != wanted["files"].get(name)]
    programs = differences(_programs_of(wanted), _programs_of(found), of_both=True)
    is_same_library = wanted["versions"].get("transformers") == found["versions"]["transformers"]
    unexplained = [name for name in files if not programs or (is_same_library and name.startswith(_TOKENIZER_FILES))]
    if is_same_tokenizer:
        # Before 0.3.0, tokenizer_config.json also said whether HF_HUB_OFFLINE was set.
        unexplained = [name for name in unexplained if not name.endswith("tokenizer_config.json")]
    if unexplained:
        raise SurgeryError(
            f"The new checkpoint differs from the recipe in {', '.join(unexplained[:5])}, but the programs that write "
            "them are the same. Copy the recipe again, and take the recipe's base and donor."
        )
    if not files:
        return []
    if not programs:
        return [f"{', '.join(files)} differs, but the tokenizer is equal: one build had HF_HUB_OFFLINE set."]
    return [f"Other versions of programs wrote other bytes in {', '.join(files)} ({'; '.join(programs)})."]


def _model_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the model that a checkpoint_info.json describes. The first versions recorded less."""
    config = {name: info["config"].get(name) for name in _CONFIG}
    tensors = info["files"].get(TENSOR_DIGESTS)
    older = {} if tensors is None else {TENSOR_DIGESTS: tensors["sha256"]}
    return {"config": config, **({"weights": info["digests"]["weights"]} if "digests" in info else {}), **older}


def _programs_of(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: info["versions"].get(name) for name in _PROGRAMS} | info.get("code", {})
