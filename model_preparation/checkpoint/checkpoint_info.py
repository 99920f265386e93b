"""The names of the files in a checkpoint's folder, and the reader of checkpoint_info.json, which describes them.

checkpoint_folder.py writes checkpoint_info.json. This module reads and checks it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from model_preparation.command_line import heads_text
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import TABLE, check_recorded, donors_of
from model_preparation.io.digests import FILE_FIELDS
from model_preparation.io.tensors.dtypes import MODEL_DTYPES
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.untrusted_files import check_fields, read_json

FORMAT_VERSION = 1
FORMATS = {"pt": 2, "hf": 1, "both": 3}  # copies of the weights in each format
INFO = "checkpoint_info.json"
MODULE = "model.pt"
STATE_DICT = "model_state_dict.pt"
README = "README.txt"
TENSOR_DIGESTS = "tensor_digests.json"
TOKENIZER = "tokenizer"
EVALUATIONS = "evaluations"  # a folder of results
HEALED = "healed"  # in tensor_digests.json, the origin of trained tensors
EVALUATIONS_ASIDE = ".of-weights-"  # in names of folders with results of earlier weights

_SCORE = (int, float, NoneType)
_INFO_FIELDS = {  # in the notation of `check_fields`
    "replaced_layers": [int],
    "total_layers": int,
    "config": {"donor_type?": str, "mlp_cfg?": {"act_fn?": str}, "llama_cfg?": {"hidden_act?": str}},
    "generation_config": dict,
    "files": {"*": FILE_FIELDS},
    "digests?": {"weights?": str, "tokenizer?": str, "donor_layers?": {"*": str}},
    "base_model?": {"name?": str, "files": {"*": {"*": (str, int)}}},
    "replacement_source?": {"name?": str, "layers": {"*": str}},
    "other_donors?": [{"name?": str, "layers": {"*": str}}],
    "tokenizer_source?": (NoneType, dict),
    "parameters?": int,
    "num_replaced_layers?": int,
    "grafted_heads?": {"*": [int]},
    "keep_mixer_heads?": bool,
    "num_heads?": int,
    "head_dim?": int,
    "dtype?": str,
    "format?": str,
    "creation_time?": str,
    "description?": (str,),
    "versions?": {"*": str},
    "mmlu_score?": _SCORE,
    "mmlu_result?": {
        "score": (int, float),
        "stderr": _SCORE,
        "questions": int,
        "model?": dict,
        "lm_eval_version": str,
        "date?": str,
        "settings": {"limit?": (int, NoneType), "num_fewshot?": (int, NoneType)},
    },
    "descent?": [
        {
            "from": {"id": str, "tensor_digests_sha256?": str},
            "grafted?": [int],
            "grafted_heads?": {"*": [int]},
            "ungrafted?": [int],
            "donors?": [str],
            "healed?": str,
        }
    ],
    "parent?": {"id": str, "tensor_digests_sha256": str},
    "healing?": {
        "method": str,
        "steps": int,
        "scores": {"before": {"eval_loss": _SCORE}, "after": {"eval_loss": _SCORE}},
        "texts?": [{"prompt": (str,), "before": (str,), "after": (str,)}],
    },
}


def formats_of(info: Mapping[str, Any]) -> set[str]:
    """The formats of a checkpoint's weights: "pt", "hf", or both."""
    return {"pt", "hf"} if info.get("format") == "both" else {str(info.get("format", "pt"))}


def grafted_heads(info: Mapping[str, Any]) -> dict[int, list[int]]:
    """The grafted heads in a checkpoint_info.json, by layer.

    Raises:
        ValueError: if a layer's index is no number.
    """
    return {int(index): heads for index, heads in info.get("grafted_heads", {}).items()}


