"""Makes an untrained Llamba from a donor, for donors without a published Llamba.

The written folder has the layout of the published Llambas ("upstream"), and the donor's embeddings, norms, MLPs and
head. Each layer's Mamba mixer starts as linear attention with the donor's projections: C comes from the query, B from
the key, x from the value, out_proj from the output projection (Mamba in the Llama, arXiv 2408.15237; MOHAWK,
arXiv 2408.10189). One layer and about one shard are in memory at a time.

Softmax attention averages values: its weights sum to one. Plain linear attention adds values up with weights of any
size, and one such layer ruins the model. So C is multiplied by 1 / (sqrt(head_dim) * N * `TYPICAL_SCORE`), where N is
the number of tokens that the decay remembers: then the sum is an average again. On four English paragraphs,
SmolLM2-135M with Mamba layers 14 to 16 has perplexity 2e10 without this factor, 2e9 with 1 / sqrt(head_dim) only, 306
if this is also divided by N, and 14.5 with the whole factor. Without Mamba layers, SmolLM2-135M has 11.2.

Qwen3 normalises queries and keys, and a mixer does not. Such a norm divides its input by the input's size.
Here, the mixer's rows for queries and keys are divided by an estimate of this size instead. It is `CORRELATED` times
the root mean square that a head's outputs would have if the input channels were independent.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.checkpoint.layer_store import HEAD, LlamaFiles, without_head
from model_preparation.checkpoint.model_configs import check_kind, heads_of, read_config, read_generation_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, has_tokenizer, resolve
from model_preparation.io.complete_folder import check_space, new_folder
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM

DECAY = 15 / 16  # per token, so the state remembers about 16 tokens
TYPICAL_SCORE = 4.0  # size of q.k / sqrt(head_dim) before the softmax; 2 to 5 in most layers of SmolLM2
# How much larger queries and keys are than with independent input channels: 1.4 times in SmolLM2-135M (median head),
# 2 times in tiny Qwen3s. Too large a value harms the model little, too small a value harms it much.
CORRELATED = 2.0
OPEN_GATE = 1.2784645427610738  # silu(OPEN_GATE) = 1
CONV_TAPS = 4
SHARD_BYTES = 1_000_000_000

_UPSTREAM_FIELDS = (
    *("model_type", "vocab_size", "tie_embeddings", "pad_vocab_size_multiple", "lm_head_bias", "d_model", "n_layer"),
    *("resid_dropout", "norm_epsilon", "mlp_cfg", "ssm_cfg", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_COPIED_IN_LAYER = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def init_llamba_base(
    donor: str,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> LlambaConfig:
    """Write a Llamba initialised from `donor` into `output_dir`; returns its config.

    Args:
        donor: a name, folder or hub id of a donor, as `sources.resolve` takes it.
        output_dir: the folder to make; it appears whole or not at all.
        dtype: the dtype of the written weights; by default the donor's.
        overwrite: replace an existing model folder.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if the donor is missing, of an unknown kind, or lacks tensors; if `llamba_config` refuses its
            heads; if output_dir exists or is not writable; or if the disk is too small.
    """
    target = Path(output_dir).expanduser()
    with new_folder(target, overwrite=overwrite, marker_file="config.json") as staging:
        source = resolve(donor, overrides=sources)
        if target.resolve() == source.folder.resolve():
            raise SurgeryError(f"{target} is the donor's own folder. Choose another --output_dir.")
        files, donor_config = open_donor(source)
        config = llamba_config(donor_config)
        dtype = torch_dtype(dtype) or files.dtype().torch
        config.dtype = dtype
        check_space(target, size_bytes(config, dtype) + 50_000_000)
        write_llamba(staging, source.folder, config, llamba_parts(files, donor_config, dtype))
    return config


def write_llamba(folder: Path, donor_folder: Path, config: LlambaConfig, parts: Iterable[dict[str, Tensor]]) -> None:
    """Write a Llamba's folder: weights, config.json, and the donor's generation config and tokenizer.

    Args:
        parts: the tensors, from `llamba_parts`. A tensor leaves the memory once it is written.
    """
    _save_sharded(folder, config, parts)
    write_json(folder / "config.json", _config_fields(config))
    if generation_config := read_generation_config(donor_folder):
        write_json(folder / "generation_config.json", generation_config)
    if has_tokenizer(donor_folder):
        load_tokenizer(donor_folder).save_pretrained(folder)


def open_donor(source: Source) -> tuple[LlamaFiles, PreTrainedConfig]:
    """A donor's weights and config; raises SurgeryError if its kind is unknown, or weights and config do not fit."""
    config = read_config(source.folder)
    check_kind(config.model_type, f"{source.folder} is")
    files = LlamaFiles(source.folder)
    if HEAD not in files and not config.tie_word_embeddings:
        raise without_head(source.folder)
    for name, tensor in _parameters(KINDS[config.model_type].transformers_class("ForCausalLM"), config).items():
        files.require(name, tensor.shape)
    return files, config


