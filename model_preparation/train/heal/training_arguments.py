"""Turns the settings of a healing run into the Trainer's arguments, for the current number of processes."""

import dataclasses
import importlib.metadata
import math
import os
import warnings
from pathlib import Path

import torch
from packaging.requirements import Requirement
from transformers import TrainingArguments

from model_preparation.errors import SurgeryError
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.step_size import StepSize

# The name of gradient checkpointing in the installed transformers. The newer name comes first.
_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS)

# pyproject.toml has the same ranges.
TRACKER_VERSIONS = {"trackio": "trackio>=0.15,<1", "wandb": "wandb>=0.22,<1", "swanlab": "swanlab>=0.7,<0.8"}


class _Arguments(TrainingArguments):
    """Arguments with the chosen device. By default, the Trainer takes the first GPU."""

    chosen: torch.device | None = None

    @property
    def device(self) -> torch.device:
        own = super().device  # this call has side effects that the Trainer needs
        return self.chosen or own


def training_arguments(
    settings: HealSettings, states: Path, run_id: str, size: StepSize, world_size: int, device: str, *, resumed: bool
) -> TrainingArguments:
    if settings.precision == "float16" and device == "cpu":
        raise SurgeryError("float16 needs a GPU. Use --precision bfloat16 or float32 on the CPU.")
    for tracker in ("WANDB", "SWANLAB"):  # trackio knows a run by its name
        os.environ.setdefault(f"{tracker}_RUN_ID", run_id)
        os.environ.setdefault(f"{tracker}_RESUME", "allow")
    max_steps = size.steps_here(settings.max_steps)
    rise = math.floor(settings.warmup * max_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns on the CPU, for example about pinned memory
        args = _Arguments(
            output_dir=str(states),
            max_steps=max_steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=size.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
            warmup_steps=rise if rise > 1 else 0,  # a rise begins at rate 0, so a single step would be wasted
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bfloat16",
            fp16=settings.precision == "float16",
            **{CHECKPOINTING: settings.gradient_checkpointing},
            torch_compile=settings.compile,
            seed=settings.seed,
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if settings.eval_interval else "no",
            eval_steps=size.steps_here(settings.eval_interval) if settings.eval_interval else None,
            eval_on_start=bool(settings.eval_interval) and not resumed,
            metric_for_best_model="loss" if settings.eval_interval else None,
            greater_is_better=False,
            save_strategy="steps" if settings.always_save else "best",
            save_steps=settings.save_steps,
            report_to=settings.report_to,
            run_name=f"{states.name}-{run_id}",
            use_cpu=device == "cpu",
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
        )
    place = torch.device(device)
    if args.device.type != place.type:
        raise SurgeryError(f"Healing would run on {args.device.type}, not on --device {device}. Give --device cpu.")
    if place.type == "cuda" and world_size == 1:
        torch.cuda.set_device(place)
        args.chosen = place
        args._n_gpu = 1  # otherwise the Trainer uses DataParallel; several GPUs need a launcher here
    return args


def check_tracker(settings: HealSettings) -> None:
    """Raise SurgeryError if the tracker is not installed, or its version does not work."""
    if settings.report_to == "none":
        return
    wanted = Requirement(TRACKER_VERSIONS[settings.report_to])
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        state = "is not installed" if found is None else f"{found} does not work here"
        raise SurgeryError(
            f"{wanted.name} {state}, but --report_to asks for it. Run: pip install '{TRACKER_VERSIONS[wanted.name]}'"
        )
