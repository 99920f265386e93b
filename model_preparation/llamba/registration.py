"""Importing this module registers `model_type: llamba` with transformers, and the classes of a `model.pt` with torch.

lazy_registration.py imports it for Python users. Commands import it only if they need the model: it takes two seconds.
"""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM, LlambaModel
from model_preparation.llamba.safe_globals import SAFE_GLOBALS

AutoConfig.register("llamba", LlambaConfig, exist_ok=True)
AutoModel.register(LlambaConfig, LlambaModel, exist_ok=True)
AutoModelForCausalLM.register(LlambaConfig, LlambaForCausalLM, exist_ok=True)
# After this, `save_pretrained` copies the model's code into the folder. The folder then opens without this
# package too.
LlambaConfig.register_for_auto_class()
LlambaModel.register_for_auto_class("AutoModel")
LlambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
torch.serialization.add_safe_globals(SAFE_GLOBALS)
