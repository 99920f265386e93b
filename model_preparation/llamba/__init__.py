"""The model, in Hugging Face's shape: `LlambaConfig`, `LlambaForCausalLM`, and the cache they share.

Importing it tells transformers what `model_type: llamba` is and torch which classes a `model.pt` of ours may contain.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model_preparation.llamba.cache_llamba import LlambaCache
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM, LlambaModel

AutoConfig.register("llamba", LlambaConfig, exist_ok=True)
AutoModel.register(LlambaConfig, LlambaModel, exist_ok=True)
AutoModelForCausalLM.register(LlambaConfig, LlambaForCausalLM, exist_ok=True)

__all__ = ["LlambaCache", "LlambaConfig", "LlambaForCausalLM", "LlambaModel"]
