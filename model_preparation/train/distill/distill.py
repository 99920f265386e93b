"""Makes a Llamba base from any donor: the mixer of each layer learns to give the outputs of the donor's attention.

Embeddings, norms, MLPs and head are the donor's. No stage trains the whole model, so the base is called unaligned.
Source: MOHAWK, arXiv 2408.10189, stage 2. The training starts from the weights of checkpoint/llamba_init.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_preparation.checkpoint.layer_store import check_range, sorted_layers
from model_preparation.checkpoint.llamba_init import llamba_parts, size_bytes, write_llamba
from model_preparation.creation_time import creation_time
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve, tokenizer_files
from model_preparation.io.complete_folder import check_space, check_target, new_folder
from model_preparation.io.progress import bar
from model_preparation.io.result_inputs import digests_of_files
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.jobs.jobs import Job, Runner
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.hidden_states import check_room, states_bytes
from model_preparation.train.distill.layers_in_turn import layer_seed, train_layers
from model_preparation.train.distill.perplexity import Layer, perplexities
from model_preparation.train.distill.report import write_report
from model_preparation.train.distill.settings import SELF, DistillSettings
from model_preparation.train.distill.student_layer import MIXER_FIELDS, student_config, student_layer, student_tensors
from model_preparation.train.distill.tokens import TokenData, described, most_tokens, take_tokens
from model_preparation.train.distill.train_layer import Teacher
from model_preparation.train.distill.work_folder import WorkFolder
from model_preparation.versions import versions

WORKER = Path(__file__).with_name("worker.py")
DONOR, INITIAL, DISTILLED = "donor", "initial", "distilled"


def distill_llamba_base(
    donor: str,
    output_dir: str | Path,
    data: TokenData | Tensor | str | Path = SELF,
    settings: DistillSettings | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    sources: Mapping[str, str] | None = None,
    run_jobs: Runner | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Distil `donor` into a Llamba, write the Llamba into `output_dir`, and return the content of distillation.json.

    After a stop, call this again with the same arguments: the run resumes at the next unfinished layer. A
    resumed run gives exactly the same weights on the same kind of device with the same number of threads.

    Args:
        donor: a name, folder or hub id of a donor, as `sources.resolve` takes it.
        output_dir: the folder to make; it appears whole or not at all.
        data: a tensor of tokens, (sequences, length) int64; `TokenData`, which can also weight each token's
            error; a .txt or .jsonl file, or a folder of such files; or "self" for text that the donor writes.
        settings: by default `DistillSettings()`.
        layers: the layers to train, by default all. Other layers keep their initial weights.
        dtype: of the written weights, by default the donor's. The training is in float32.
        device: where the layers run. Jobs on Ray ignore it: each has a GPU of its own, or the CPU.
        overwrite: replace an existing model folder.
        restart: train all layers again. The tokens of an earlier run are kept if their settings are the same.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.
        run_jobs: a `ray_jobs.RayRunner`: each of its jobs trains some layers. By default, this process trains all.
        given: fields of `DistillSettings` that replace those of `settings`.

    Raises:
        SurgeryError: for an unsupported donor, text that cannot be used, mixer sizes that do not fit, layers
            that do not exist, an existing `output_dir`, too little disk space, an earlier run with other
            settings, or a loss that is not finite.
    """
    settings = replace(settings or DistillSettings(), **given)
    output = Path(output_dir).expanduser()
    check_target(output, overwrite=overwrite, marker_file="config.json")
    source = resolve(donor, overrides=sources)
    if output.resolve() == source.folder.resolve():
        raise SurgeryError(f"{output} is the donor's own folder. Choose another --output_dir.")
    original = Donor.open(source, device)
    files, donor_config = original.files, original.config
    config = student_config(donor_config, settings.mixer)
    config.dtype = torch_dtype(dtype) or files.dtype().torch
    chosen = sorted_layers(range(donor_config.num_hidden_layers) if layers is None else layers)
    check_range(chosen, donor_config.num_hidden_layers, str(source.folder))
    if isinstance(data, Tensor):
        data = TokenData(data)
    length = data.tokens.shape[1] if isinstance(data, TokenData) else settings.sequence_length
    if length > donor_config.max_position_embeddings:
        raise SurgeryError(
            f"Sequences of {length} tokens are too long: the donor takes at most {donor_config.max_position_embeddings}"
            f" (max_position_embeddings in {source.folder / 'config.json'}). Give a smaller --sequence_length."
        )
    text = {"donor": digests_of_files({*files.paths(), *tokenizer_files(source.folder)}), **described(data, settings)}
    training = settings.of_training()
    # Room for the base, and for the float32 mixers in the work folder: they are smaller than a float32 model.
    check_space(output, size_bytes(config, config.dtype) + size_bytes(config, torch.float32) + 50_000_000)

    work = WorkFolder.beside(output)
    most = most_tokens(data, settings)
    if states_bytes(most, donor_config) > settings.memory_limit_bytes:
        check_room(work.folder, most, donor_config, work.folder.glob("states_*/*"))
    with work.held(text, training, restart=restart):
        taken = take_tokens(data, work, original)
        if run_jobs is None:
            if done := sum(map(work.has_layer, chosen)):
                print(f"{done} of {len(chosen)} layers are finished already", flush=True)
            train_layers(work, original, chosen, settings.memory_limit_bytes)
        else:
            _train_by_jobs(work, source.folder, chosen, settings, run_jobs)
        records = [work.record(index) for index in chosen]

        def layer_of(index: int, donor_tensors: dict[str, Tensor], *, trained: bool = True) -> dict[str, Tensor]:
            """The tensors of layer `index` of the new base, or of the initial base if `trained` is False."""
            made = student_tensors(donor_tensors, donor_config, config, layer_seed(settings.seed, index))
            made |= work.mixer(index) if trained and index in chosen else {}
            return {name: tensor.to(config.dtype) for name, tensor in made.items()}

        def layers_of(index: int) -> dict[str, Layer]:
            """Layer `index` of the donor, the initial base and the distilled base."""
            tensors = dict(files.with_prefix(f"model.layers.{index}."))
            students = {INITIAL: layer_of(index, tensors, trained=False), DISTILLED: layer_of(index, tensors)}
            return {DONOR: Teacher(original.layer(index)).output} | {
                name: _on_device(student_layer(tensors, config, device), device) for name, tensors in students.items()
            }

        held_out = taken.tokens[-taken.held_out :]
        print("Perplexity of donor, initial base and distilled base on held-out tokens ...", flush=True)
        with bar("Perplexity", donor_config.num_hidden_layers) as advance:
            names = (DONOR, INITIAL, DISTILLED)
            found = perplexities(original, held_out, layers_of, names, lambda: advance(1))
        summary = {
            "donor": {name: value for name, value in source.as_dict().items() if name != "path"},
            "settings": text | training,
            "tokens": {
                "trained_on": taken.tokens.numel() - held_out.numel(),
                "held_out": held_out.numel(),
                "sequence_length": taken.tokens.shape[1],
                "blake3": taken.digest(),
            },
            "mixer": {name: config.ssm_cfg[name] for name in MIXER_FIELDS},
            "dtype": str(config.dtype).removeprefix("torch."),
            "loss": "mean squared error / variance of the donor's outputs, over held-out tokens",
            "layers": [{name: value for name, value in record.items() if name != "log"} for record in records],
            "perplexity": found,
            "seconds": sum(record["seconds"] for record in records),
            "creation_time": creation_time(),
            "versions": versions(),
        }
        with new_folder(output, overwrite=overwrite, marker_file="config.json") as staging:
            write_llamba(staging, source.folder, config, llamba_parts(files, donor_config, config.dtype, layer_of))
            write_report(staging, records, summary)
        work.remove()
    return summary


