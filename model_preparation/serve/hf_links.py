"""Turns a checkpoint of format pt into a folder that servers can open, with links in place of copies.

The folder is NAME-hf, next to the checkpoint. It has config.json, the tokenizer, and a link to model_state_dict.pt with
the name that transformers looks for. Where links are impossible, files are copied (io/linked_files.py).
Each start makes the folder again: links take no time.
"""

from pathlib import Path

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, TOKENIZER, formats_of, read_info
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.linked_files import share_file
from model_preparation.io.tensors.sharded_weights import load_tensors
from model_preparation.io.untrusted.not_a_model import what_it_is

_MARKER = "served_from.json"
_WEIGHTS = "pytorch_model.bin"


def hf_folder(checkpoint: Path) -> Path:
    """The folder to serve: the checkpoint itself if it has format hf or both, otherwise a folder of links next to it.

    Raises:
        SurgeryError: if the checkpoint is not complete, if a folder that is not ours has the name NAME-hf,
            or if the weights were saved from a wrapped model.
    """
    info = read_info(checkpoint)
    checkpoint = checkpoint.resolve()
    if "hf" in formats_of(info):
        return checkpoint
    for needed in (checkpoint / STATE_DICT, checkpoint / TOKENIZER):
        if not needed.exists():
            raise SurgeryError(what_it_is(checkpoint) or f"{needed} is missing. Build the checkpoint again.")
    target = checkpoint.with_name(f"{checkpoint.name}-hf")
    if target.exists() and not (target / _MARKER).is_file():
        raise SurgeryError(
            f"{target} is in the way: a folder of links to the weights needs this name. Move it elsewhere."
        )
    for name in load_tensors(checkpoint / STATE_DICT, "Build the checkpoint again."):
        if not name.startswith(("backbone.", "lm_head.")):
            raise SurgeryError(
                f"{checkpoint / STATE_DICT} was saved from a wrapped model ({name}), which servers do not open. "
                "Build the checkpoint again."
            )
    with new_folder(target, overwrite=True, marker_file=_MARKER) as staging:
        share_file((checkpoint / STATE_DICT).resolve(), staging / _WEIGHTS)
        for path in (checkpoint / TOKENIZER).iterdir():
            share_file(path.resolve(), staging / path.name)
        write_json(staging / "config.json", {**info["config"], "architectures": ["LlambaForCausalLM"]})
        write_json(staging / "generation_config.json", info["generation_config"])
        write_json(staging / _MARKER, {"checkpoint": checkpoint.name, "links_to": STATE_DICT, "info": INFO})
    return target
