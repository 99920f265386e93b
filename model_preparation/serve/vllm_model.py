"""A Llamba for vLLM. Grafted layers are vLLM's own. Mamba layers are ours; their states are in vLLM's cache.

vLLM gives the tokens of all running requests in one row: first one token of each request that is being answered, then
the tokens of prompts, whole or in pieces. Each request has its states in one slot of the cache, and vLLM chooses the
slot. The parameters have the checkpoint's names, except those that vLLM joins. The code is the same for every
device: on CUDA, `scan` uses the kernel of flash-linear-attention if that is installed (llamba/ssd.py). This
file was run on CPUs only.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator, MambaStateDtypeCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.mixer import LlambaMixer
from model_preparation.llamba.modeling_llamba import BLOCK_NORM_EPS


def state_shapes(config: LlambaConfig) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """The shapes of what one Mamba layer caches for a request: the convolution's last inputs, and the state.

    They are (d_conv - 1, channels) and (heads, head dimension, d_state).
    """
    ssm = config.ssm_cfg
    channels = config.d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    heads = ssm["n_v_heads"]
    return (ssm["d_conv"] - 1, channels), (heads, config.d_inner // heads, ssm["d_state"])


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the two tensors in `state_shapes`."""
    cache = vllm_config.cache_config
    return MambaStateDtypeCalculator.mamba2_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    )


class ServedMixer(LlambaMixer, MambaBase):
    """Our Mamba mixer, for vLLM's row of tokens."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        config = vllm_config.model_config.hf_config
        super().__init__(config, layer_idx=int(prefix.split(".")[-2]))
        self._prefix = prefix
        self._state_shapes, self._state_dtypes = state_shapes(config), state_dtypes(vllm_config)
        self.kv_cache = (torch.empty(0), torch.empty(0))  # vLLM puts its own here
        vllm_config.compilation_config.static_forward_context[prefix] = self  # vLLM looks here for layers with a cache

    def get_state_shape(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        return self._state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self._state_dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of metadata that vLLM gives about the row. SHORT_CONV has only the fields that every Mamba needs."""
        return MambaAttentionBackendEnum.SHORT_CONV

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Mix the tokens of each request, and update the request's states in the cache.

        Args:
            hidden_states: (tokens, d_model), the tokens of all requests.

        Returns:
            (tokens, d_model) in the same dtype.
        """
        row = get_forward_context().attn_metadata
        if row is None:  # vLLM measures how much memory a full row takes; there is no cache yet
            return super().forward(hidden_states.unsqueeze(0)).squeeze(0)
        row = row[self._prefix]
        xBC, z, a = self.in_proj(hidden_states).split([self.conv_dim, self.d_inner, self.n_v_heads], dim=-1)
        parts = []
        decoded = row.num_decode_tokens
        if decoded:  # one token of each request
            slots = row.state_indices_tensor_d[:, 0].long()
            parts.append(self._continue(xBC[:decoded].unsqueeze(1), a[:decoded].unsqueeze(1), slots, True))
        if row.num_prefills:
            slots = row.state_indices_tensor_p.long()
            bounds = (row.query_start_loc_p + decoded).tolist()
            for i, continues in enumerate(row.has_initial_states_p.tolist()):
                tokens = slice(bounds[i], bounds[i + 1])
                of_one = xBC[tokens].unsqueeze(0), a[tokens].unsqueeze(0)
                parts.append(self._continue(*of_one, slots[i : i + 1], continues))
        y = torch.cat([part.flatten(0, 1) for part in parts])
        y = F.pad(y, (0, 0, 0, len(z) - len(y)))  # a row may end in padding, which belongs to no request
        return self._gated(y, z, hidden_states.dtype)

    def _continue(self, xBC: Tensor, a: Tensor, slots: Tensor, continues: bool) -> Tensor:
        """Run convolution and recurrence over the next tokens of requests, and update their states in the cache.

        Args:
            xBC: (requests, length, conv_dim).
            a: (requests, length, H).
            slots: (requests,), the requests' slots in the cache.
            continues: whether the slots hold the states of these requests. If not, the slots may hold old states of
                other requests, and these requests begin with empty states.

        Returns:
            (requests, length, d_inner), float32 or wider.
        """
        inputs, states = self.kv_cache
        if continues:
            # vLLM keeps d_conv - 1 inputs. Our own cache has one more, which is never read.
            before, state = F.pad(inputs[slots].to(xBC.dtype), (0, 0, 1, 0)), states[slots]
        else:
            before, state = self._zero_inputs(xBC), None
        y, before, state = self._recur(xBC, a, before, state)
        inputs[slots], states[slots] = before[:, 1:].to(inputs.dtype), state.to(states.dtype)
        return y


class ServedMambaLayer(nn.Module):
    """A Mamba block: norm, mixer, residual; norm, gated MLP, residual. As in vLLM, the residual is a second output."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        mlp = config.mlp_cfg
        self.mixer = ServedMixer(vllm_config, f"{prefix}.mixer")
        self.input_layernorm = RMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.mlp = LlamaMLP(
            config.d_model, mlp["intermediate_size"], mlp["act_fn"], bias=mlp["bias"], prefix=f"{prefix}.mlp"
        )

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states, residual = self.post_attention_layernorm(self.mixer(hidden_states), residual)
        return self.mlp(hidden_states), residual


class ServedBackbone(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        llama_config = config.llama_config() if config.llama_layers else None
        self.embedding = VocabParallelEmbedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(vllm_config, f"{prefix}.layers.{index}", llama_config)
            if kind == "full_attention"
            else ServedMambaLayer(vllm_config, f"{prefix}.layers.{index}")
            for index, kind in enumerate(config.layer_types)
        )
        self.final_layernorm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        for index in config.llama_layers:
            backend = self.layers[index].self_attn.attn.attn_backend
            if not backend.supports_head_size(config.head_dim):  # vLLM itself would fail at the first request
                raise ValueError(
                    f"The grafted layers have heads of size {config.head_dim}. vLLM's attention here, "
                    f"{backend.get_name()}, takes {', '.join(map(str, backend.get_supported_head_sizes()))} only. "
                    "Serve the model with --engine transformers."
                )

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.final_layernorm(hidden_states, residual)[0]


class ServedLlamba(nn.Module, HasInnerState, IsHybrid):
    """A Llamba with its head, with the interface that vLLM needs for a model with two kinds of layer."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper  # vLLM joins q, k and v, and joins gate and up

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int], tuple[int, int, int]]:
        return state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.backbone = ServedBackbone(vllm_config, maybe_prefix(prefix, "backbone"))
        self.lm_head = ParallelLMHead(
            config.padded_vocab_size, config.d_model, bias=config.lm_head_bias, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.backbone.embedding)
        # Cut off the logits that only pad the vocabulary, so that no sampler can choose them.
        self.logits_processor = LogitsProcessor(config.padded_vocab_size, config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.backbone.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.backbone(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
