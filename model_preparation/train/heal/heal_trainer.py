"""transformers' Trainer for healing: the losses of healing, and states from which a run resumes exactly.

It differs from the Trainer mainly in four ways. A state is written into a staging folder, gets digests, and
is then renamed. A state holds only tensors and plain values. A state keeps the part of the loss that was not
logged yet. Which data come next depends on the number of sequences seen, not on the number of processes. With
FSDP, the weights in a state are shards in the format of torch.distributed.checkpoint.
"""

import contextlib
import json
import math
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder
from model_preparation.io.complete_folder import new_folder
from model_preparation.train.heal.adapters import adapter_of, load_adapter_weights, write_adapter
from model_preparation.train.heal.conversation_tokens import NOT_COUNTED
from model_preparation.train.heal.losses import Distillation, losses_of
from model_preparation.train.heal.resume_state import (
    STATE_FILE,
    TRAINER_STATE,
    copy_state,
    finish_state,
    list_states,
    load_plain,
    place_for,
    restoring,
    rotate,
)
from model_preparation.train.heal.run import Run
from model_preparation.train.heal.segments import segments
from model_preparation.train.heal.sequences import Sequences, Shuffled, collate

_WEIGHTS = "model.safetensors"
_OPTIMIZER, _SCHEDULER, _SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
_ARGUMENTS = "training_args.json"


