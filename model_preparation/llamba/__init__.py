"""The model for Hugging Face's transformers: `LlambaConfig`, `LlambaForCausalLM`, `LlambaModel` and `LlambaCache`.

The model's files import each other relatively, because folders of format hf hold copies of them. The first use of a
class from here imports and registers the model. So a command can import one file of this folder without the model.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_preparation.llamba.cache_llamba import LlambaCache
    from model_preparation.llamba.configuration_llamba import LlambaConfig
    from model_preparation.llamba.modeling_llamba import LlambaForCausalLM, LlambaModel

_MODULE_OF = {
    "LlambaCache": "cache_llamba",
    "LlambaConfig": "configuration_llamba",
    "LlambaForCausalLM": "modeling_llamba",
    "LlambaModel": "modeling_llamba",
}
__all__ = ["LlambaCache", "LlambaConfig", "LlambaForCausalLM", "LlambaModel"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.registration")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
