"""The hybrid model: Mamba-2 blocks with upstream's parameter names; a grafted layer is transformers' own layer.

Source of the computation and the parameter names: cartesia-ai/edge, cartesia_pytorch/Llamba/llamba.py ("upstream").
"""

from .transformers_versions import TESTED

# isort: split
from collections.abc import Mapping
from types import MappingProxyType

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_llamba import CACHE_NAME, LlambaCache
from .configuration_llamba import LlambaConfig
from .donor_kinds import KINDS
from .head_attention import HeadAttention
from .mixer import LlambaMixer, PaddingLayout
from .packing import has_several_documents, token_places, visible

# transformers may pass these arguments to any model. The grafted layers get them.
TYPED_KWARGS = frozenset(TransformersKwargs.__annotations__)
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")  # attention implementations that take any mask

BLOCK_NORM_EPS = 1e-5  # fixed, as upstream; `norm_epsilon` is for the final norm only


class LlambaDecoderLayer(GradientCheckpointingLayer):
    """A Mamba block of a Llamba: norm, mixer, residual; norm, gated MLP, residual.

    The output of grafted heads is added to the mixer's output.
    """

    def __init__(self, config: LlambaConfig, layer_idx: int, llama_config: LlamaConfig | None = None):
        super().__init__()
        self.mixer = LlambaMixer(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.post_attention_layernorm = LlamaRMSNorm(config.d_model, eps=BLOCK_NORM_EPS)
        self.mlp = LlamaMLP(config.mlp_config())
        heads = config.heads_of_layer(layer_idx)
        self.attention = HeadAttention(llama_config, heads, layer_idx) if heads and llama_config else None

    def __setstate__(self, state: dict) -> None:
        """Load from a pickle. In pickles of versions before 0.4, blocks have no attribute for grafted heads."""
        super().__setstate__(state)
        if "attention" not in self._modules:
            self.__dict__.setdefault("attention", None)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: PaddingLayout | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: LlambaCache | None = None,
        cache: LlambaCache | None = None,
        of_heads: dict | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: (batch, length, d_model). The result has the same shape.
            attention_mask: where these tokens have padding.
            position_ids: (batch, length), as in `LlambaMixer.forward`, or None.
            use_cache: not used; transformers' gradient checkpointing needs it in the signature.
            past_key_values, cache: two names of the cache. The model uses the one in `CACHE_NAME`.
            of_heads: arguments for the grafted heads, other than hidden states and cache.
        """
        cache = past_key_values if cache is None else cache
        mixed = self.mixer(self.input_layernorm(hidden_states), cache, attention_mask, position_ids)
        if self.attention is not None and of_heads is not None:
            mixed = mixed + self.attention(hidden_states, cache=cache, **of_heads)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlambaPreTrainedModel(PreTrainedModel):
    config_class = LlambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE_NAME]  # noqa: RUF012 (transformers' own declaration)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _input_embed_layer = "embedding"
    _is_stateful = True  # an SSM state cannot be rolled back, so assisted generation is impossible
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GradientCheckpointingLayer,  # every kind of layer
        "attentions": "self_attn",
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

    # By layer, the donor's config where it differs from `llama_config`: the model then has several donors.
    other_configs: Mapping[int, PreTrainedConfig] = MappingProxyType({})

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.llama_config = config.llama_config() if config.has_attention else None
        if config.other_llama_cfgs:
            self.other_configs = {int(layer): config.llama_config(int(layer)) for layer in config.other_llama_cfgs}
        donor = KINDS[config.donor_type]
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            LlambaDecoderLayer(config, layer_idx, self.other_configs.get(layer_idx, self.llama_config))
            if kind in ("linear_attention", "hybrid")
            else donor.transformers_class("DecoderLayer")(
                self.other_configs.get(layer_idx, self.llama_config), layer_idx
            )
            for layer_idx, kind in enumerate(config.layer_types)
        )
        self._no_split_modules = {type(layer).__name__ for layer in self.layers}  # FSDP refuses names of absent layers
        self.final_layernorm = LlamaRMSNorm(config.d_model, eps=config.norm_epsilon)
        self.rotary_emb = None
        self.make_rotary_embeddings()
        self.gradient_checkpointing = False
        self.post_init()

    def make_rotary_embeddings(self) -> None:
        """Make the modules of rotary embeddings: for `llama_config`, and for each config in `other_configs`."""
        make = KINDS[self.config.donor_type].transformers_class("RotaryEmbedding")
        if self.llama_config is not None:
            self.rotary_emb = make(self.llama_config)
        if self.other_configs:
            self.other_rotary_embs = nn.ModuleList(map(make, self.other_configs.values()))

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
        cache: LlambaCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length) int64; or `inputs_embeds`, (batch, length, d_model).
            attention_mask: (batch, past + length), 0 at padding. Padding may be anywhere. It does not
                affect real tokens.
            position_ids: (batch or 1, length), each token's place in its document, counted from 0. At each 0 a document
                begins, and no layer sees the tokens before it. By default each row is one document.
            past_key_values: a `LlambaCache`, updated in place. If `use_cache` is true, a missing cache is made here.
            cache: another name of `past_key_values`; transformers uses this name from 5.24 on.
            kwargs: the arguments in `transformers.utils.TransformersKwargs`.

        Returns:
            last_hidden_state (batch, length, d_model) after the final norm, and the cache, under `CACHE_NAME`.

        Raises:
            TypeError: for an argument that is not listed here.
            ValueError: for a mask that is not 2-D, a cache of another class, or positions that
                `has_several_documents` refuses.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = _checked_cache(past_key_values, cache)
        _check_kwargs(kwargs, position_ids)
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = LlambaCache(self.config)

        arguments = self.layer_arguments(hidden_states, attention_mask, position_ids, cache, **kwargs)
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            given = arguments.get(str(index), arguments[kind])
            hidden_states = layer(hidden_states, **{CACHE_NAME: cache}, use_cache=use_cache, **given)
        if cache is not None:
            cache.seen_tokens += hidden_states.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_states), **{CACHE_NAME: cache})

    def layer_arguments(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LlambaCache | None = None,
        **kwargs,
    ) -> dict[str, dict]:
        """The arguments of each kind of layer, other than hidden states and cache, by entry of `layer_types`.

        Layers in `other_configs` and layers with grafted heads have entries of their own, by the layer's index as text.
        """
        length = hidden_states.shape[1]
        padding = PaddingLayout.of(attention_mask, length)
        places = token_places(hidden_states, attention_mask, cache)  # (batch or 1, past + length)
        own_places = places[:, -length:]
        is_packed = position_ids is not None and has_several_documents(position_ids, own_places, attention_mask)
        if position_ids is None:
            position_ids = own_places
        arguments: dict[str, dict] = {
            "linear_attention": {"attention_mask": padding, "position_ids": position_ids if is_packed else None}
        }
        if self.llama_config is not None and self.rotary_emb is not None:
            # set_attn_implementation() changes only the model's config, so the donor's config follows here.
            implementation = self.llama_config._attn_implementation = self.config._attn_implementation
            if is_packed and implementation not in MASKED_ATTENTION and (padding is not None or cache is not None):
                raise ValueError(
                    f"A row has several documents, and padding or a cache: {implementation} would mix the documents. "
                    'Call model.set_attn_implementation("sdpa")'
                )
            position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
            with_attention = (*self.config.llama_layers, *map(int, self.config.llama_heads))
            masks = {layer: self.config.mask_of(layer) for layer in with_attention}
            for kind in set(masks.values()):
                make_mask, window = create_causal_mask, None
                if kind == "sliding_attention":
                    if is_packed or (attention_mask is not None and not bool(attention_mask.all())):
                        window = self.llama_config.sliding_window  # transformers' own window would count padding too
                    else:
                        make_mask = create_sliding_window_causal_mask
                causal_mask = make_mask(
                    config=self.llama_config,
                    inputs_embeds=hidden_states,
                    attention_mask=attention_mask,
                    **{CACHE_NAME: cache},
                    and_mask_function=visible(position_ids, places, is_packed, window),
                )
                arguments[kind] = {
                    "attention_mask": causal_mask,
                    "position_ids": position_ids,
                    "position_embeddings": position_embeddings,
                    **kwargs,
                }
            for place, (layer, config) in enumerate(self.other_configs.items()):
                config._attn_implementation = implementation
                own = self.other_rotary_embs[place](hidden_states, position_ids=position_ids)
                arguments[str(layer)] = {**arguments[masks[layer]], "position_embeddings": own}
            for layer in map(int, self.config.llama_heads):
                of_heads = arguments.get(str(layer), arguments[masks[layer]])
                arguments[str(layer)] = {**arguments["linear_attention"], "of_heads": of_heads}
                arguments.setdefault("hybrid", arguments[str(layer)])
        return arguments


def _checked_cache(past_key_values: LlambaCache | None, cache: LlambaCache | None) -> LlambaCache | None:
    """The cache that was given under one of its two names."""
    if past_key_values is not None and cache is not None:
        raise TypeError("cache and past_key_values are two names of one argument; give one of them")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, LlambaCache):
        raise ValueError(
            f"{CACHE_NAME} is a {type(cache).__name__}, which has no place for the states of Mamba layers; "
            "this model needs a LlambaCache(model.config)"
        )
    return cache


def _check_kwargs(kwargs: dict, position_ids: Tensor | None) -> None:
    """Refuse arguments that no layer would use."""
    unknown = ", ".join(sorted(set(kwargs) - TYPED_KWARGS))
    if unknown:
        installed = transformers.__version__
        raise TypeError(f"forward has no argument {unknown}. (Tested with {TESTED}; {installed} is installed.)")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False is not possible: Mamba layers are causal")
    if position_ids is None and any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise ValueError("cu_seq_lens_q and seq_idx are not enough to tell documents apart; give position_ids as well")


class LlambaForCausalLM(LlambaPreTrainedModel, GenerationMixin):
    """A Llamba with its language-model head. The layers in `config.llama_layers` come from the donor."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.backbone = LlambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=config.lm_head_bias)
        self.post_init()

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
        cache: LlambaCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length) int64: `input_ids`, but -100 where no loss is wanted. The loss shifts them
                by one.
            logits_to_keep: which positions get logits. An integer n: the last n positions, or all for 0. A tensor: the
                positions in it, (kept,) for all rows alike or (batch, kept) for each row.
            The other arguments are those of [`LlambaModel`].

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
            cache=cache,
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
        # Cut off the logits of rows that only pad the vocabulary, so that no sampler can choose them.
        logits = self.lm_head(hidden_states)[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # with True, `generate` would make a cache of another class

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = LlambaCache(self.config)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """`GenerationMixin.generate`, also for prompts that are padded on the right.

        transformers predicts the next token at the last column, which is padding in a right-padded batch. So padding is
        moved to the left while `generate` runs. The returned sequences begin with the prompts as they were given.

        Raises:
            ValueError: if a cache is given, and a row of the mask ends in padding.
        """
        cache = _checked_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask[:, -1].all()):
            return super().generate(prompts, *args, **kwargs)
        if cache is not None:
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
