"""The hybrid model: Mamba-2 blocks under upstream's parameter names, Llama decoder layers where layers were grafted.

In: token ids with an optional 2-D attention mask. Out: logits, and a `LlambaCache` that makes the next tokens cheap.
Sources: cartesia-ai/edge, cartesia_pytorch/Llamba/llamba.py for what is computed and for the parameter names;
transformers' LlamaDecoderLayer for grafted layers, used as it is.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_llamba import LlambaCache
from .configuration_llamba import LlambaConfig
from .mixer import LlambaMixer, PaddingLayout

BLOCK_NORM_EPS = 1e-5  # upstream fixes it; `norm_epsilon` is the final norm's only


class LlambaDecoderLayer(GradientCheckpointingLayer):
    """A Mamba block of a Llamba: norm, mixer, residual; norm, gated MLP, residual."""

    def __init__(self, config: LlambaConfig, layer_idx: int):
        super().__init__()
        self.mixer = LlambaMixer(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.post_attention_layernorm = LlamaRMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.mlp = LlamaMLP(config.mlp_config())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: PaddingLayout | None = None,
        past_key_values: LlambaCache | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states: (batch, length, d_model), in and out. The other arguments are named as a Llama layer's are."""
        hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), past_key_values, attention_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlambaPreTrainedModel(PreTrainedModel):
    config_class = LlambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlambaDecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012 (transformers' own declaration)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = True  # a state cannot be rolled back, so no assisted generation
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": [LlambaDecoderLayer, LlamaDecoderLayer],
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlambaMixer):
            initialization.ones_(module.D)
            if module.z_bias is not None:
                initialization.zeros_(module.z_bias)


class LlambaModel(LlambaPreTrainedModel):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.llama_config = config.llama_config() if config.llama_layers else None
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(self.llama_config, layer_idx)
            if kind == "full_attention"
            else LlambaDecoderLayer(config, layer_idx)
            for layer_idx, kind in enumerate(config.layer_types)
        )
        self.final_layernorm = LlamaRMSNorm(config.d_model, eps=config.norm_epsilon)
        self.rotary_emb = LlamaRotaryEmbedding(self.llama_config) if self.llama_config is not None else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length) int64; or `inputs_embeds`, (batch, length, d_model).
            attention_mask: (batch, past + length), 0 at padding, anywhere; it changes no real token's output.
            position_ids: (batch, length), for grafted layers; by default the number of real tokens before each.
            past_key_values: a `LlambaCache`, updated in place; made here if `use_cache` and none is given.

        Returns:
            last_hidden_state (batch, length, d_model) after the final norm, and the cache.

        Raises:
            ValueError: for a mask that is not 2-D, or a cache that is not a `LlambaCache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = LlambaCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, LlambaCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}; this model needs a LlambaCache(model.config)")

        arguments = self.layer_arguments(hidden_states, attention_mask, position_ids, past_key_values)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **arguments[kind],
                **kwargs,
            )
        if past_key_values is not None:
            past_key_values.seen_tokens += hidden_states.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )

    def layer_arguments(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlambaCache | None = None,
    ) -> dict[str, dict]:
        """What every layer is given beside hidden states and cache, by its kind; the arguments are `forward`'s."""
        causal_mask = position_embeddings = None
        if self.llama_config is not None and self.rotary_emb is not None:
            position_ids = self._positions(hidden_states, attention_mask, position_ids, past_key_values)
            # set_attn_implementation() changes the model's config only.
            self.llama_config._attn_implementation = self.config._attn_implementation
            causal_mask = create_causal_mask(
                config=self.llama_config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        common = {"position_ids": position_ids, "position_embeddings": position_embeddings}
        padding = PaddingLayout.of(attention_mask, hidden_states.shape[1])
        return {
            "linear_attention": {"attention_mask": padding, **common},
            "full_attention": {"attention_mask": causal_mask, **common},
        }

    def _positions(self, hidden_states, attention_mask, position_ids, past_key_values) -> Tensor:
        """Position of every token of the segment, (batch or 1, length): how many real tokens came before it."""
        length, device = hidden_states.shape[1], hidden_states.device
        if position_ids is not None:
            return position_ids
        if attention_mask is not None:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return torch.arange(past, past + length, device=device).unsqueeze(0)


class LlambaForCausalLM(LlambaPreTrainedModel, GenerationMixin):
    """A Llamba with its head, Llama layers grafted where `config.llama_layers` says."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.backbone = LlambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length) int64, -100 where no loss is wanted; shifted inside.
            logits_to_keep: compute logits for the last n positions only (0: all), or for these positions: (kept,) the
                same in every row, or (batch, kept) each row's own.
            Others as in [`LlambaModel`].

        Returns:
            loss (if `labels`), logits (batch, kept, vocab_size) in the weights' dtype, and the cache.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, slice(-logits_to_keep, None)]
        elif logits_to_keep.dim() == 2:
            rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            hidden_states = hidden_states[rows[:, None], logits_to_keep.to(hidden_states.device)]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        # The rows that only pad the vocabulary are cut off: no sampler can ever see them.
        logits = self.lm_head(hidden_states)[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves it to forward to make a LlambaCache

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """`GenerationMixin.generate`, with prompts padded on either side.

        Transformers reads the next token off the last column, which in a right-padded batch is padding. The prompts are
        moved to the right for the run; the sequences returned start with them as they were given.

        Raises:
            ValueError: if a cache is continued and the last column of the mask is padding.
        """
        prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask[:, -1].all()):
            return super().generate(prompts, *args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("attention_mask ends in padding: pad on the left when continuing from a cache")
        order = mask.bool().int().argsort(dim=1, stable=True)  # padding first
        kwargs["attention_mask"] = mask.gather(1, order)
        if embeds is not None:
            kwargs["inputs_embeds"] = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
        if prompts is None:
            return super().generate(None, *args, **kwargs)
        out = super().generate(prompts.gather(1, order), *args, **kwargs)
        sequences = out if isinstance(out, Tensor) else out.sequences
        sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(len(sequences) // len(prompts), 0)
        return out
