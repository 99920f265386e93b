"""Builds a checkpoint from a base and extracted layers. Its folder appears whole or not at all.

While one thread writes the weights, others import torch and transformers, check the graft and run the model once. If a
check fails, the written files are removed.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_folder import describe_parent, finish_folder
from model_preparation.checkpoint.checkpoint_info import FORMATS, INFO, TENSOR_DIGESTS, check_format, descent_of
from model_preparation.checkpoint.graft_parts import GraftParts, find_parts
from model_preparation.checkpoint.graft_plan import GraftPlan, check_parts
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_configs import read_generation_config
from model_preparation.checkpoint.parent import Parent
from model_preparation.checkpoint.write_weights import GraftWeights
from model_preparation.devices import check_device
from model_preparation.errors import SurgeryError
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.complete_folder import check_target, new_folder
from model_preparation.io.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from model_preparation.llamba import LlambaForCausalLM

Review = Callable[[dict[str, Any], GraftPlan], None]


def build_checkpoint(
    base: str,
    layers: Sequence[int] | Mapping[str, Sequence[int]],
    llama_layers_dir: str | Path | LayerStore | Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    tokenizer: str | None = None,
    description: str = "",
    score: float | None = None,
    device: str | Callable[[], str] = "cpu",
    dtype: "torch.dtype | str | None" = None,
    format: str = "pt",
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
    dry_run: bool = False,
    heads: Mapping[int, Sequence[int]] | Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    keep_mixer_heads: bool = False,
    ungraft: Sequence[int] = (),
    show: Callable[[list[str]], None] = lambda lines: None,
    review: Review = lambda info, graft: None,
) -> dict[str, Any]:
    """Replace `layers` of `base` by the donor's, add `heads`, run the model once, and write the checkpoint.

    Args:
        base: a name, folder or hub id of a Llamba, as `sources.resolve` takes it. Or a checkpoint's folder: its grafts
            stay, and the new ones are added.
        layers: indices, in any order, each once; may be empty if `heads` or `ungraft` is given. With several donors:
            a dict from a donor's name to its layers, such as {"a": [11, 13], "b": [17]}.
        llama_layers_dir: a folder with the donor's layers, written by `extract_layers`, or a `LayerStore`. With
            several donors: a dict from a donor's name to its folder.
        output_dir: the checkpoint's folder; it appears whole or not at all.
        tokenizer: a name, folder or hub id; by default the base's tokenizer, else the donor's, else the one known for
            the base's name.
        description: free text for people.
        score: an MMLU score that is known already, as a fraction of 1.
        device: where the smoke test runs, or a function that chooses it; the checkpoint is always written on the CPU.
        dtype: the dtype of the whole model; by default the base's.
        format: "pt" for model.pt and model_state_dict.pt, "hf" for a folder that transformers opens without this
            package, or "both".
        overwrite: replace an existing checkpoint. The old one stays until the new one is complete.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.
        dry_run: check and show the plan, write nothing.
        heads: by layer, the donor's query heads that are added to the mixer, such as {13: [16, 17]}. With several
            donors: a dict from a donor's name to such a dict.
        keep_mixer_heads: leave the mixer whole; by default its heads at the same positions are set to zero.
        ungraft: layers of a checkpoint whose graft is undone: they get the weights of the checkpoint's own base again.
        show: called with the lines of the plan, after the checks of graft and device.
        review: called with the new checkpoint_info.json and the plan before the folder gets its name. It may change
            checkpoint_info.json, or raise an exception.

    Returns:
        The fields of checkpoint_info.json; an empty dict with `dry_run`.

    Raises:
        SurgeryError: if the graft is impossible or wrong; if output_dir, disk or device cannot be used; or if logits
            are not finite. Then no files are left.
    """
    check_format(format)
    if score is not None and not 0 <= score <= 1:
        raise SurgeryError(f"The score {score} is not between 0 and 1. Give a fraction, such as 0.57.")
    target = Path(output_dir).expanduser()

    def find() -> tuple[GraftParts, GraftWeights]:
        grafts: dict[str, Any] = {"heads": heads, "keep_mixer_heads": keep_mixer_heads, "ungraft": ungraft}
        parts = find_parts(base, layers, llama_layers_dir, dtype=dtype, sources=sources, **grafts)
        return parts, GraftWeights(parts, target, format)

    def check_all(parts: GraftParts, weights: GraftWeights) -> _Checked:
        chosen = device if isinstance(device, str) else device()
        check_device(chosen)
        checked = _Checked.of(check_parts(parts, tokenizer=tokenizer, sources=sources), chosen)
        show([*checked.graft.describe(), weights.describe()])
        return checked

    if dry_run:
        check_target(target, overwrite=overwrite, marker_file=INFO)
        parts, weights = find()
        check_all(parts, weights)
        weights.check_room()
        return {}
    with new_folder(target, overwrite=overwrite, marker_file=INFO) as staging:
        parts, weights = find()
        with BackgroundTasks() as tasks:
            checking = tasks.start(check_all, parts, weights)
            testing = tasks.start(_smoke_test, checking, tasks.check)
            try:
                if weights.has_siblings:
                    # Wait: reading siblings (see write_weights.py) imports torch, and two threads must not do this
                    # at once.
                    checking.result()
                weights.check_room()
            except SurgeryError:
                checking.result()  # a failed check is reported first
                raise
            weights.prepare(tasks.check)

            def read_base() -> dict[str, dict]:
                checking.result()  # let the imports finish first: the build cannot end without them
                return weights.base_files(tasks.check)

            reading = tasks.start(read_base)
            with bar("Writing", FORMATS[format] * parts.weight_bytes, in_bytes=True) as progress:

                def advance(size_bytes: int) -> None:
                    progress(size_bytes)
                    tasks.check()

                files, digests = weights.write(staging, lambda tensors: checking.result().model(tensors), advance)
            checked, base_files = checking.result(), reading.result()
            testing.result()
        from model_preparation.checkpoint.model_digests import digest_of_tokenizer  # imports torch

        graft = checked.graft
        tensors = _tensor_digests(graft, digests)
        info = _info(graft, base_files) | {"description": description, "mmlu_score": score}
        info["digests"] = {
            "donor_layers": _layer_digests(graft),
            "tokenizer": digest_of_tokenizer(checked.tokenizer),
        }
        return finish_folder(
            staging,
            info,
            format=format,
            files=files,
            tensors=tensors,
            config=graft.config,
            generation_config=checked.generation_config,
            tokenizer=checked.tokenizer,
            review=lambda found: review(found, graft),
        )


@dataclass(frozen=True)
class _Checked:
    """A graft that passed its checks, with its tokenizer and generation config."""

    graft: GraftPlan
    tokenizer: "PreTrainedTokenizerBase"
    generation_config: dict[str, Any]
    device: str

    @classmethod
    def of(cls, graft: GraftPlan, device: str) -> "_Checked":
        """Load the tokenizer, and raise SurgeryError if it makes ids that the model has no embedding for."""
        from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

        tokenizer = load_tokenizer(graft.tokenizer)
        if len(tokenizer) > graft.config.padded_vocab_size:
            raise SurgeryError(
                f"The tokenizer in {graft.tokenizer} has {len(tokenizer)} tokens, but the model has only "
                f"{graft.config.padded_vocab_size}. Give the model's own tokenizer with --tokenizer."
            )
        return cls(graft, tokenizer, _generation_config(graft, tokenizer), device)

    def model(self, tensors: "dict[str, Tensor]") -> "LlambaForCausalLM":
        """The grafted model with these parameters."""
        from transformers import GenerationConfig

        model = empty_model(self.graft.config)
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(**self.generation_config)
        return model


def _smoke_test(checking: "Future[_Checked]", check_stopped: Callable[[], object]) -> None:
    checked = checking.result()
    from model_preparation.checkpoint.smoke_test import smoke_test

    smoke_test(checked.graft, checked.tokenizer, checked.device, check_stopped)


def _tensor_digests(graft: GraftPlan, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The entries of tensor_digests.json: dtype, shape, origin and BLAKE3 of each tensor of the state dict.

    Raises:
        SurgeryError: if a tensor of a parent has changed since the parent was built.
    """
    from model_preparation.checkpoint.model_digests import read_tensor_digests  # imports torch
    from model_preparation.llamba import LlambaForCausalLM

    tied, parent = LlambaForCausalLM._tied_weights_keys, graft.parent
    recorded = {} if parent is None else read_tensor_digests(parent.folder / TENSOR_DIGESTS)
    found = {}
    for name, tensor in empty_model(graft.config).state_dict().items():
        digest = digests.get(name) or digests[tied[name]]
        origin = "donor" if name.startswith(graft.replaced_prefixes) else "base"
        if parent is not None and not name.startswith((*graft.new_prefixes, *graft.ungrafted_prefixes)):
            if name not in recorded or digest != recorded[name].blake3:
                raise SurgeryError(
                    f"{parent.folder} is damaged: its tensor {name} has changed since the build. Build that checkpoint "
                    "again. verify_checkpoint.py lists the faults."
                )
            origin = recorded[name].origin
        found[name] = {"dtype": graft.dtype.name, "shape": list(tensor.shape), "from": origin, "blake3": digest}
    return found


