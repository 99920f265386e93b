"""The classes in our `model.pt` files, for `torch.load`'s default `weights_only=True`.

`torch.serialization.add_safe_globals(SAFE_GLOBALS)` lets the unpickler build only these. torch refuses a file with any
other class or function.
"""

from torch import nn
from transformers import GenerationConfig, LlamaConfig
from transformers.activations import ACT2CLS
from transformers.models.llama import modeling_llama

from model_preparation.llamba import modeling_llamba
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.mixer import CausalConv1d, LlambaMixer

_ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}

SAFE_GLOBALS = [
    LlambaConfig,
    modeling_llamba.LlambaForCausalLM,
    modeling_llamba.LlambaModel,
    modeling_llamba.LlambaDecoderLayer,
    LlambaMixer,
    CausalConv1d,
    LlamaConfig,
    GenerationConfig,
    modeling_llama.LlamaDecoderLayer,
    modeling_llama.LlamaAttention,
    modeling_llama.LlamaMLP,
    modeling_llama.LlamaRMSNorm,
    modeling_llama.LlamaRotaryEmbedding,
    nn.Conv1d,  # in files of version 0.1
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    *(cls for cls in _ACTIVATIONS if isinstance(cls, type)),
]