def _train_by_jobs(
    work: WorkFolder, donor_folder: Path, layers: Sequence[int], settings: DistillSettings, run_jobs: Runner
) -> None:
    """Train the unfinished layers in jobs. Each job trains `layers_per_job` layers."""
    jobs = []
    for first in range(0, len(layers), settings.layers_per_job):
        block = layers[first : first + settings.layers_per_job]
        if not all(map(work.has_layer, block)):
            places = ("--work", str(work.folder), "--donor_folder", str(donor_folder))
            arguments = (*places, "--memory_limit", str(settings.memory_limit_bytes), "--layers", *map(str, block))
            name = f"layers {block[0]} to {block[-1]}"
            jobs.append(Job(name, WORKER, arguments, needs=(donor_folder,), writes_to=work.folder))
    failed = {jobs[index].name: ended.reason for index, ended in run_jobs(jobs) if ended.reason}
    if failed:
        name, reason = next(iter(failed.items()))
        raise SurgeryError(
            f"{len(failed)} of {len(jobs)} jobs failed. The first is {name}: {reason} "
            "Solve this problem, then run the same command again: finished layers are kept."
        )


def _on_device(layer: LlambaDecoderLayer, device: str) -> Layer:
    return lambda states: layer(states.to(device)).to(states.device)
