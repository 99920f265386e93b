"""Reads the results of searches: our search_result.json, and JSON files of older programs. These keys are known:

final_results, results, top_combinations   a list of objects, or an object with an entry for each combination
in such an object   layers, combination, layer_indices or individual; fitness, score, accuracy or mmlu_score
best_layers or best_individual, with best_fitness or best_score   a single combination
single_layer_results   {"11": 0.51}, {"11": {"score": 0.51}}, or a list of objects

Results of a search over heads have heads, such as ["13:16", "13:17"], and single_head_results.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.command_line import heads_of_layer
from model_preparation.errors import SurgeryError
from model_preparation.io.text import decode
from model_preparation.io.untrusted.untrusted_files import parse_json, regular_file
from model_preparation.search.layer_sets import LayerSet, names_of, normal
from model_preparation.search.settings import ACCURACY

RESULT = "search_result.json"
_LISTS = ("final_results", "results", "top_combinations")
_LAYERS = ("layers", "combination", "layer_indices", "individual", "best_layers", "best_individual")
_SCORES = ("fitness", "score", "accuracy", "mmlu_score", "best_fitness", "best_score")
_SINGLES, _SINGLE_HEADS = "single_layer_results", "single_head_results"
_LAYER = ("layer", "layer_idx", "layer_index", *_LAYERS)


@dataclass(frozen=True)
class Found:
    """A combination in a result file: of whole layers, or of heads as --heads takes them, such as "13:16,17 15:11".

    `score` is None if the file has no score for it.
    """

    layers: LayerSet
    score: float | None
    heads: str = ""


@dataclass(frozen=True)
class ReadResult:
    """A result file.

    Attributes:
        entries: the combinations, the best first, without repeats.
        failures: how many entries were left out. Older programs gave failed evaluations the score 0.
        is_mmlu: whether the scores are of the whole MMLU, as in all older programs.
        objective: the search's objective; "score" for older programs.
        base, donor, llama_layers_dir, tokenizer, keep_mixer_heads: the search's settings, if the file is ours.
    """

    entries: list[Found]
    failures: int
    is_mmlu: bool = True
    objective: str = "score"
    base: str | None = None
    donor: str | None = None
    llama_layers_dir: str | None = None
    tokenizer: str | None = None
    keep_mixer_heads: bool = False


def read_result(path: Path) -> ReadResult:
    """The combinations in a result file.

    Raises:
        SurgeryError: if there is no such file, or no combinations can be read from it.
    """
    content = _read(path)
    found: dict[tuple[LayerSet, str], Found] = {}
    given, failures = _found(content, _entries(content, path), f"{path}, entry")
    for one in given:
        which = one.layers, one.heads
        if which not in found or _rank(one) < _rank(found[which]):
            found[which] = one
    if not found:
        raise SurgeryError(f"{path} has no combination with a score above 0. Give the result of another search.")
    ranked = sorted(found.values(), key=_rank)
    if not _is_ours(content):
        return ReadResult(ranked, failures)
    settings = content["settings"]
    try:
        return ReadResult(
            ranked,
            failures,
            is_mmlu=content["objective"] == ACCURACY and settings["tasks"] == ["mmlu"] and settings["limit"] is None,
            objective=str(content["objective"]),
            base=content["base"],
            donor=content.get("donor"),
            llama_layers_dir=content["llama_layers_dir"],
            tokenizer=content["tokenizer"],
            keep_mixer_heads=settings.get("keep_mixer_heads", False),
        )
    except KeyError as error:
        raise SurgeryError(f"{path} lacks {error}, which a {RESULT} has. Run the search's command again.") from error


def read_single_layers(path: Path) -> tuple[dict[int, float], int]:
    """The scores of single layers, by layer; and how many layers were left out because their evaluation failed.

    Raises:
        SurgeryError: if there is no such file, or it has no single layers.
    """
    content = _read(path)
    singles = _as_list(content.get(_SINGLES))
    if not singles:
        raise SurgeryError(
            f'{path} has no {_SINGLES}, such as {{"{_SINGLES}": {{"11": 0.51, ...}}}}. Give another file by --prior.'
        )
    found, left_out = _found(content, singles, f"{path}, {_SINGLES}, entry", are_single=True)
    if not found:
        raise SurgeryError(f"{path} has no single layer with a score above 0. Give another file by --prior.")
    return {one.layers[0]: one.score for one in found if one.score is not None}, left_out


def read_heads(path: Path) -> tuple[dict[tuple[int, int], float], list[tuple[int, int]]]:
    """The heads in a file: (scores by (layer, head), []) for a search's result, ({}, heads in order) for a list.

    A list is text with names like 13:16 or 13:16,17, and comments after #; or a JSON list of such names.

    Raises:
        SurgeryError: if there is no such file, or it has no heads.
    """
    data = _bytes(path)
    known: list[Any] = []
    try:
        text = decode(data).lstrip()
        words = [word for line in text.splitlines() for word in line.partition("#")[0].split()]
        if text[:1] in ("[", "{"):
            content = parse_json((f'{{"list": {text}}}' if text[0] == "[" else text).encode())
            known = _as_list(content.get(_SINGLE_HEADS))
            words = [each["layers"] for each in known] or _as_list(content.get("list"))
        heads = [(layer, head) for layer, of_layer in map(heads_of_layer, map(str, words)) for head in of_layer]
        scores = [_score(each) for each in known]
        if known:
            return {head: score for head, score in zip(heads, scores, strict=True) if score is not None}, []
    except (ValueError, KeyError, TypeError, argparse.ArgumentTypeError) as error:
        raise SurgeryError(f"{path} is no list of heads: {error}. Mend it, or give another --prior.") from error
    if not heads:
        raise SurgeryError(
            f"{path} has no heads: it needs names like 13:16, one a line, or a search's {_SINGLE_HEADS}. Give another "
            "file by --prior."
        )
    return {}, heads


def _found(
    content: dict[str, Any], entries: list[Any], place: str, *, are_single: bool = False
) -> tuple[list[Found], int]:
    """The combinations in `entries`, and how many were left out: older programs scored failed evaluations 0."""
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            heads = _heads(entry)
            one = Found(() if heads else _layers(entry), _score(entry), heads)
            if are_single and (len(one.layers) != 1 or one.score is None):
                raise ValueError("it is not one layer with a score")
        except ValueError as error:
            raise SurgeryError(f"{place} {number}: {error}. Mend or remove that entry.") from error
        found.append(one)
    kept = found if _is_ours(content) else [one for one in found if one.score != 0]
    return kept, len(found) - len(kept)


def _is_ours(content: dict[str, Any]) -> bool:
    return isinstance(content.get("settings"), dict) and isinstance(content.get("statistics"), dict)


def _read(path: Path) -> dict[str, Any]:
    data = _bytes(path)
    try:
        return parse_json(b'{"%s": %s}' % (_LISTS[0].encode(), data) if data.lstrip()[:1] == b"[" else data)
    except ValueError as error:
        raise SurgeryError(
            f"{path} is not JSON ({error}). Give the {RESULT} of a search; a list of heads needs --unit heads."
        ) from error


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise SurgeryError(f"{path} is a folder. Give the result file in it, such as {path / RESULT}.")
    if not path.exists():
        raise SurgeryError(f"{path} is not there. Give the {RESULT} of a search, or an older program's result file.")
    return regular_file(path).read_bytes()


def _rank(one: Found) -> float:
    return math.inf if one.score is None else -one.score


def _as_list(given: Any) -> list[Any]:
    """`given` as a list of entries. Of an object, each key and value become one entry; the key names the layers."""
    if isinstance(given, dict):
        return [{"layers": key, **(each if isinstance(each, dict) else {"score": each})} for key, each in given.items()]
    return given if isinstance(given, list) else []


def _entries(content: dict[str, Any], path: Path) -> list[Any]:
    """The list of combinations, under any of its names."""
    for name in _LISTS:
        if entries := _as_list(content.get(name)):
            return entries
    if any(content.get(name) is not None for name in _LAYERS):
        return [content]
    empty = [name for name in _LISTS if content.get(name) in ([], {})]
    if empty:
        raise SurgeryError(f"{path} has no combination: its {empty[0]} is empty. Give the result of another search.")
    keys = ", ".join(sorted(content)[:6])
    raise SurgeryError(
        f"{path} has no list of combinations: it needs {' or '.join(_LISTS)}, but has {keys or 'nothing'}. "
        'Bring it into this shape: {"final_results": [{"layers": [11, 13], "fitness": 0.57}]}.'
    )


def _heads(entry: Any) -> str:
    """An entry's heads as --heads takes them; "" if it has none. Raises ValueError if they are malformed."""
    given = entry.get("heads") if isinstance(entry, dict) else None
    if given is None:
        return ""
    if not isinstance(given, list) or not given or not all(isinstance(each, str) for each in given):
        raise ValueError(f'its heads are {given!r:.80}, but should be like ["13:16", "15:11"]')
    try:
        return names_of(given)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def _layers(entry: Any) -> LayerSet:
    """An entry's layers. Raises ValueError if it has none."""
    given = entry
    if isinstance(entry, dict):
        given = next((entry[name] for name in _LAYER if entry.get(name) is not None), None)
    if isinstance(given, str):
        given = given.removeprefix("layer_").strip("[]() ").replace(",", " ").replace("_", " ").split()
    if isinstance(given, (int, float)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise ValueError(f"it has no layers ({' or '.join(_LAYERS[:4])}), but {given!r:.80}")
    layers = []
    for each in given:
        if isinstance(each, bool) or not str(each).isdecimal():
            raise ValueError(f"{each!r:.80} is no layer's index")
        layers.append(int(each))
    if len(set(layers)) != len(layers):
        raise ValueError(f"a layer is in {layers} more than once")
    return normal(layers)


def _score(entry: Any) -> float | None:
    """An entry's score, or None. Raises ValueError if the score is no number."""
    if not isinstance(entry, dict):
        return None
    given = next((entry[name] for name in _SCORES if entry.get(name) is not None), None)
    if given is None:
        return None
    if isinstance(given, (list, tuple)) and len(given) == 1:  # DEAP's fitness values
        given = given[0]
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise ValueError(f"its score {given!r:.80} is no number")
    return float(given)
