"""What a search checks before it evaluates anything.

`check_first` checks before the donor is downloaded and a model is loaded.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import grafted_heads, read_info
from model_preparation.checkpoint.layer_store import METADATA, LayerStore, ModelLayers
from model_preparation.checkpoint.model_configs import type_and_depth
from model_preparation.checkpoint.model_digests import digest_of_layers
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve
from model_preparation.io.result_inputs import differences
from model_preparation.io.untrusted.untrusted_files import read_json, without_links
from model_preparation.search.layer_sets import WHOLE_LAYERS, SearchSpace, Units
from model_preparation.search.plan import bounds
from model_preparation.search.question_set import check_tasks
from model_preparation.search.result_reader import RESULT, read_heads, read_single_layers
from model_preparation.search.settings import HEADS, KL, SearchSettings

JOURNAL, DONOR_LAYERS = "journal.jsonl", "donor_layers"  # in the output folder, beside RESULT


def check_first(settings: SearchSettings, *, overwrite: bool) -> None:
    """Check everything that can be checked without the donor and without loading a model.

    Raises:
        SurgeryError: for the first fault that is found.
    """
    _check_settings(settings)
    check_output(settings.folder)
    if settings.prior is not None:
        (read_heads if settings.unit == HEADS else read_single_layers)(Path(settings.prior))
    if not overwrite:
        check_earlier(settings.folder, {"search": settings.described()})
    check_tasks(settings.all_tasks)
    fixed: frozenset[int] = frozenset()
    if settings.start is None:
        _, total = type_and_depth(resolve(settings.base, overrides=settings.sources).folder)
    else:
        total, fixed = _of_start(settings)
    if settings.unit == HEADS:  # only the donor says how many heads there are
        return
    if settings.most > (free := total - len(fixed)):
        which = f"{settings.origin} has {free} layers that are not grafted" if fixed else f"the base has {free} layers"
        raise SurgeryError(f"max_layers is {settings.most}, but {which}. Give --max_layers {free}.")
    gains, _ = known_units(settings, total, fixed)
    space = SearchSpace(total, settings.min_layers, settings.most, gains, fixed)
    before = bounds(space, settings).before
    if settings.budget_evaluations is not None and settings.budget_evaluations <= before:
        other, first = ("larger", space.most) if settings.method in ("removal", "ratio") else ("smaller", space.least)
        raise SurgeryError(
            f"The method {settings.method} evaluates {before} {other} set{'s' * (before != 1)} before the first set of "
            f"{first} layers, but budget_evaluations is {settings.budget_evaluations}. "
            f"Give --budget_evaluations {before + 1} at least, or --method exhaustive."
        )


def _of_start(settings: SearchSettings) -> tuple[int, frozenset[int]]:
    """How many layers the checkpoint to start from has, and which of them are grafted."""
    assert settings.start is not None
    info = read_info(settings.start)
    if settings.base != SearchSettings.base:
        raise SurgeryError(f"--start {settings.start} takes the place of --base {settings.base}. Give one of them.")
    if grafted_heads(info):
        raise SurgeryError(
            f"{settings.start} has grafted heads, and a search cannot start from them yet. Remove these heads with "
            "create_replaced_model_checkpoint.py --ungraft, or start from another checkpoint."
        )
    return info["total_layers"], frozenset(info["replaced_layers"])


def _check_settings(settings: SearchSettings) -> None:
    method, least, most = settings.method, settings.min_layers, settings.most
    if settings.unit == HEADS and method in ("removal", "ratio"):
        raise SurgeryError(
            f"The method {method} begins with all layers and removes single layers. It does not work with heads. "
            "Choose another --method, such as beam, or leave out --unit heads."
        )
    if settings.unit == HEADS and (least > 1 or settings.max_layers is not None):
        raise SurgeryError(
            "min_layers and max_layers count whole layers, but unit is heads. Leave them out. "
            "--max_heads N limits the heads."
        )
    if settings.unit != HEADS and (settings.max_heads is not None or settings.keep_mixer_heads):
        raise SurgeryError("max_heads and keep_mixer_heads are for heads, but unit is layers. Give --unit heads.")
    if method == "singles" and least > 1:
        raise SurgeryError(
            f"The method singles tries one layer at a time, but min_layers is {least}. Choose another --method."
        )
    if (method == "ratio") != (settings.second_task is not None):
        raise SurgeryError(
            f"The method is {method}, and second_task is {settings.second_task}: ratio needs a second task, the others "
            "take none. Give --method ratio with --task RECALL --second_task COMMON, or leave out --second_task."
        )
    if least > most:
        raise SurgeryError(f"min_layers is {least}, but max_layers is only {most}. Give a larger --max_layers.")
    if (settings.max_cache_bytes is None) != (settings.at_tokens is None):
        raise SurgeryError("A cache grows with the tokens. Give both --max_cache_bytes and --at_tokens, or neither.")
    if settings.objective == KL and settings.donor is None:
        raise SurgeryError("The objective kl compares predictions with the donor's. Name the donor by --donor.")
    if settings.donor is None and settings.llama_layers_dir is None:
        raise SurgeryError("No donor is named. Name it by --donor, or its extracted layers by --llama_layers_dir.")


def check_output(folder: Path) -> None:
    """Refuse an output folder that has links, or that has files but none of a search."""
    if folder.exists() and not folder.is_dir():
        raise SurgeryError(f"{folder} is a file. Give a folder as --output_dir.")
    inside = {path.name for path in without_links(folder.resolve()).iterdir()} if folder.is_dir() else set()
    if inside and not inside & {JOURNAL, RESULT, DONOR_LAYERS}:
        raise SurgeryError(
            f"{folder} holds other files ({', '.join(sorted(inside)[:3])}) and no {JOURNAL} of a search. "
            "Choose another --output_dir."
        )


def check_earlier(folder: Path, asked: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to replace the result of another search.

    Args:
        folder: the output folder.
        asked: what the result depends on, by the key under which search_result.json records it.
    """
    path = folder / RESULT
    if not path.is_file():
        return
    try:
        found = read_json(path)
        differing = [each for part in asked for each in differences(found.get(part, {}), asked[part])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{path} cannot be read as a search's result ({error}), and this search would replace it. Choose another "
            "--output_dir, or add --overwrite."
        ) from error
    if differing:
        raise SurgeryError(
            f"{folder} has the result of another search, which would be replaced. They differ: {'; '.join(differing)}. "
            "Choose another --output_dir, or add --overwrite. (The journal keeps the evaluations of both searches, so "
            "none is made again.)"
        )


