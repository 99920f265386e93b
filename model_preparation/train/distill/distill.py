"""An unaligned Llamba from any Llama: each mixer learns its layer's output on the donor's own inputs of that layer.

In: a Llama, and text or tokens, or text that it writes itself. Out: a model folder as init_llamba_base.py writes it,
with trained mixers, and distillation.json, .jsonl and .png beside the weights. Embeddings, norms, MLPs and head are the
donor's; no stage trains the whole. One layer is in memory at a time, and finished layers outlive a killed run.
Source: MOHAWK, arXiv 2408.10189, stage 2; the start is checkpoint/llamba_init.py's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from model_preparation.checkpoint.layer_store import check_range, sorted_layers
from model_preparation.checkpoint.llamba_init import llamba_parts, open_donor, size_bytes, write_llamba
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve, tokenizer_files
from model_preparation.io.complete_folder import check_space, check_target, new_folder
from model_preparation.io.identity import digests_of_files
from model_preparation.io.progress import bar
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.jobs.jobs import Job, Runner
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.train.distill import distill_defaults as defaults
from model_preparation.train.distill.distill_block import layer_seed, train_layers
from model_preparation.train.distill.distill_data import TokenData
from model_preparation.train.distill.distill_layer import Target, Teacher
from model_preparation.train.distill.distill_progress import LayerProgress
from model_preparation.train.distill.distill_report import write_report
from model_preparation.train.distill.distill_tokens import described, most_tokens, take_tokens
from model_preparation.train.distill.hidden_states import check_room, donor_layer, states_bytes
from model_preparation.train.distill.student_layer import MIXER_FIELDS, student_config, student_layer, student_tensors
from model_preparation.train.heal.perplexity import Layer, perplexities
from model_preparation.train.work_folder import WorkFolder
from model_preparation.versions import creation_time, versions

WORKER = Path(__file__).with_name("distill_worker.py")
DONOR, INITIAL, DISTILLED = "donor", "initial", "distilled"


def distill_llamba_base(
    donor: str,
    output_dir: str | Path,
    data: TokenData | Tensor | str | Path = defaults.SELF,
    *,
    tokens: int = defaults.TOKENS,
    sequence_length: int = defaults.SEQUENCE_LENGTH,
    steps_per_layer: int = defaults.STEPS_PER_LAYER,
    batch_size: int = defaults.BATCH_SIZE,
    learning_rate: float = defaults.LEARNING_RATE,
    weight_decay: float = defaults.WEIGHT_DECAY,
    seed: int = 0,
    target: Target = "mixer",
    mixer: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    memory_limit_gb: float = defaults.MEMORY_LIMIT_GB,
    overwrite: bool = False,
    restart: bool = False,
    sources: Mapping[str, str] | None = None,
    run_jobs: Runner | None = None,
    layers_per_job: int = defaults.LAYERS_PER_JOB,
) -> dict[str, Any]:
    """Distil `donor` into a Llamba, write it into `output_dir` and return its summary, as distillation.json has it.

    Started again with the same arguments after it was stopped anywhere, it goes on at the next unfinished layer, and
    the weights come out with the same bytes (on the same kind of device, with as many threads).

    Args:
        donor: a name, folder or hub id of a Llama, as `sources.resolve` takes it.
        output_dir: the folder to make; it appears whole or not at all.
        data: tokens (sequences, length) int64, with weights as `TokenData`; a .txt or .jsonl file or a folder of them;
            or "self" for text that the donor writes.
        tokens: how many to train on and hold out; of a tensor all are taken.
        sequence_length: of text; a tensor has its own.
        steps_per_layer: of the optimizer.
        batch_size: sequences per step.
        learning_rate: its highest.
        weight_decay: AdamW's.
        seed: of everything random.
        target: what is compared: see `distill_layer`.
        mixer: `d_state`, `n_v_heads`, `n_qk_heads`, `d_conv` of the mixers where not what the donor's heads give.
        layers: those to train, the others stay as they start; all by default.
        dtype: of the weights written; the donor's by default. Training is in float32.
        device: where layers run; Ray's workers have each their own GPU or the CPU.
        memory_limit_gb: hidden states above it, in GB, are kept on the disk.
        overwrite: replace a model folder that is there.
        restart: train all layers anew; tokens that an earlier run had are kept if what decides on them is the same.
        sources: targets by name, as `resolve(overrides=...)` takes them.
        run_jobs: a `ray_jobs.RayRunner`, whose workers train some layers each; by default all are trained here.
        layers_per_job: how many are a worker's job. It puts the tokens through all layers before those.

    Raises:
        SurgeryError: for a donor that is none, text that cannot be used, a mixer or layers that cannot be, a target
            that is taken, too little disk space, layers or tokens that an earlier run had by other settings, a
            loss that is not finite.
    """
    output = Path(output_dir).expanduser()
    check_target(output, overwrite=overwrite, marker_file="config.json")
    source = resolve(donor, overrides=sources)
    if output.resolve() == source.folder.resolve():
        raise SurgeryError(f"{output} is the donor's own folder. Choose another --output_dir.")
    files, donor_config = open_donor(source)
    config = student_config(donor_config, mixer)
    config.dtype = torch_dtype(dtype) or files.dtype().torch
    chosen = sorted_layers(range(donor_config.num_hidden_layers) if layers is None else layers)
    check_range(chosen, donor_config.num_hidden_layers, str(source.folder))
    if isinstance(data, Tensor):
        data = TokenData(data)
    length = data.tokens.shape[1] if isinstance(data, TokenData) else sequence_length
    if length > donor_config.max_position_embeddings:
        raise SurgeryError(
            f"Sequences of {length} tokens are longer than the donor takes, {donor_config.max_position_embeddings} "
            f"(max_position_embeddings in {source.folder / 'config.json'}). Give a --sequence_length up to that."
        )
    text = {
        "donor": digests_of_files({*files.paths(), *tokenizer_files(source.folder)}),
        **described(data, tokens, sequence_length, seed),
    }
    training = {
        "steps_per_layer": steps_per_layer,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
        "target": target,
        "mixer": dict(mixer or {}),
    }
    # The trained mixers, float32 in the work folder, are less than the whole in float32.
    check_space(output, size_bytes(config, config.dtype) + size_bytes(config, torch.float32) + 50_000_000)

    work = WorkFolder.beside(output)
    most = most_tokens(data, tokens, sequence_length)
    if states_bytes(most, donor_config) > 1e9 * memory_limit_gb:
        check_room(work.folder, most, donor_config, work.folder.glob("states_*/*"))
    with work.held(text, training, restart=restart):
        taken = take_tokens(data, work, source.folder, donor_config, device)
        if run_jobs is None:
            _train_here(work, files, donor_config, chosen, device, 1e9 * memory_limit_gb)
        else:
            _train_by_jobs(work, source.folder, chosen, memory_limit_gb, run_jobs, layers_per_job)
        records = [work.record(index) for index in chosen]

        def layer_of(index: int, donor_tensors: dict[str, Tensor], *, trained: bool = True) -> dict[str, Tensor]:
            """The layer as it is written."""
            made = student_tensors(donor_tensors, donor_config, config, layer_seed(seed, index))
            made |= work.mixer(index) if trained and index in chosen else {}
            return {name: tensor.to(config.dtype) for name, tensor in made.items()}

        def layers_of(index: int) -> dict[str, Layer]:
            """The layer in each of the models that are compared."""
            teacher = donor_layer(files, donor_config, index, device)
            tensors = dict(files.with_prefix(f"model.layers.{index}."))
            students = {INITIAL: layer_of(index, tensors, trained=False), DISTILLED: layer_of(index, tensors)}
            return {DONOR: Teacher(teacher).output} | {
                name: _on_device(student_layer(tensors, config, device), device) for name, tensors in students.items()
            }

        held_out = taken.tokens[-taken.held_out :]
        print("Perplexity of donor, initial base and distilled base on held-out tokens ...", flush=True)
        with bar("Perplexity", donor_config.num_hidden_layers) as advance:
            found = perplexities(
                files, donor_config, held_out, layers_of, (DONOR, INITIAL, DISTILLED), lambda: advance(1)
            )
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


def _train_here(
    work: WorkFolder,
    files: TensorFiles,
    donor: LlamaConfig,
    layers: Sequence[int],
    device: str,
    memory_limit_bytes: float,
) -> None:
    """Train in this process, with a bar and a line per layer."""
    steps = work.settings()["steps_per_layer"]
    done = [index for index in layers if work.has_layer(index)]
    if done:
        print(f"{len(done)} of {len(layers)} layers are there already", flush=True)
    with LayerProgress(steps * len(layers), steps * len(done)) as progress:
        train_layers(
            work, files, donor, layers, device=device, memory_limit_bytes=memory_limit_bytes, progress=progress
        )


def _train_by_jobs(
    work: WorkFolder,
    donor_folder: Path,
    layers: Sequence[int],
    memory_limit_gb: float,
    run_jobs: Runner,
    layers_per_job: int,
) -> None:
    """Let the runner's workers train, some layers each."""
    jobs = []
    for first in range(0, len(layers), layers_per_job):
        block = layers[first : first + layers_per_job]
        if not all(work.has_layer(index) for index in block):
            places = ("--work", str(work.folder), "--donor_folder", str(donor_folder))
            arguments = (*places, "--memory_limit", str(memory_limit_gb), "--layers", *map(str, block))
            name = f"layers {block[0]} to {block[-1]}"
            jobs.append(Job(name, WORKER, arguments, needs=(donor_folder,), writes_to=work.folder))
    failed = {jobs[index].name: ended.reason for index, ended in run_jobs(jobs) if ended.reason}
    if failed:
        name, reason = next(iter(failed.items()))
        raise SurgeryError(
            f"{len(failed)} of {len(jobs)} jobs failed, {name} because: {reason} "
            "Run the same command again when that is mended: finished layers are kept."
        )


def _on_device(layer: LlambaDecoderLayer, device: str) -> Layer:
    return lambda states: layer(states.to(device)).to(states.device)
