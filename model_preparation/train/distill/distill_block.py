"""Some layers of a distillation, one after the other, in this process: a whole run, or one worker's part of it.

In: the work folder with settings and tokens, the donor, the layers. Out: each layer's file in the work folder. In
memory are a donor's layer, a student's layer and the hidden states that enter them, or these on the disk beyond
a limit.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.filesize import decimal
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from model_preparation.io.folder_lock import take
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.train.distill.distill_data import TokenData
from model_preparation.train.distill.distill_layer import Step, distill_layer, in_order, relative_error, shuffled
from model_preparation.train.distill.distill_progress import LayerProgress
from model_preparation.train.distill.hidden_states import HiddenStates, check_room, states_bytes
from model_preparation.train.distill.student_layer import student_config, student_layer, student_tensors
from model_preparation.train.work_folder import WorkFolder

LOGGED_STEPS = 100  # of each layer, evenly spread
_SEEDS_PER_RUN = 1024  # more than a model has layers, so that runs with seeds side by side share none


def train_layers(
    work: WorkFolder,
    files: TensorFiles,
    donor: LlamaConfig,
    layers: Sequence[int],
    *,
    device: str,
    memory_limit_bytes: float,
    progress: LayerProgress,
) -> None:
    """Train those of `layers`, which are sorted, that are not finished.

    Args:
        work: begun, with its tokens.
        files: the donor's.
        donor: its config.
        memory_limit_bytes: up to which hidden states stay in memory.
        progress: told what is done.
    """
    missing = [index for index in layers if not work.has_layer(index)]
    if not missing:
        return
    data = work.tokens()
    assert data is not None
    size_bytes = states_bytes(data.tokens.numel(), donor)
    with ExitStack() as stack:
        folder = None
        if size_bytes > memory_limit_bytes:
            hold = take(work.folder / f"states_for_layer_{layers[0]:02d}")
            stack.callback(hold.release)
            folder = hold.folder
            check_room(work.folder, data.tokens.numel(), donor, folder.glob("*"))
            print(f"Hidden states, {decimal(size_bytes)}, are kept in {folder}", flush=True)
        states = HiddenStates(files, donor, data.tokens, folder, missing[0], device)
        for index in range(states.index, missing[-1] + 1):
            layer = states.layer()
            if index in missing:
                progress.finished(_train(work, states, layer, donor, data, device, progress))
            if index < missing[-1]:
                progress.passing(index)
                states.advance(layer)
            del layer  # before the next one is read
        if folder is not None:
            states.remove()


def layer_seed(seed: int, index: int) -> int:
    """The seed of what is random in one layer of a run."""
    return (seed * _SEEDS_PER_RUN + index) % 2**63  # torch takes no larger ones


def _train(
    work: WorkFolder,
    states: HiddenStates,
    teacher: LlamaDecoderLayer,
    donor: LlamaConfig,
    data: TokenData,
    device: str,
    progress: LayerProgress,
) -> dict[str, Any]:
    """Train the counterpart of `teacher`, which the states enter, and keep it; returns its record."""
    started = time.monotonic()
    settings = work.settings()
    index, held_out = states.index, data.held_out
    seed = layer_seed(settings["seed"], index)
    config = student_config(donor, settings["mixer"])
    tensors = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    student = student_layer(student_tensors(tensors, donor, config, seed), config, device)
    weights, held_out_weights = None, None
    if data.weights is not None:
        weights, held_out_weights = data.weights[:-held_out], data.weights[-held_out:]

    def error() -> float:
        batches = in_order(states.values[-held_out:], held_out_weights)
        return relative_error(teacher, student, batches, settings["target"])

    steps = settings["steps_per_layer"]
    every = max(1, steps // LOGGED_STEPS)
    log = []

    def note(step: Step) -> None:
        progress.step(index, step)
        if step.step % every == 0 or step.step == steps - 1:
            log.append(step._asdict())

    initial = error()
    distill_layer(
        teacher,
        student,
        shuffled(states.values[:-held_out], weights, settings["batch_size"], seed),
        steps=steps,
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        target=settings["target"],
        log=note,
    )
    record = {"layer": index, "initial": initial, "final": error(), "log": log, "seconds": time.monotonic() - started}
    mixer = {f"mixer.{name}": tensor.cpu() for name, tensor in student.mixer.state_dict().items()}
    work.keep_layer(index, mixer, record)
    return record
