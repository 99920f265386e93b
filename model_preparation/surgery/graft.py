"""What a graft will be, checked before anything is written, and the model it makes.

In: a base (a Llamba's folder), a `LayerStore` of the donor, and the layers to take. Out: a `GraftPlan` that says where
every tensor comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_preparation.errors import SurgeryError
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LLAMA_DEFAULTS, LlambaConfig
from model_preparation.surgery.layer_store import LayerStore, check_range, sorted_layers
from model_preparation.surgery.model_configs import heads_of, layer_shapes, read_config
from model_preparation.surgery.sources import Source, donor_name, has_tokenizer, resolve, tokenizer_name
from model_preparation.tensors.dtypes import torch_dtype
from model_preparation.tensors.tensor_files import TensorFiles
from model_preparation.tensors.tensor_ranges import TensorRange
from model_preparation.untrusted.untrusted_config import refusing_impossible_models


@dataclass(frozen=True)
class GraftPlan:
    """A graft that can be done: all checks have passed.

    Attributes:
        base_name: what the user called the base.
        base: where it is.
        donor: the extracted layers.
        layers: the indices taken from the donor, sorted.
        config: the grafted model's.
        dtype: of every parameter.
        casts: what changes its dtype on the way, in words; empty if nothing does.
        tokenizer: the folder the tokenizer is taken from.
        tokenizer_of: in words, whose it is.
        tokenizer_source: its `Source.as_dict()`, if it is neither the base's nor the donor's.
        parameters: numbers in the model; tied ones are counted once.
    """

    base_name: str
    base: Source
    donor: LayerStore
    layers: list[int]
    config: LlambaConfig
    dtype: torch.dtype
    casts: list[str]
    tokenizer: Path
    tokenizer_of: str
    tokenizer_source: dict[str, str | None] | None
    parameters: int

    @property
    def weight_bytes(self) -> int:
        """Size of the weights, written once."""
        return self.parameters * self.dtype.itemsize

    def describe(self) -> list[str]:
        """The plan in lines to print."""
        (heads, size), (kept_heads, kept_size) = heads_of(self.donor.config), heads_of(self.config)
        return [
            f"base       {self.base.id if self.base.hub == 'embedded' else self.base.folder}",
            f"donor      {self.donor.metadata['source']['id']} (layers in {self.donor.folder})",
            *(f"layer {index:>3}  <- {self.donor.path(index)}" for index in self.layers),
            f"kept       {self.config.n_layer - len(self.layers)} of {self.config.n_layer} layers, and all around them",
            f"heads      {heads} of {size} in the layers taken, {kept_heads} of {kept_size} in those kept",
            f"dtype      {str(self.dtype).removeprefix('torch.')}" + "".join(f"; {cast}" for cast in self.casts),
            f"tokenizer  {self.tokenizer_of} ({self.tokenizer})",
            f"weights    {decimal(self.weight_bytes)} ({self.parameters:,} parameters)",
        ]


def plan(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | str | None = None,
    sources: Mapping[str, str] | None = None,
) -> GraftPlan:
    """Check that `layers` of the donor fit the base, file by file, and say what will be done.

    Args:
        base_name: a name, folder or hub id of a Llamba, as `sources.resolve` takes it.
        layers: indices, in any order, without repeats.
        llama_layers_dir: a folder written by `extract_layers`, or what stands for one.
        tokenizer: name, folder or hub id to take it from; by default the base's own, else the donor's.
        dtype: of the whole model; by default the base's.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: for anything that would make the graft fail or be wrong.
    """
    layers = sorted_layers(layers)
    dtype = torch_dtype(dtype)
    if isinstance(llama_layers_dir, LayerStore):
        donor = llama_layers_dir
    else:
        donor = LayerStore(llama_layers_dir, hint=donor_name(base_name, sources))
    base = resolve(base_name, overrides=sources)
    base_config = read_config(base.folder)
    if not isinstance(base_config, LlambaConfig):
        raise SurgeryError(f"{base.folder} is a {base_config.model_type} model. The base must be a Llamba.")
    if base_config.llama_layers:
        raise SurgeryError(f"{base.folder} has grafted layers already. Start from a base without any.")
    check_range(layers, base_config.n_layer, str(base.folder))
    _check_donor(base_config, donor)
    donor.check(layers)

    config = grafted_config(base_config, donor, layers)
    files = TensorFiles(base.folder)
    dtype = dtype or files.dtype().torch
    casts = _check_tensors(files, donor, layers, config, dtype)
    tokenizer_folder, tokenizer_of, other = _find_tokenizer(tokenizer, base_name, base, donor, sources)
    config.dtype = dtype
    return GraftPlan(
        base_name=base_name,
        base=base,
        donor=donor,
        layers=layers,
        config=config,
        dtype=dtype,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=None if other is None else other.as_dict(),
        parameters=sum(parameter.numel() for parameter in empty_model(config).parameters()),
    )


def grafted_config(base: LlambaConfig, donor: LayerStore, layers: Sequence[int]) -> LlambaConfig:
    """The base's config with `layers` marked as the donor's, and the settings of the donor's attention."""
    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files beside the base's config.json
    fields["architectures"] = [LlambaForCausalLM.__name__]
    fields["llama_layers"] = list(layers)
    fields["llama_cfg"] = {name: getattr(donor.config, name) for name in LLAMA_DEFAULTS}
    fields["max_position_embeddings"] = donor.config.max_position_embeddings
    fields["use_cache"] = False  # plain forward passes need none; `generate` asks for it by itself
    with refusing_impossible_models():
        return LlambaConfig.from_dict(fields)


