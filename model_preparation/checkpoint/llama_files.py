"""A Llama's weights by the names they have in LlamaForCausalLM, whichever class they were saved from.

In: the folder of a LlamaForCausalLM, of a LlamaModel, which has no head, or of a multimodal model whose text part is a
Llama. Out: its tensors, without those of the other parts.
"""

from pathlib import Path
from typing import Any

from model_preparation.checkpoint.model_configs import read_config
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange
from model_preparation.io.untrusted.untrusted_files import read_json

HEAD = "lm_head.weight"

_PREFIX = "model."
# What names begin with in other classes: LlamaModel, LLaVA as it is published, today's multimodal models, SmolVLM.
_OTHER_PREFIXES = ("", "language_model.model.", "model.language_model.", "model.text_model.", "language_model.")
_OTHER_HEAD = f"language_model.{HEAD}"


class LlamaFiles(TensorFiles):
    """Tensors of the Llama in `folder`, by their names in LlamaForCausalLM.

    Raises:
        SurgeryError: as `TensorFiles`.
    """

    def _locate(self) -> dict[str, TensorRange]:
        found = super()._locate()
        prefixes = (_PREFIX, *_OTHER_PREFIXES)
        prefix = next((each for each in prefixes if f"{each}layers.0.input_layernorm.weight" in found), _PREFIX)
        if prefix == _PREFIX:
            return found
        renamed = {}
        for name, place in found.items():
            if name in (HEAD, _OTHER_HEAD):
                renamed[HEAD] = place
            elif name.startswith(prefix):
                renamed[_PREFIX + name[len(prefix) :]] = place
        return renamed


def text_part(folder: Path) -> dict[str, Any]:
    """The `config` and `state_dict` for `from_pretrained`, of the Llama in a multimodal model; empty for any other."""
    text = read_json(folder / "config.json").get("text_config")
    if not isinstance(text, dict) or text.get("model_type") != "llama":
        return {}
    config, files = read_config(folder), LlamaFiles(folder)
    return {"config": config, "state_dict": {name: files[name] for name in files.names()}}


def without_head(folder: Path) -> SurgeryError:
    """The error for a model that has to predict tokens and was saved from LlamaModel."""
    return SurgeryError(
        f"{folder} has no {HEAD}: it was saved without its head, as LlamaModel is. Its layers can be extracted, but it "
        "predicts no tokens. Give the folder of the whole model, saved from LlamaForCausalLM."
    )
