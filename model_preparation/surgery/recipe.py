"""A checkpoint made again from its checkpoint_info.json, and shown to be the same.

In: the recipe, a few kilobytes: which base, which donor, which layers, and the digests of every file. Out: the
checkpoint's folder, or the error that names the first thing that is not what the recipe says. So whoever has base and
donor can be handed a checkpoint by its recipe alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.surgery.checkpoint import write
from model_preparation.surgery.checkpoint_info import INFO, README, TENSOR_DIGESTS, read_info_file
from model_preparation.surgery.graft_parts import find_parts
from model_preparation.surgery.layer_store import METADATA, LayerStore, extract_layers

_PROGRAMS = ("model_preparation", "torch", "transformers")  # what decides on bytes that are not tensors'


def rebuild(
    recipe: str | Path,
    output_dir: str | Path,
    llama_layers_dir: str | Path,
    *,
    base: str | None = None,
    device: str | Callable[[], str] = "cpu",
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> list[str]:
    """Build the checkpoint that a checkpoint_info.json describes, and confirm its digests.

    Args:
        recipe: a checkpoint_info.json.
        output_dir: the folder to make; it appears whole or not at all.
        llama_layers_dir: the donor's extracted layers. If there are none, they are extracted into it from the donor
            that the recipe names.
        base: where the base is; by default where the recipe says.
        device: where the trial forward pass runs.
        overwrite: replace a checkpoint that is there.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Returns:
        Names of files that differ although every tensor is the recipe's, as other versions of torch, transformers or
        this package made them; none as a rule.

    Raises:
        SurgeryError: if the recipe cannot be read, base or donor cannot be had or are not those of the recipe, or the
            files written differ from it for no such reason.
    """
    info = read_recipe(recipe)
    if "healing" in info:
        raise SurgeryError(
            f"{recipe} is of a checkpoint that was healed, whose weights no recipe gives. Copy the checkpoint itself, "
            f"or rebuild the one it was healed from, {info.get('parent', {}).get('id', 'its parent')}, and heal that."
        )
    differing: list[str] = []
    try:
        donor, layers, dtype = info["replacement_source"], info["replaced_layers"], info["dtype"]
        store = _donor_layers(Path(llama_layers_dir).expanduser(), donor, layers, sources)
        tokenizer = info["tokenizer_source"]
        base = base or target_of(info["base_model"], "--base")
        write(
            find_parts(base, layers, store.folder, dtype=dtype, sources=sources),
            output_dir,
            tokenizer=None if tokenizer is None else target_of(tokenizer, "--tokenizer"),
            allow_other_heads=True,  # whoever made the recipe has decided that
            sources=sources,
            description=info["description"],
            score=info["mmlu_score"],
            measured=info.get("mmlu_result"),
            device=device,
            format=info["format"],
            overwrite=overwrite,
            confirm=lambda found: differing.extend(_differing(found, info)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(f"{recipe} lacks what a recipe needs ({error!r}). Copy it again.") from error
    return differing


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A checkpoint_info.json that may lie anywhere.

    Raises:
        SurgeryError: if it is not there or not one.
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


def _donor_layers(
    folder: Path, donor: Mapping[str, Any], layers: list[int], sources: Mapping[str, str] | None
) -> LayerStore:
    if not (folder / METADATA).is_file() and donor.get("legacy"):
        raise SurgeryError(
            f"The recipe's donor, {donor['id']}, was imported from old layer files, and {folder} holds no layers. "
            f"Import them: python extract_layers.py --from_legacy DIR --trust_pickle --output_dir {folder}"
        )
    if not (folder / METADATA).is_file():
        extract_layers(target_of(donor, "--llama_layers_dir"), folder, layers=layers, sources=sources)
    store = LayerStore(folder)
    for index in layers:
        store.path(index)
        if store.layers[index]["sha256"] != donor["layers"][str(index)]:
            raise SurgeryError(
                f"{store.path(index)} is not the layer of the recipe: its SHA-256 is {store.layers[index]['sha256']}, "
                f"the recipe's {donor['layers'][str(index)]}. Give another --llama_layers_dir, or an empty one."
            )
    return store


def target_of(source: Mapping[str, Any], flag: str) -> str:
    """What `resolve` takes for a source that a checkpoint_info.json records.

    Raises:
        SurgeryError: if it is a local folder that is not here; the message says to name it by `flag`.
    """
    if source["hub"] != "local":
        return f"{source['hub']}:{source['id']}" + (f"@{source['revision']}" if source["revision"] else "")
    path = source.get("path")
    if path is None or not Path(path).is_dir():
        raise SurgeryError(f"The recipe names {path or source['id']}, which is not here. Say where it is by {flag}.")
    return path


def _name_of(source: Mapping[str, Any]) -> str:
    return source.get("path") or source["id"] + (f" at revision {source['revision']}" if source["revision"] else "")


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Compare what was written with the recipe; raises unless other versions of the programs explain what differs."""
    for name, entry in wanted["base_model"]["files"].items():
        if found["base_model"]["files"].get(name) != entry:
            raise SurgeryError(
                f"The base's {name} is not the recipe's (its digest differs). Take the base that the recipe names, "
                f"{_name_of(wanted['base_model'])}, by --base."
            )
    names = sorted(found["files"].keys() | wanted["files"].keys())
    odd = [name for name in names if found["files"].get(name) != wanted["files"].get(name)]
    if any(found[source]["id"] != wanted[source]["id"] for source in ("base_model", "replacement_source")):
        odd = [name for name in odd if name != README]  # it names them as they are called here
    versions = [
        f"{program} {found['versions'][program]} instead of {wanted['versions'][program]}"
        for program in _PROGRAMS
        if found["versions"][program] != wanted["versions"][program]
    ]
    if odd and (TENSOR_DIGESTS in odd or not versions):
        raise SurgeryError(
            f"What was built is not what the recipe says: {', '.join(odd[:5])} differ. "
            + (f"It was built with {', '.join(versions)}; install those versions." if versions else "Copy it again.")
        )
    return odd