def has_donor_layers(settings: SearchSettings, *, overwrite: bool) -> bool:
    """Whether the output folder has the donor's layers already.

    Raises:
        SurgeryError: if the folder has the layers of another donor, and `overwrite` is false.
    """
    folder = settings.folder / DONOR_LAYERS
    if not (folder / METADATA).is_file():
        return False
    assert settings.donor is not None
    there, donor = LayerStore(folder), ModelLayers(resolve(settings.donor, overrides=settings.sources))
    asked = digest_of_layers(donor, range(donor.config.num_hidden_layers))
    odd = differences({"layer": digest_of_layers(there, there.layers)}, {"layer": asked})
    if odd and not overwrite:
        raise SurgeryError(
            f"The layers in {folder} are not those that {settings.donor} has now: {'; '.join(odd[:3])}"
            f"{', ...' * (len(odd) > 3)}. Choose another --output_dir, or add --overwrite."
        )
    return not odd


def known_units(
    settings: SearchSettings,
    total: int,
    fixed: Collection[int],
    units: Units = WHOLE_LAYERS,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[int, float], list[int]]:
    """Read the prior file: the gains of single units, by unit, and the units to try first.

    Units in the layers of `fixed` are left out. `say` gets a line about failures left out, or about heads to try first.

    Raises:
        SurgeryError: if the file cannot be read, or names a layer or head that does not exist.
    """
    if settings.prior is None:
        return {}, []
    if units.heads:
        return _known_heads(Path(settings.prior), total, fixed, units, say)
    scores, left_out = read_single_layers(Path(settings.prior))
    if left_out:
        say(
            f"{left_out} of {left_out + len(scores)} single layers in {settings.prior} are left out: "
            "their score is 0, which older programs gave to failed evaluations"
            + (". So this search evaluates the single layers itself" if len(scores) < total else "")
        )
    outside = [layer for layer in scores if layer >= total]
    if outside:
        raise SurgeryError(
            f"{settings.prior} has a score for layer {outside[0]}, but the base has {total} layers. "
            "The file is for another model: give another --prior."
        )
    return {layer: gain for layer, gain in _gains(scores).items() if layer not in fixed}, []


def _known_heads(
    prior: Path, total: int, fixed: Collection[int], units: Units, say: Callable[[str], None]
) -> tuple[dict[int, float], list[int]]:
    scores, listed = read_heads(prior)
    for layer, head in (*scores, *listed):
        if layer >= total or head >= units.heads:
            raise SurgeryError(
                f"{prior} names head {layer}:{head}, but there are {total} layers of {units.heads} heads, "
                "counted from 0. Mend that entry, or give another --prior."
            )
    number = {(layer, head): layer * units.heads + head for layer, head in (*scores, *listed) if layer not in fixed}
    gains = _gains({number[each]: score for each, score in scores.items() if each in number})
    seeds = [number[each] for each in dict.fromkeys(listed) if each in number]
    if listed:
        say(f"Tried first  {' '.join(map(str, units.written(tuple(seeds))))}, as listed in {prior}")
    return gains, seeds


def _gains(scores: Mapping[int, float]) -> dict[int, float]:
    """Scores minus their mean, as gains. The mean takes the place of the base's score, which is not known."""
    middle = sum(scores.values()) / max(len(scores), 1)
    return {unit: score - middle for unit, score in sorted(scores.items())}
