"""Makes the plan of a graft: checks its parts (compatibility.py), and finds the config and the tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import INFO
from model_preparation.checkpoint.compatibility import check_donor, check_tensors
from model_preparation.checkpoint.graft_parts import GraftParts, find_parts
from model_preparation.checkpoint.grafted_model import grafted_config
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_configs import heads_of
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import has_tokenizer, resolve, tokenizer_name

if TYPE_CHECKING:
    import torch

    from model_preparation.llamba import LlambaConfig


@dataclass(frozen=True)
class GraftPlan(GraftParts):
    """A graft that passed all checks.

    Attributes:
        config: the grafted model's config.
        casts: in words, which tensors change their dtype; empty if none does.
        tokenizer: the folder that the tokenizer comes from.
        tokenizer_of: in words, whose tokenizer it is, such as "the base's".
        tokenizer_source: the tokenizer's `Source.as_dict()`; None if it is the base's or the donor's. If the
            tokenizer is a parent checkpoint's, this field has what the parent recorded.
    """

    config: "LlambaConfig"
    casts: list[str]
    tokenizer: Path
    tokenizer_of: str
    tokenizer_source: dict[str, str | None] | None

    def describe(self) -> list[str]:
        """The plan in lines to print."""
        from model_preparation.llamba.cache_bytes import kv_bytes_per_token  # imports torch

        ours = kv_bytes_per_token(self.config, len(self.layers), self.dtype.torch)
        theirs = kv_bytes_per_token(self.config.llama_config(), self.config.n_layer, self.dtype.torch)
        kept_heads, kept_size = heads_of(self.config)
        heads, size = self.config.num_attention_heads, self.config.head_dim
        total = self.config.n_layer
        return [
            f"Base         {self.base.id if self.base.hub == 'embedded' else self.base.folder}",
            *self._describe_parent(),
            *self._describe_donor(),
            f"Kept         {total - len(self.layers)} of {total} layers, and everything outside the layers",
            f"Heads        {heads} of width {size} in grafted layers, {kept_heads} of width {kept_size} in kept ones",
            f"K/V cache    {ours:,} bytes per token; the donor's has {theirs:,}",
            f"Dtype        {self.dtype.name}" + "".join(f"; {cast}" for cast in self.casts),
            f"Tokenizer    {self.tokenizer_of} ({self.tokenizer})",
            f"Weights      {decimal(self.weight_bytes)} ({self.parameters:,} parameters)",
        ]

    def _describe_donor(self) -> list[str]:
        donor = self.donor
        owners = {} if self.parent is None else self.parent.owners()
        instead = {index: f", instead of {owner}" for index, owner in owners.items()}
        whole = ", the mixer stays whole" if self.keep_mixer_heads else ""
        return [
            *donor.describe(),
            *(f"Layer {index:>3}    <- {donor.path(index)}{instead.get(index, '')}" for index in self.new_layers),
            *(
                f"Layer {index:>3}    <- head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))} of "
                f"{donor.path(index)}{whole}{instead.get(index, '')}"
                for index, heads in self.new_heads.items()
            ),
        ]

    def _describe_parent(self) -> list[str]:
        if (parent := self.parent) is None:
            return []
        owners = parent.owners()
        return [
            f"Base is      a checkpoint, built on {parent.info['base_model']['id']}",
            *(f"Layer {index:>3}    stays {owners[index]}" for index in sorted(self.kept)),
            *(
                f"Layer {index:>3}    <- the base's own ({parent.own_base.folder})"
                for index in parent.ungrafted
                if parent.own_base
            ),
        ]


def plan(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    tokenizer: str | None = None,
    dtype: "torch.dtype | str | None" = None,
    sources: Mapping[str, str] | None = None,
    **options: Any,
) -> GraftPlan:
    """Find and check the parts of a graft. The arguments are those of `find_parts` and `check_parts`."""
    parts = find_parts(base_name, layers, llama_layers_dir, dtype=dtype, sources=sources, **options)
    return check_parts(parts, tokenizer=tokenizer, sources=sources)


def check_parts(
    parts: GraftParts,
    *,
    tokenizer: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> GraftPlan:
    """Check, file by file, that the donor's layers fit the base; returns the plan.

    Args:
        parts: from `find_parts`.
        tokenizer: a name, folder or hub id; by default the base's tokenizer, else the donor's, else the one known for
            the base's name.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if donor and base do not fit, a tensor is missing or has another shape, or there is no tokenizer.
    """
    base_config = parts.base_config
    if base_config.has_attention and parts.parent is None:
        raise SurgeryError(
            f"{parts.base.folder} has grafted layers already, but no {INFO}. Start from a base or from a checkpoint."
        )
    if parts.parent is not None:
        parts.parent.check_own_base()
    for store in parts.donor.stores:
        check_donor(base_config, store)
    parts.donor.check(parts.donor_layers)
    donor = parts.donor if parts.donor_layers else None
    config = grafted_config(base_config, donor, parts.layers, parts.heads, parts.keep_mixer_heads, kept=parts.kept)
    casts = check_tensors(parts, config)
    tokenizer_folder, tokenizer_of, tokenizer_source = _find_tokenizer(parts, tokenizer, sources)
    config.dtype = parts.dtype.torch
    return GraftPlan(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(GraftParts)},
        config=config,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=tokenizer_source,
    )


def _find_tokenizer(
    parts: GraftParts, asked: str | None, sources: Mapping[str, str] | None
) -> tuple[Path, str, dict[str, str | None] | None]:
    """(folder, owner in words, record of the source or None), as in `GraftPlan`."""
    if asked is None and parts.parent is not None:
        return parts.parent.tokenizer, "the checkpoint's", parts.parent.info.get("tokenizer_source")
    if asked is None and has_tokenizer(parts.base.folder):
        return parts.base.folder, "the base's", None
    if asked is None and has_tokenizer(parts.donor.tokenizer):
        return parts.donor.tokenizer, "the donor's", None
    if name := asked or tokenizer_name(parts.base_name):
        source = resolve(name, need="tokenizer", overrides=sources)
        return source.folder, "given by --tokenizer" if asked else name, source.as_dict()
    raise SurgeryError(
        f"Neither {parts.base.folder} nor {parts.donor.folder} has a tokenizer. Name one with --tokenizer NAME|PATH."
    )