def _layer_digests(graft: GraftPlan) -> dict[str, str]:
    """The digest of each layer from a donor, by index. The parent checkpoint gives the digests of kept layers."""
    from model_preparation.checkpoint.model_digests import digest_of_layers  # imports torch

    recorded = {} if graft.parent is None else graft.parent.info["digests"].get("donor_layers", {})
    found = {index: digest for index, digest in recorded.items() if int(index) in graft.kept}
    found |= digest_of_layers(graft.donor, graft.donor_layers)
    return {index: found[index] for index in sorted(found, key=int)}


def _info(graft: GraftPlan, base_files: dict[str, dict]) -> dict[str, Any]:
    """The fields of checkpoint_info.json that describe the graft."""
    parent = graft.parent
    base = {"name": graft.base_name, **graft.base.as_dict(), "files": base_files}
    donors = graft.donor.records(graft.donor_layers)
    if parent is not None:
        donors = parent.donors(graft.kept, donors)
    return {
        "replaced_layers": graft.layers,
        "num_replaced_layers": len(graft.layers),
        **(
            {"grafted_heads": _json_heads(graft.heads), "keep_mixer_heads": graft.keep_mixer_heads}
            if graft.heads
            else {}
        ),
        "total_layers": graft.config.n_layer,
        "base_model": base if parent is None else parent.info["base_model"],
        "replacement_source": donors[0],
        **({"other_donors": donors[1:]} if donors[1:] else {}),
        **({} if parent is None else {"descent": [*descent_of(parent.info), _descent_step(graft, parent)]}),
        "tokenizer_source": graft.tokenizer_source,
        "num_heads": graft.config.num_attention_heads,
        "head_dim": graft.config.head_dim,
        "parameters": graft.parameters,
        "dtype": graft.dtype.name,
    }


