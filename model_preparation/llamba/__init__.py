"""The model for Hugging Face's transformers: `LlambaConfig`, `LlambaForCausalLM`, `LlambaModel` and `LlambaCache`.

The model's files use relative imports (`from .mixer import ...`), because `--format hf` copies them into checkpoints.
The first use of one of these classes imports and registers the model. lazy_registration.py says when an
import of torch or transformers registers it.
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