def llamba_config(donor: PreTrainedConfig) -> LlambaConfig:
    """The config of the Llamba that `donor` becomes: one value head and one key head per query head.

    Raises:
        SurgeryError: if the width of all heads together is no multiple of the hidden size.
    """
    heads, head_dim = heads_of(donor)
    heads_width = heads * head_dim
    if heads_width % donor.hidden_size:
        raise SurgeryError(
            f"The donor's {heads} heads of width {head_dim} are {heads_width} wide together. A Llamba needs a multiple "
            f"of the hidden size, {donor.hidden_size}. Choose another donor."
        )
    return LlambaConfig(
        vocab_size=donor.vocab_size,
        tie_embeddings=donor.tie_word_embeddings,
        pad_vocab_size_multiple=1,
        d_model=donor.hidden_size,
        n_layer=donor.num_hidden_layers,
        norm_epsilon=donor.rms_norm_eps,
        mlp_cfg={
            "intermediate_size": donor.intermediate_size,
            "bias": getattr(donor, "mlp_bias", False),  # only Llama's config has this field
            "act_fn": donor.hidden_act,
        },
        ssm_cfg={
            "d_state": head_dim,
            "n_v_heads": heads,
            "n_qk_heads": heads,
            "d_conv": CONV_TAPS,
            "expand": heads_width // donor.hidden_size,
            "bias": True,  # the biases hold the constant gate and decay
        },
        bos_token_id=donor.bos_token_id,
        eos_token_id=donor.eos_token_id,
        pad_token_id=donor.pad_token_id,
    )