def _descent_step(graft: GraftPlan, parent: Parent) -> dict[str, Any]:
    """The entry for this graft in `descent`."""
    return {
        "from": describe_parent(parent.folder, parent.info),
        "grafted": graft.new_layers,
        **({"grafted_heads": _json_heads(graft.new_heads)} if graft.new_heads else {}),
        "ungrafted": parent.ungrafted,
        "donors": [record["id"] for record in graft.donor.records(graft.donor_layers)],
    }


def _json_heads(heads: Mapping[int, list[int]]) -> dict[str, list[int]]:
    """The same dict with text keys, as JSON needs them."""
    return {str(index): layer_heads for index, layer_heads in heads.items()}


def _generation_config(graft: GraftPlan, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Settings for greedy decoding, with the special tokens of the base, or else of the donor or the tokenizer."""
    if graft.parent is not None:
        return dict(graft.parent.info["generation_config"])
    given = read_generation_config(graft.base.folder) or graft.donor.metadata["generation_config"] or {}

    def token(name: str):
        value = given.get(name)
        return getattr(tokenizer, name) if value is None else value

    eos = token("eos_token_id")
    pad = token("pad_token_id")
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return {"bos_token_id": token("bos_token_id"), "eos_token_id": eos, "pad_token_id": pad, "use_cache": True}
