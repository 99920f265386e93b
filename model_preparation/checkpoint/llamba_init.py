"""A Llamba made from a Llama: a base for grafting where none of the donor's shape is published, untrained.

In: any Llama. Out: a model folder in upstream's layout with the Llama's embeddings, norms, MLPs and head, and in each
layer a Mamba mixer that starts as the attention's linear counterpart: C from the query, B from the key, x from the
value, out_proj from the output projection (Mamba in the Llama, arXiv 2408.15237; MOHAWK, arXiv 2408.10189). One layer
and at most one shard are in memory at a time.

Softmax attention averages values with weights that sum to one; copied as it is, linear attention adds up all of them
with weights of any size, and one such layer ruins the model. So C carries one factor that makes it an average again:
1 / (sqrt(head_dim) * tokens in the decay's window * `TYPICAL_SCORE`). With Mamba layers 14 to 16, SmolLM2-135M has
perplexity 2e10 (four English paragraphs) where C is the query as it is, 2e9 with the first part of the factor, 306 with
two, 14.5 with all three; without Mamba layers 11.2.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from model_preparation.checkpoint.layer_store import HEAD, LlamaFiles, without_head
from model_preparation.checkpoint.model_configs import heads_of, read_config, read_generation_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, has_tokenizer, resolve
from model_preparation.io.new_folder import check_space, check_target, new_folder
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM

DECAY = 15 / 16  # per token, so the state looks back over some 16 tokens
TYPICAL_SCORE = 4.0  # size of q.k / sqrt(head_dim) before the softmax; 2 to 5 in most layers of SmolLM2
OPEN_GATE = 1.2784645427610738  # z with silu(z) = 1
CONV_TAPS = 4
SHARD_BYTES = 1_000_000_000

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_UPSTREAM_FIELDS = (
    "model_type",
    "vocab_size",
    "tie_embeddings",
    "pad_vocab_size_multiple",
    "lm_head_bias",
    "d_model",
    "n_layer",
    "resid_dropout",
    "norm_epsilon",
    "mlp_cfg",
    "ssm_cfg",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
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
    """Write a Llamba initialised from `donor` into `output_dir` and return its config.

    Args:
        donor: a name, folder or hub id of a Llama, as `sources.resolve` takes it.
        output_dir: the folder to make; it appears whole or not at all.
        dtype: of the weights written; the donor's by default.
        overwrite: replace a model folder that is there.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: for a donor that cannot be had, is no Llama, lacks tensors or has one of another shape than its
            config says, a width no Llamba can have, a target that is taken or not writable, too little disk space.
    """
    target = Path(output_dir).expanduser()
    check_target(target, overwrite=overwrite, marker_file="config.json")
    source = resolve(donor, overrides=sources)
    if target.resolve() == source.folder.resolve():
        raise SurgeryError(f"{target} is the donor's own folder. Choose another --output_dir.")
    files, donor_config = open_donor(source)
    config = llamba_config(donor_config)
    dtype = torch_dtype(dtype) or files.dtype().torch
    config.dtype = dtype
    check_space(target, size_bytes(config, dtype) + 50_000_000)

    with new_folder(target, overwrite=overwrite, marker_file="config.json") as staging:
        write_llamba(staging, source.folder, config, llamba_parts(files, donor_config, dtype))
    return config


def write_llamba(folder: Path, donor_folder: Path, config: LlambaConfig, parts: Iterable[dict[str, Tensor]]) -> None:
    """Write a Llamba's folder: weights, config.json, and the donor's generation config and tokenizer.

    Args:
        parts: the tensors under their full names, as `llamba_parts` gives them; none is kept once it is written.
    """
    _save_sharded(folder, parts)
    _write_json(folder / "config.json", _config_fields(config))
    if generation_config := read_generation_config(donor_folder):
        _write_json(folder / "generation_config.json", generation_config)
    if has_tokenizer(donor_folder):
        load_tokenizer(donor_folder).save_pretrained(folder)


def open_donor(source: Source) -> tuple[LlamaFiles, LlamaConfig]:
    """A Llama's weights and config.

    Raises:
        SurgeryError: if it is no Llama, lacks tensors or has one of another shape than its config says.
    """
    config = read_config(source.folder)
    if not isinstance(config, LlamaConfig):
        raise SurgeryError(f"{source.folder} is a {config.model_type} model. A base can be made from a Llama only.")
    files = LlamaFiles(source.folder)
    if HEAD not in files and not config.tie_word_embeddings:
        raise without_head(source.folder)
    for name, shape in _shapes(LlamaForCausalLM, config).items():
        files.require(name, shape)
    return files, config


def llamba_config(donor: LlamaConfig) -> LlambaConfig:
    """The config of the Llamba that `donor` becomes: one value head and one key head per query head.

    Raises:
        SurgeryError: if the heads' joint width is not a multiple of the hidden size.
    """
    heads, head_dim = heads_of(donor)
    heads_width = heads * head_dim
    if heads_width % donor.hidden_size:
        raise SurgeryError(
            f"The donor's {heads} heads of {head_dim} are {heads_width} wide, and a Llamba's mixer is a whole multiple "
            f"of the hidden size, here {donor.hidden_size}. Choose another donor."
        )
    return LlambaConfig(
        vocab_size=donor.vocab_size,
        tie_embeddings=donor.tie_word_embeddings,
        pad_vocab_size_multiple=1,
        d_model=donor.hidden_size,
        n_layer=donor.num_hidden_layers,
        norm_epsilon=donor.rms_norm_eps,
        mlp_cfg={"intermediate_size": donor.intermediate_size, "bias": donor.mlp_bias, "act_fn": donor.hidden_act},
        ssm_cfg={
            "d_state": head_dim,
            "n_v_heads": heads,
            "n_qk_heads": heads,
            "d_conv": CONV_TAPS,
            "expand": heads_width // donor.hidden_size,
            "bias": True,  # a constant gate and decay need one
        },
        bos_token_id=donor.bos_token_id,
        eos_token_id=donor.eos_token_id,
        pad_token_id=donor.pad_token_id,
    )


def mamba_layer(attention_layer: Mapping[str, Tensor], donor: LlamaConfig) -> dict[str, Tensor]:
    """One layer of a Llama as a layer of a Llamba.

    Args:
        attention_layer: the Llama layer's tensors by name relative to the layer ("self_attn.q_proj.weight").
        donor: its config.

    Returns:
        The Llamba layer's tensors ("mixer.in_proj.weight"), in the dtypes given.
    """
    heads, head_dim = heads_of(donor)
    heads_width = heads * head_dim

    def projection(name: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,), zeros where the donor has none."""
        weight = attention_layer[f"self_attn.{name}.weight"]
        bias = attention_layer.get(f"self_attn.{name}.bias")
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def per_query_head(rows: Tensor) -> Tensor:
        """A key or value head for every query head: (kv heads * head_dim, ...) -> (width, ...)."""
        by_head = rows.unflatten(0, (-1, head_dim))
        return by_head.repeat_interleave(heads // len(by_head), dim=0).flatten(0, 1)

    query, query_bias = projection("q_proj")
    key, key_bias = projection("k_proj")
    value, value_bias = projection("v_proj")
    output, output_bias = projection("o_proj")
    scale = score_scale(head_dim)
    no_input = query.new_zeros(heads_width + heads, donor.hidden_size)  # rows of z and a: constants, from the bias
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
    """What C's rows are the query's times: q.k becomes a weight of an average over the decay's window."""
    return (1 - DECAY) / (TYPICAL_SCORE * math.sqrt(head_dim))


def _shapes(kind: type[PreTrainedModel], config) -> dict[str, torch.Size]:
    """Names and shapes of a whole model's parameters, tied ones once, worked out without memory for them."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in kind(config).named_parameters()}


def size_bytes(config: LlambaConfig, dtype: torch.dtype) -> int:
    """Of a Llamba's weights in `dtype`."""
    return sum(shape.numel() for shape in _shapes(LlambaForCausalLM, config).values()) * dtype.itemsize


def llamba_parts(
    files: TensorFiles,
    donor: LlamaConfig,
    dtype: torch.dtype,
    layer_of: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The Llamba's tensors under their full names: embedding, layer after layer, final norm and head.

    Args:
        layer_of: index and tensors of a Llama's layer -> those of the Llamba's; `mamba_layer` by default.
    """
    yield {"backbone.embedding.weight": files["model.embed_tokens.weight"].to(dtype)}
    for index in range(donor.num_hidden_layers):
        layer = {name: tensor.to(dtype) for name, tensor in files.with_prefix(f"model.layers.{index}.")}
        made = mamba_layer(layer, donor) if layer_of is None else layer_of(index, layer)
        yield {f"backbone.layers.{index}.{name}": tensor.to(dtype) for name, tensor in made.items()}
    yield {"backbone.final_layernorm.weight": files["model.norm.weight"].to(dtype)}
    if not donor.tie_word_embeddings:
        yield {"lm_head.weight": files["lm_head.weight"].to(dtype)}


def _save_sharded(folder: Path, parts: Iterable[dict[str, Tensor]]) -> None:
    """Write `parts` in order as model.safetensors, or as an index and shards where they exceed `SHARD_BYTES`."""
    shards: list[Path] = []
    shard_of: dict[str, Path] = {}
    total_bytes = 0
    for shard in _shards(parts):
        path = folder / f"{len(shards)}.part"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files only their owner can read
        shards.append(path)
        shard_of |= dict.fromkeys(shard, path)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        shards[0].rename(folder / _WEIGHTS)
        return
    names = {path: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, path in enumerate(shards, 1)}
    for path, name in names.items():
        path.rename(folder / name)
    weight_map = {tensor: names[path] for tensor, path in shard_of.items()}
    _write_json(folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _shards(parts: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Collect `parts` until the next would exceed `SHARD_BYTES`; a part that is larger is a shard of its own."""
    shard: dict[str, Tensor] = {}
    for part in parts:
        size_bytes = sum(tensor.nbytes for tensor in itertools.chain(shard.values(), part.values()))
        if shard and size_bytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard |= part
    yield shard


def _config_fields(config: LlambaConfig) -> dict:
    """config.json as upstream lays it out, defaults included, so that it reads the same in both."""
    values = config.to_dict()
    return {
        "architectures": [LlambaForCausalLM.__name__],
        **{field: values[field] for field in _UPSTREAM_FIELDS},
        "dtype": str(config.dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