class HealTrainer(Trainer):
    """A Trainer whose run can be killed at any time, and then resumes with the same result.

    Args:
        model: a model whose `requires_grad` says which weights are trained, or a PeftModel.
        args: the Trainer's own; `max_steps` counts steps with the current number of processes.
        sequences_per_step: sequences of all processes together.
        states: the folder of the run's states.
        distillation: the loss against a teacher, or None for the loss on the text.
        milestones: steps at which a state is saved and never removed, each with the name of this state.

    Attributes:
        first_step: the step at which training begins or resumes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        run: Run,
        *,
        sequences_per_step: int,
        train: Sequences,
        held_out: Sequences | None,
        states: Path,
        distillation: Distillation | None,
        milestones: Mapping[int, str],
        callbacks: list[TrainerCallback],
    ):
        self._settings, self._identity, self._resumed = run.settings, run.identity, run.state
        self._sequences = train
        self._states = states
        self._distillation = distillation
        self.milestones = milestones
        self._held_out_losses: list[torch.Tensor] = []  # of the current evaluation, one (sequences, 2) per batch
        self._per_step = sequences_per_step
        # After the number of processes changed, the offset counts the sequences seen beyond whole steps.
        seen = 0 if run.state is None else run.state.sequences_seen
        self.first_step, self._offset = divmod(seen, sequences_per_step)
        shuffled = Shuffled(train, run.settings.seed, self._offset, args.max_steps * self._per_step)
        if args.should_save:
            make_folder(states)  # transformers makes it too, but then a power cut can lose it
        super().__init__(
            model=model,
            args=args,
            train_dataset=shuffled,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=[*callbacks, _OwnCallback(self)],
        )

    @property
    def is_lora(self) -> bool:
        """Whether only an adapter is trained. Then a state has no other weights."""
        return isinstance(self._bare_model, PeftModel)

    @property
    def _bare_model(self) -> Any:
        """The model without the wrappers of accelerate and torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def sequences_seen(self) -> int:
        """Sequences seen by all processes together, since the run was first started."""
        return self.state.global_step * self._per_step + self._offset

    @property
    def passes(self) -> float:
        """The number of passes over the training sequences so far."""
        return self.sequences_seen / len(self._sequences)

    def train_to_end(self) -> None:
        """Train until `max_steps`, from the run's state if it has one."""
        self.train(resume_from_checkpoint=None if self._resumed is None else str(self._resumed.folder))

    def load_best(self) -> None:
        """Load the weights of the lowest held-out loss, if a state has them."""
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)

    def weights(self) -> dict[str, torch.Tensor]:
        """In the main process, the whole model's tensors by name, on the CPU; in other processes, an empty dict.

        Every process must call this, because the tensors are put together from the shards of all processes.
        """
        weights = {}
        for name, tensor in self._bare_model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.args.should_save:
                weights[name] = whole.detach().to("cpu")
        return weights

    def create_accelerator_and_postprocess(self) -> None:
        """Also allow FSDP on the CPU. accelerate does not, although FSDP2 runs over gloo."""
        super().create_accelerator_and_postprocess()
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        state = self.accelerator.state
        if wanted and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    # --- Data and loss ------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one segment: on the text, or against the teacher."""
        outputs = model(**_for_model(inputs), output_hidden_states=self._settings.hidden_weight > 0)
        if self._distillation is not None:
            loss = self._distillation.loss(outputs, inputs, num_items_in_batch)
        else:
            loss = losses_of(outputs.logits, inputs["targets"]).sum() / num_items_in_batch
        if num_items_in_batch is not None:  # the count is of all processes, but gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on one segment after the other; the gradients add up."""
        total = 0
        for segment in self._segments(self._prepare_inputs(inputs)):
            total += super().training_step(model, segment, num_items_in_batch)
        return total

    def _segments(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        width = self._settings.block_size if self.args.world_size > 1 else 0
        return segments(inputs, self._settings.segment_length, self._bare_model.config, width)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Also keep, for each held-out sequence, the sum of its losses and the number of its tokens that count."""
        found = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for segment in self._segments(self._prepare_inputs(inputs)):
                losses = losses_of(model(**_for_model(segment)).logits, segment["targets"])
                found.append(torch.stack([losses, segment["targets"] != NOT_COUNTED], dim=-1).sum(1))
        of_each = torch.stack(found).sum(0)  # (batch, 2)
        self._held_out_losses.append(self.accelerator.gather_for_metrics(of_each))
        losses = of_each[:, 0] / of_each[:, 1].clamp(min=1)
        return losses.mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Count each token once in the mean. The Trainer's own mean includes sequences repeated to fill batches."""
        self._held_out_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = torch.cat(self._held_out_losses).double().sum(0)
        output.metrics[f"{metric_key_prefix}_loss"] = (total / count).item()
        return output

    def log(self, logs, start_time=None):
        """Log with the number of passes over the data as the epoch."""
        self._check_finite([logs[name] for name in ("loss", "eval_loss") if name in logs])
        self.state.epoch = self.passes
        super().log(logs, start_time)

    def _check_finite(self, losses: list[float]) -> None:
        """Raise SurgeryError for a loss that is not finite, before a useless state is written."""
        for loss in losses:
            if not math.isfinite(loss):
                raise SurgeryError(
                    f"The loss is {loss} at step {self.state.global_step}. Use a smaller --learning_rate, and start "
                    "again (--resume never --overwrite) or from an earlier state (--resume DIR)."
                )

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best or self._settings.always_save
        return is_best

    # --- Writing a state ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        step = self.state.global_step
        states, world_size = list_states(self._states)[0], self.args.world_size
        of_others = {state.folder.name for state in states if state.info["world_size"] != world_size}
        target = place_for(self._states, step, world_size, of_others)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(target)
        unlogged = gather_object([self._tr_loss.item()])
        self._check_finite(unlogged)
        with self._staged(target) as staging:
            self.save_model(str(staging), _internal_call=True)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / TRAINER_STATE))
                arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
                (staging / _ARGUMENTS).write_text(arguments + "\n", encoding="utf-8")
                finish_state(staging, self._state_info(unlogged))
        if self.args.should_save:
            if step in self.milestones:
                milestone = self._states / self.milestones[step]
                with new_folder(milestone, overwrite=True, marker_file=STATE_FILE) as staging:
                    copy_state(target, staging)
            best = self.state.best_model_checkpoint
            rotate(self._states, self._settings.save_total_limit, None if best is None else Path(best).name)
        self.accelerator.wait_for_everyone()

    def _state_info(self, unlogged: list[float]) -> dict[str, Any]:
        return {
            "iter_num": self.state.global_step,
            "epoch": self.passes,
            "sequences_seen": self.sequences_seen,
            "best_val_loss": self.state.best_metric,
            "world_size": self.args.world_size,
            "settings": self._settings.as_dict(),
            **self._identity,
            "unlogged": {"losses": unlogged, "last_logged": self._globalstep_last_logged},
        }

    @contextlib.contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """A staging folder for all processes. The main process renames it when all are done."""
        with contextlib.ExitStack() as stack:
            place: list[Any] = [None]
            if self.args.should_save:
                place[0] = str(stack.enter_context(new_folder(target, overwrite=True, marker_file=STATE_FILE)))
            if self.args.world_size > 1:
                broadcast_object_list(place)
            yield Path(place[0])

    def _save(self, output_dir=None, state_dict=None) -> None:
        if not self.args.should_save or self.is_fsdp_enabled:  # _save_optimizer_and_scheduler writes the shards
            return
        if self.is_lora:
            write_adapter(adapter_of(self._bare_model), Path(output_dir))
        else:
            save_model(self._bare_model, str(Path(output_dir, _WEIGHTS)), metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            _save_plain(self.optimizer.state_dict(), Path(output_dir, _OPTIMIZER))
            _save_plain(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    def _save_rng_state(self, output_dir) -> None:
        kind, keys, *rest = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state_all()
        _save_plain(states, Path(output_dir, self._rng_file()))

    def _rng_file(self) -> str:
        return "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"

    # --- Resuming from a state ----------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        verbosity = logging.get_verbosity()
        # After a change of the number of processes, transformers would warn that the intervals differ.
        logging.set_verbosity_error()
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        logging.set_verbosity(verbosity)
        if self._resumed is None:
            return 0, 0
        old, new = self._resumed.steps, self.first_step
        self.state.global_step = new
        if old != new:  # convert earlier steps to steps with the current number of processes
            for entry in self.state.log_history:
                entry["step"] = entry["step"] * new // old
            if self.state.best_global_step is not None:
                self.state.best_global_step = self.state.best_global_step * new // old
        best = self.state.best_model_checkpoint
        if best is not None:  # the run's folder may have moved, or the state may be in another folder
            places = [folder / Path(best).name for folder in (self._states, self._resumed.folder.parent)]
            here = next((str(place) for place in places if (place / STATE_FILE).is_file()), None)
            self.state.best_model_checkpoint = here
            if here is None:  # the best state is gone: let a later state become the best
                self.state.best_metric = self.state.best_global_step = None
        return 0, new * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if self.is_lora:
            load_adapter_weights(self._bare_model, folder)
        else:
            with restoring(folder / _WEIGHTS):
                load_model(self._bare_model, folder / _WEIGHTS, strict=True)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            for part, name in ((self.optimizer, _OPTIMIZER), (self.lr_scheduler, _SCHEDULER)):
                with restoring(folder / name):
                    part.load_state_dict(load_plain(folder / name))
        self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Set the schedule to the run's step. It is not the saved step if the number of processes changed."""
        scheduler, step = self.lr_scheduler, self.first_step
        rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_scaler(self, checkpoint) -> None:
        path = None if checkpoint is None else Path(checkpoint, _SCALER)
        if path is not None and path.is_file():
            with restoring(path):
                self.accelerator.scaler.load_state_dict(load_plain(path))

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None or self._resumed is None:
            return
        if self._resumed.info["world_size"] != self.args.world_size:
            # The saved random states do not match these processes.
            set_seed((self._settings.seed + self.sequences_seen) % 2**31, device_specific=True)
            return
        path = Path(checkpoint, self._rng_file())
        with restoring(path):
            states = load_plain(path)
            kind, keys, *rest = states["numpy"]
            random.setstate(states["python"])
            np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(states["cuda"])

    def take_unlogged_loss(self) -> None:
        """Add the loss that the state had not logged yet. If the number of processes changed, each adds the mean."""
        if self._resumed is None:
            return
        unlogged = self._resumed.info["unlogged"]
        losses, old, new = unlogged["losses"], self._resumed.steps, self.first_step
        same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
        self._globalstep_last_logged = unlogged["last_logged"] * new // old if old else 0


class _OwnCallback(TrainerCallback):
    """Adds the unlogged loss after the Trainer has reset its loss, and saves a state at each milestone."""

    def __init__(self, trainer: HealTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.take_unlogged_loss()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self._trainer.milestones


def _for_model(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in segment.items() if name not in ("targets", "sequence", "start", "skipped")}


def _save_plain(content: Any, path: Path) -> None:
    """torch.save into an open file: a full disk then raises an OSError, not an error of torch."""
    with path.open("wb") as file:
        torch.save(content, file)