def descent_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps from the base to a checkpoint, in order. A step grafts, undoes grafts, or heals."""
    if "descent" in info:
        return list(info["descent"])
    steps: list[dict[str, Any]] = [
        {
            "from": {"id": info["base_model"]["id"]},
            "grafted": info["replaced_layers"],
            **({"grafted_heads": info["grafted_heads"]} if "grafted_heads" in info else {}),
            "donors": [donor["id"] for donor in donors_of(info)],
        }
    ]
    if "healing" in info:
        steps.append({"from": info["parent"], "healed": info["healing"]["method"]})
    return steps


def is_healed(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint or a parent of it was healed. Then base and donors are not enough to build it again."""
    return "healing" in info or any("healed" in step for step in info.get("descent", []))


def needs_parent(info: Mapping[str, Any]) -> bool:
    """Whether building a checkpoint again needs its parent, not only base and donors.

    The parent is needed after healing. It is also needed if no layer of the first donor is left: that donor may have
    given the tokenizer.
    """
    steps = info.get("descent", [])
    return is_healed(info) or (bool(steps) and steps[0].get("donors", [])[:1] != [donors_of(info)[0]["id"]])


def head_spec(info: Mapping[str, Any]) -> str:
    """The grafted heads as --heads takes them, such as 13:16,17 15:11; an empty text if there are none."""
    return heads_text(grafted_heads(info))


def current_score(info: Mapping[str, Any], weights: str) -> float | None:
    """The MMLU score in a checkpoint_info.json; None if there is none, or if it was measured on other weights.

    Args:
        weights: the digest of the present weights, from `digest_of_checkpoint` or `recorded_weights`.
    """
    measured = info.get("mmlu_result") or {}
    return info.get("mmlu_score") if measured.get("model", {}).get("weights", weights) == weights else None


def check_format(format: str) -> None:
    """Raise SurgeryError if there is no such format of checkpoints."""
    if format not in FORMATS:
        raise SurgeryError(f"{format!r} is not a format of checkpoints. Choose one of {', '.join(FORMATS)}.")


def read_info(directory: str | Path) -> dict[str, Any]:
    """Read checkpoint_info.json of a checkpoint folder.

    Raises:
        SurgeryError: if the folder is missing or not complete, or this version does not know its format.
    """
    directory = Path(directory).expanduser()
    path = directory / INFO
    if directory.is_file():
        raise SurgeryError(f"{directory} is a file. Give the checkpoint's folder, here {directory.parent}.")
    if not directory.is_dir() and str(directory) in TABLE:
        raise SurgeryError(
            f"{directory} is the name of a model, but a checkpoint's folder is needed. Build one with "
            "create_replaced_model_checkpoint.py. test_checkpoint.py also takes models."
        )
    if path.is_file():
        return read_info_file(path)
    if what := what_it_is(directory):
        raise SurgeryError(what)
    if not directory.is_dir():
        raise SurgeryError(f"Checkpoint {directory} is not there. Build it with create_replaced_model_checkpoint.py.")
    if (directory / "config.json").is_file():
        raise SurgeryError(
            f"{directory} is a model's folder, not a checkpoint: it has no {INFO}. Give a checkpoint's folder, or "
            "build one with create_replaced_model_checkpoint.py."
        )
    raise SurgeryError(f"{directory} has no {INFO}, so it is not a complete checkpoint. Build it again.")


def read_info_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint_info.json, inside a checkpoint or anywhere else.

    Raises:
        SurgeryError: if the file cannot be read, or this version does not know its format.
    """
    try:
        info = read_json(path)
        check_fields(info, {"format_version": object, **_INFO_FIELDS})
        version = info["format_version"]
        for role in ("base_model", "replacement_source", "tokenizer_source"):
            if info.get(role) is not None:
                check_recorded(info[role])
        for donor in info.get("other_donors", []):
            check_recorded(donor)
        if info.get("dtype", "float32") not in (*MODEL_DTYPES, "float64"):
            raise ValueError(f"dtype is {info['dtype']!r:.80}")
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be read ({error}). Build the checkpoint again.") from error
    if version != FORMAT_VERSION:
        raise SurgeryError(
            f"{path} has format version {version}; this program knows {FORMAT_VERSION}. Update model_preparation."
        )
    return info