def mamba_layer(attention_layer: Mapping[str, Tensor], donor: PreTrainedConfig) -> dict[str, Tensor]:
    """Turn one layer of a donor into a layer of a Llamba.

    Args:
        attention_layer: the donor layer's tensors by name relative to the layer ("self_attn.q_proj.weight").
        donor: the donor's config.

    Returns:
        The Llamba layer's tensors ("mixer.in_proj.weight"), in the same dtypes.
    """
    heads, head_dim = heads_of(donor)
    heads_width = heads * head_dim

    def projection(name: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,); the bias is zero where the donor has none."""
        weight = attention_layer[f"self_attn.{name}.weight"]
        bias = attention_layer.get(f"self_attn.{name}.bias")
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def normed(name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a norm of queries or keys into a factor per row, as a mixer has no such norm."""
        norm = attention_layer.get(f"self_attn.{name}_norm.weight")
        if norm is None:
            return weight, bias
        gain = attention_layer["input_layernorm.weight"].float()
        # `squares`: the expected square of each row's output. `sizes`: the root mean square of a head's outputs.
        squares = (weight.float() * gain).square().sum(1) + bias.float().square()
        sizes = squares.unflatten(0, (-1, head_dim)).mean(1, keepdim=True).sqrt()  # (heads, 1)
        factor = (norm.float() / (CORRELATED * sizes)).flatten()
        return (weight * factor[:, None]).to(weight), (bias * factor).to(bias)

    def per_query_head(rows: Tensor) -> Tensor:
        """Repeat key or value heads for all query heads: (kv heads * head_dim, ...) -> (heads_width, ...)."""
        by_head = rows.unflatten(0, (-1, head_dim))
        return by_head.repeat_interleave(heads // len(by_head), dim=0).flatten(0, 1)

    query, query_bias = normed("q", *projection("q_proj"))
    key, key_bias = normed("k", *projection("k_proj"))
    value, value_bias = projection("v_proj")
    output, output_bias = projection("o_proj")
    scale = score_scale(head_dim)
    no_input = query.new_zeros(heads_width + heads, donor.hidden_size)  # z and a come from the bias alone
    conv_dim = 3 * heads_width
    conv = query.new_zeros(conv_dim, 1, CONV_TAPS)  # the last tap is the current token's
    conv[:, :, -1] = 1
    copied = {name: tensor for name, tensor in attention_layer.items() if name.startswith(_COPIED_IN_LAYER)}
    return copied | {
        # in_proj's rows: x, B, C, z, a
        "mixer.in_proj.weight": torch.cat([per_query_head(value), per_query_head(key), query * scale, no_input]),
        "mixer.in_proj.bias": torch.cat(
            [
                per_query_head(value_bias),
                per_query_head(key_bias),
                query_bias * scale,
                query.new_full((heads_width,), OPEN_GATE),
                query.new_full((heads,), math.log(1 / DECAY - 1)),  # exp(-softplus(a)) = DECAY
            ]
        ),
        "mixer.conv1d.weight": conv,
        "mixer.conv1d.bias": query.new_zeros(conv_dim),
        "mixer.D": query.new_zeros(heads),
        "mixer.out_proj.weight": output,
        "mixer.out_proj.bias": output_bias,
    }


def score_scale(head_dim: int) -> float:
    """The factor that turns the query's rows into C's rows. Then q.k is a weight in an average over tokens."""
    return (1 - DECAY) / (TYPICAL_SCORE * math.sqrt(head_dim))


def _parameters(kind: type[PreTrainedModel], config) -> dict[str, Tensor]:
    """A model's parameters by name, on the meta device. Tied parameters appear once."""
    with torch.device("meta"):
        return dict(kind(config).named_parameters())


def size_bytes(config: LlambaConfig, dtype: torch.dtype) -> int:
    """The size of a Llamba's weights, stored in `dtype`."""
    return sum(tensor.numel() for tensor in _parameters(LlambaForCausalLM, config).values()) * dtype.itemsize


def llamba_parts(
    files: TensorFiles,
    donor: PreTrainedConfig,
    dtype: torch.dtype,
    layer_of: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the Llamba's tensors by their full names, a dict for each part: embedding, every layer, final norm, head.

    Args:
        layer_of: makes a Llamba layer's tensors from the layer's index and the donor layer's tensors; by default
            `mamba_layer`.
    """
    yield {"backbone.embedding.weight": files["model.embed_tokens.weight"].to(dtype)}
    for index in range(donor.num_hidden_layers):
        layer = {name: tensor.to(dtype) for name, tensor in files.with_prefix(f"model.layers.{index}.")}
        made = mamba_layer(layer, donor) if layer_of is None else layer_of(index, layer)
        yield {f"backbone.layers.{index}.{name}": tensor.to(dtype) for name, tensor in made.items()}
    yield {"backbone.final_layernorm.weight": files["model.norm.weight"].to(dtype)}
    if not donor.tie_word_embeddings:
        yield {"lm_head.weight": files["lm_head.weight"].to(dtype)}


def _save_sharded(folder: Path, config: LlambaConfig, parts: Iterable[dict[str, Tensor]]) -> None:
    """Write `parts` as model.safetensors, or as shards of at most `SHARD_BYTES` and their index."""
    empty = {name: tensor.to(config.dtype) for name, tensor in _parameters(LlambaForCausalLM, config).items()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)
    waiting: dict[str, Tensor] = {}  # tensors of shards that are not complete yet
    for part in parts:
        waiting |= {name: tensor.contiguous() for name, tensor in part.items()}
        for file, names in shards.filename_to_tensors.items():
            if waiting.keys() >= set(names):
                save_file({name: waiting.pop(name) for name in names}, folder / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner can read.
                (folder / file).chmod(folder.stat().st_mode & 0o666)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _config_fields(config: LlambaConfig) -> dict:
    """The fields of config.json in upstream's layout, with all defaults, so upstream's code reads the same model."""
    values = config.to_dict()
    return {
        "architectures": [LlambaForCausalLM.__name__],
        **{field: values[field] for field in _UPSTREAM_FIELDS},
        "dtype": str(config.dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
