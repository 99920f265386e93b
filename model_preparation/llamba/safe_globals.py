"""The classes in our `model.pt` files, for `torch.load`'s default `weights_only=True`.

`torch.serialization.add_safe_globals(SAFE_GLOBALS)` adds these classes to those that torch itself allows. torch refuses
a file with any other class or function.
"""

from torch import nn
from transformers import GenerationConfig
from transformers.activations import ACT2CLS

from model_preparation.llamba import modeling_llamba
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.llamba.head_attention import HeadAttention
from model_preparation.llamba.mixer import CausalConv1d, LlambaMixer

_DONOR_CLASSES = ("Config", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}

SAFE_GLOBALS = [
    LlambaConfig,
    modeling_llamba.LlambaForCausalLM,
    modeling_llamba.LlambaModel,
    modeling_llamba.LlambaDecoderLayer,
    LlambaMixer,
    CausalConv1d,
    HeadAttention,
    GenerationConfig,
    *(kind.transformers_class(name) for kind in KINDS.values() for name in _DONOR_CLASSES),
    nn.Conv1d,  # in files of version 0.1
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    *(cls for cls in _ACTIVATIONS if isinstance(cls, type)),
]
