"""The model, in Hugging Face's shape: `LlambaConfig`, `LlambaForCausalLM`, and the cache they share.

Importing it tells transformers what `model_type: llamba` is and torch which classes a `model.pt` of ours may contain.
The files the model is made of import each other relatively: checkpoints for Hugging Face carry copies of them.
"""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model_preparation.llamba.cache_llamba import LlambaCache
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM, LlambaModel
from model_preparation.llamba.safe_globals import SAFE_GLOBALS

AutoConfig.register("llamba", LlambaConfig, exist_ok=True)
AutoModel.register(LlambaConfig, LlambaModel, exist_ok=True)
AutoModelForCausalLM.register(LlambaConfig, LlambaForCausalLM, exist_ok=True)
# So that `save_pretrained` puts the model's files into the folder, which then opens without this package too.
LlambaConfig.register_for_auto_class()
LlambaModel.register_for_auto_class("AutoModel")
LlambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
torch.serialization.add_safe_globals(SAFE_GLOBALS)

__all__ = ["LlambaCache", "LlambaConfig", "LlambaForCausalLM", "LlambaModel"]
