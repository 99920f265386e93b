"""Trains the mixers of some layers in this process, one after the other: for a whole run, or for one job of a run.

Memory holds only one donor layer, one Llamba layer, and their inputs (hidden states). Large hidden states are on disk.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from model_preparation.io.folder_lock import take
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.hidden_states import HiddenStates, check_room, states_bytes
from model_preparation.train.distill.student_layer import student_config, student_layer, student_tensors
from model_preparation.train.distill.tokens import TokenData
from model_preparation.train.distill.train_layer import Step, in_order, relative_error, shuffled, train_layer
from model_preparation.train.distill.work_folder import WorkFolder

LOGGED_STEPS = 100  # about this many steps of each layer are logged, evenly spread
_SEEDS_PER_RUN = 1024  # more than any model has layers, so runs with neighbouring seeds share no layer's seed


def train_layers(work: WorkFolder, donor: Donor, layers: Sequence[int], memory_limit_bytes: float) -> None:
    """Train the layers that are not finished, with a progress bar, and a line of output for each layer.

    Args:
        work: it must have settings and tokens already.
        layers: indices of layers, sorted.
        memory_limit_bytes: hidden states larger than this are kept on the disk.
    """
    missing = [index for index in layers if not work.has_layer(index)]
    if not missing:
        return
    kept = work.tokens()
    assert kept is not None
    data = TokenData(**kept)
    size_bytes = states_bytes(data.tokens.numel(), donor.config)
    with ExitStack() as stack:
        folder = None
        if size_bytes > memory_limit_bytes:
            hold = take(work.folder / f"states_for_layer_{layers[0]:02d}")
            stack.callback(hold.release)
            folder = hold.folder
            check_room(work.folder, data.tokens.numel(), donor.config, folder.glob("*"))
            print(f"Hidden states, {decimal(size_bytes)}, are kept in {folder}", flush=True)
        steps = work.settings()["steps_per_layer"]
        bar = stack.enter_context(_LayerBar(steps * len(layers), steps * (len(layers) - len(missing))))
        states = HiddenStates(donor, data.tokens, folder, missing[0])
        for index in range(states.index, missing[-1] + 1):
            layer = donor.layer(index)
            if index in missing:
                _train(work, states, layer, donor, data, bar)
            if index < missing[-1]:
                bar.show(f"Hidden states through layer {index}")
                states.advance(layer)
            del layer  # free its memory before the next layer is read
        if folder is not None:
            states.remove()


def layer_seed(seed: int, index: int) -> int:
    """The seed of one layer's random numbers."""
    return (seed * _SEEDS_PER_RUN + index) % 2**63  # torch takes no larger seed


def _train(
    work: WorkFolder, states: HiddenStates, teacher: nn.Module, donor: Donor, data: TokenData, bar: "_LayerBar"
) -> None:
    """Train the mixer that replaces the attention of `teacher`, layer `states.index`. Save it, and print its errors."""
    started = time.monotonic()
    settings = work.settings()
    index, held_out = states.index, data.held_out
    seed = layer_seed(settings["seed"], index)
    config = student_config(donor.config, settings["mixer"])
    tensors = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    student = student_layer(student_tensors(tensors, donor.config, config, seed), config, donor.device)
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
        bar.show(f"Layer {index}, loss {step.loss:.3f}", steps=1)
        if step.step % every == 0 or step.step == steps - 1:
            log.append(step._asdict())

    initial = error()
    train_layer(
        teacher,
        student,
        shuffled(states.values[:-held_out], weights, settings["batch_size"], seed),
        steps=steps,
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        target=settings["target"],
        log=note,
    )
    final, seconds = error(), time.monotonic() - started
    mixer = {f"mixer.{name}": tensor.cpu() for name, tensor in student.mixer.state_dict().items()}
    record = {"layer": index, "initial": initial, "final": final, "log": log, "seconds": seconds}
    work.keep_layer(index, mixer, record)
    print(
        f"Layer {index}: error / variance on held-out tokens {initial:.3f} -> {final:.3f} ({seconds:.0f} s)"
        f"{', larger than before the training' if final > initial else ''}",
        flush=True,
    )


class _LayerBar(Progress):
    """A bar over the steps of all layers. Its text names the work that runs now."""

    def __init__(self, total: int, done: int):
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(*columns, transient=True)
        self._task = self.add_task("Distilling", total=total, completed=done)

    def show(self, what: str, steps: int = 0) -> None:
        self.update(self._task, advance=steps, description=what)