def empty_model(config: LlambaConfig) -> LlambaForCausalLM:
    """The model without memory for its parameters (meta device); its few buffers are real, on the CPU."""
    # The device is of this thread only, unlike accelerate's init_empty_weights.
    with torch.device("meta"), refusing_impossible_models():
        model = LlambaForCausalLM(config)
    if config.llama_layers:
        model.backbone.rotary_emb = LlamaRotaryEmbedding(config.llama_config())
    model.tie_weights()
    return model.eval()


def tensor_ranges(plan: GraftPlan) -> dict[str, TensorRange]:
    """Where every tensor of the grafted model lies, by its name there."""
    replaced = tuple(f"backbone.layers.{index}." for index in plan.layers)
    ranges = TensorFiles(plan.base.folder).ranges
    found = {name: place for name, place in ranges.items() if not name.startswith(replaced)}
    for prefix, index in zip(replaced, plan.layers, strict=True):
        found |= {prefix + name: place for name, place in plan.donor.ranges(index).items()}
    return found


def base_paths(plan: GraftPlan) -> list[Path]:
    """The files that determine the base: its config, its weights, their index."""
    return [plan.base.folder / "config.json", *TensorFiles(plan.base.folder).paths()]


def _check_donor(base: LlambaConfig, donor: LayerStore) -> None:
    """Compare the two configs: kind, depth, width, vocabulary. Heads and MLPs a grafted layer brings itself."""
    config = donor.config
    if config.model_type != "llama":
        raise SurgeryError(f"{donor.folder} holds layers of a {config.model_type} model. The donor must be a Llama.")
    numbers = [
        ("layers", config.num_hidden_layers, (base.n_layer,)),
        ("width (hidden_size)", config.hidden_size, (base.d_model,)),
        ("vocabulary size", config.vocab_size, (base.vocab_size, base.padded_vocab_size)),
    ]
    for what, found, wanted in numbers:
        if found not in wanted:
            raise SurgeryError(
                f"The donor's {what} is {found}, the base's is {wanted[0]}. "
                f"Extract the layers of the base's own donor into {donor.folder}."
            )


def _check_tensors(
    files: TensorFiles, donor: LayerStore, layers: Sequence[int], config: LlambaConfig, dtype: torch.dtype
) -> list[str]:
    """Compare every tensor's shape with what the grafted config asks for; returns the casts, in words."""
    donor_dtypes: set[torch.dtype] = set()
    wanted_of_donor = layer_shapes(donor.config)
    for index in layers:
        tensors = donor[index]
        donor_dtypes |= {tensor.dtype for tensor in tensors.values()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != wanted_of_donor:
            odd = sorted(
                name for name in found.keys() | wanted_of_donor if found.get(name) != wanted_of_donor.get(name)
            )
            raise SurgeryError(
                f"{donor.path(index)} does not hold the layer its metadata.json describes ({', '.join(odd[:3])}). "
                "Extract the layers again."
            )
    base_dtypes: set[torch.dtype] = set()
    replaced = tuple(f"backbone.layers.{index}." for index in layers)
    model = empty_model(config)
    places = model.state_dict().keys()
    for name in files.names():
        if not name.startswith(replaced) and name not in places:
            raise SurgeryError(f"{files.folder} holds {name}, for which a Llamba of its config.json has no place.")
    for name, parameter in model.named_parameters():
        if name.startswith(replaced):
            continue
        files.require(name, parameter.shape)
        base_dtypes.add(files.ranges[name].dtype.torch)
    casts = []
    for whose, found_dtypes in (("the base", base_dtypes), ("the donor's layers", donor_dtypes)):
        names = ", ".join(sorted(str(other).removeprefix("torch.") for other in found_dtypes - {dtype}))
        if names:
            casts.append(f"{whose} cast from {names}")
    return casts


def _find_tokenizer(
    asked: str | None, base_name: str, base: Source, donor: LayerStore, sources: Mapping[str, str] | None
) -> tuple[Path, str, Source | None]:
    """(folder, whose it is in words, where it comes from if that is neither the base nor the donor)."""
    if asked is None and has_tokenizer(base.folder):
        return base.folder, "the base's", None
    if asked is None and has_tokenizer(donor.tokenizer):
        return donor.tokenizer, "the donor's", None
    if name := asked or tokenizer_name(base_name):
        source = resolve(name, need="tokenizer", overrides=sources)
        return source.folder, "as asked" if asked else name, source
    raise SurgeryError(
        f"Neither {base.folder} nor {donor.folder} has a tokenizer. Name one with --tokenizer NAME|PATH."
    )
