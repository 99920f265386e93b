"""Healing: trains a grafted checkpoint (the parent) a little more, and writes a new one. The parent is only read.

States of the training are saved in a folder next to the new checkpoint. A stopped run resumes from the newest state.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers.trainer_callback import PrinterCallback

from model_preparation.checkpoint.checkpoint_folder import ADAPTER, write_healed
from model_preparation.checkpoint.checkpoint_info import FORMATS, INFO, check_format, current_score, read_info
from model_preparation.checkpoint.load import bare_model, load_checkpoint
from model_preparation.checkpoint.model_digests import digest_of_checkpoint
from model_preparation.checkpoint.smoke_test import PROMPT
from model_preparation.checkpoint.wrapper_prefixes import without_wrapper_prefixes
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_folder import check_space, check_target
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.untrusted.untrusted_files import without_links
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.heal.adapters import adapter_of, load_adapter, merge, write_adapter
from model_preparation.train.heal.callbacks import Console, SaveWhenStopped
from model_preparation.train.heal.heal_trainer import HealTrainer
from model_preparation.train.heal.result import healing_record, log_files, scores, texts_of
from model_preparation.train.heal.resume_state import PREFIX, list_states, remove_states
from model_preparation.train.heal.run import Run, begin_or_resume, in_memory
from model_preparation.train.heal.self_conversations import FOLDER
from model_preparation.train.heal.sequences import Sequences
from model_preparation.train.heal.settings import PATHS, HealSettings
from model_preparation.train.heal.step_size import StepSize, milestones_here, step_size
from model_preparation.train.heal.training_arguments import check_tracker, training_arguments


def heal_checkpoint(
    checkpoint: str | Path,
    data: str,
    output_dir: str | Path,
    settings: HealSettings | None = None,
    *,
    resume: str | bool = "auto",
    resume_dir: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    description: str = "",
    prompts: Sequence[str] | None = None,
    milestones: Mapping[int, str] | None = None,
    clean_up: bool = False,
    sources: Mapping[str, str] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Heal a checkpoint. Returns the content of its new checkpoint_info.json, or {} in all but the main process.

    Args:
        checkpoint: a folder written by `build_checkpoint`, or by this function.
        data: texts or conversations, see `sequences.load_sequences`; "self": the donor writes conversations.
        output_dir: the new checkpoint's folder; it appears whole or not at all.
        settings: `HealSettings()` by default. A resumed run keeps its saved ones, with few exceptions such as
            `max_steps`, and says which given ones it ignores.
        resume: "auto" or True to resume from the newest complete state if there is one, "never" or False to start
            again, or the folder of a state.
        resume_dir: the folder of the states; by default `output_dir` with `_resume` after it.
        device: where to train, unless a launcher such as torchrun chooses the devices.
        dtype: of the new checkpoint; by default its parent's. Weights are float32 during the training.
        format: of the new checkpoint, as `build_checkpoint` takes it; by default its parent's.
        overwrite: replace a checkpoint in `output_dir`; with resume "never", also remove the states of an earlier run.
        description: free text for checkpoint_info.json.
        prompts: texts that the model continues greedily before and after the training; by default one sentence.
        milestones: steps at which a state is saved and never removed, each with the name of this state.
        clean_up: remove the states once the checkpoint is written.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them; for the teacher and `init_from`.
        given: fields of `HealSettings` that replace those of `settings`.

    Raises:
        SurgeryError: for any problem that the user can solve, such as a damaged state, data that are not the resumed
            run's, or a full disk.
        KeyboardInterrupt, SystemExit: if the user stopped the run. During the training, the first signal saves the
            state, and a second one stops the run at once.
    """
    given = ({} if settings is None else settings.as_dict()) | given
    if unknown := sorted(given.keys() - HealSettings.__dataclass_fields__.keys()):
        raise SurgeryError(
            f"HealSettings has no {', '.join(unknown)}. It has {', '.join(HealSettings.__dataclass_fields__)}."
        )
    parent, output_dir = Path(checkpoint).expanduser(), Path(output_dir).expanduser()
    dtype = torch_dtype(dtype)
    states = Path(resume_dir).expanduser() if resume_dir else Path(f"{os.path.abspath(output_dir)}_resume")
    without_links(states.resolve() if resume_dir else states)
    only_read = [parent, data, *(given.get(name) for name in PATHS)]
    for flag, place in (("--output_dir", output_dir), ("--resume_dir", states)):
        _check_apart(flag, place, parent, *only_read)
    if output_dir.resolve() == states.resolve():
        raise SurgeryError(f"{states} cannot hold both the states and the checkpoint. Choose another --resume_dir.")
    if states.exists() and not states.is_dir():
        raise SurgeryError(f"{states} is a file, but states need a folder. Choose another --resume_dir.")
    if isinstance(resume, bool):
        resume = "auto" if resume else "never"
    if given.get("init_from") == "resume":
        del given["init_from"]
        resume = "must" if resume == "auto" else resume
    parent_info, format, dtype = parent_of(parent, format, dtype)
    processes = PartialState(cpu=device == "cpu")
    is_main = processes.is_main_process
    say = print if is_main else lambda *words: None
    if is_main:
        check_target(output_dir, overwrite=overwrite, marker_file=INFO)
    run = begin_or_resume(
        parent,
        parent_info,
        states,
        given,
        resume=resume,
        overwrite=overwrite,
        processes=processes,
        sources=sources,
        say=say,
    )
    settings, state, identity = run.settings, run.state, run.identity
    parent_info["mmlu_score"] = current_score(parent_info, identity["inputs"]["parent"])
    check_tracker(settings)

    set_seed(settings.seed)
    model, tokenizer = run.load_model()
    train, held_out = run.load_data(data, tokenizer, processes, states, device)
    if held_out is not None and held_out.digest() == train.digest():
        say("The held-out text is the training text, so its loss cannot show overfitting. Give other --eval_data.")
    if state is not None and prompts is not None and list(prompts) != [text["prompt"] for text in identity["texts"]]:
        say("The run keeps the prompts that it began with: --prompt is ignored.")
    if state is None:
        prompts = (PROMPT,) if prompts is None else prompts
        written = texts_of(model, tokenizer, prompts) if is_main else []
        identity["texts"] = [{"prompt": p, "text": text} for p, text in zip(prompts, written, strict=False)]
    size = step_size(settings, identity["started_world_size"], processes.num_processes)
    args = training_arguments(
        settings, states, identity["run_id"], size, processes.num_processes, device, resumed=state is not None
    )
    kept = milestones_here(milestones or {}, settings, size)
    for step, name in kept.items():
        if state is not None and step <= state.sequences_seen // size.sequences and not (states / name).is_dir():
            say(f"The milestone {name} is not saved: the run is past its step {step}.")
    stopper = SaveWhenStopped()
    trainer = HealTrainer(
        run.choose_trained_weights(model),
        args,
        run,
        sequences_per_step=size.sequences,
        train=train,
        held_out=held_out,
        states=states,
        distillation=run.distillation(model, tokenizer, train, processes, args.device),
        milestones=kept,
        callbacks=[Console(), stopper],
    )
    trainer.remove_callback(PrinterCallback)
    if is_main:
        _check_room(trainer, states, output_dir, dtype, FORMATS[format])
    say(_describe(trainer, settings, size, train, held_out))
    if state is not None and trainer.first_step > args.max_steps:
        raise SurgeryError(
            f"{state.folder} has done {trainer.first_step} steps, more than --max_steps {args.max_steps}. "
            "Give a larger --max_steps, or an earlier state by --resume DIR."
        )
    if state is not None and trainer.first_step == args.max_steps:
        say(f"{state.folder.name} has done all of these steps. It becomes the checkpoint; nothing is trained.")
    try:
        _train(trainer, states)
    finally:
        stopper.restore_handlers()
    if stopper.received is not None and trainer.state.global_step < args.max_steps:
        say(f"Stopped after step {trainer.state.global_step}. The same command resumes from {states}.")
        raise KeyboardInterrupt if stopper.received == signal.SIGINT else SystemExit(128 + stopper.received)
    if settings.load_best:
        if settings.eval_interval and trainer.state.best_model_checkpoint is None:
            say(f"The state of the lowest held-out loss is not in {states} any more: the last weights are used.")
        trainer.load_best()
    tensors = trainer.weights()
    info: dict[str, Any] = {}
    if is_main:
        healed, extras = _healed_model(parent_info, tensors, run, dtype)
        texts_after = texts_of(healed, tokenizer, [text["prompt"] for text in identity["texts"]])
        info = write_healed(
            healed,
            parent,
            parent_info,
            tokenizer,
            output_dir,
            healing=healing_record(trainer, run, parent_info, texts_after),
            format=format,
            description=description,
            overwrite=overwrite,
            extras=extras | log_files(trainer),
        )
        if clean_up:
            remove_states(state.folder for state in list_states(states)[0])
            for folder in states.glob(f"{FOLDER}_*"):
                shutil.rmtree(folder)
            if not any(states.iterdir()):
                states.rmdir()
    processes.wait_for_everyone()
    return info


def merge_adapter(
    checkpoint: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    description: str = "",
) -> dict[str, Any]:
    """Merge an adapter into a checkpoint, and write a new checkpoint. Returns the new checkpoint_info.json.

    Raises:
        SurgeryError: if there is no such checkpoint or adapter, or the two do not fit.
    """
    parent, adapter = Path(checkpoint).expanduser(), Path(adapter).expanduser()
    output_dir = Path(output_dir).expanduser()
    parent_info, format, dtype = parent_of(parent, format, torch_dtype(dtype))
    _check_apart("--output_dir", output_dir, parent, parent, adapter)
    check_target(output_dir, overwrite=overwrite, marker_file=INFO)
    model, tokenizer = load_checkpoint(parent, dtype=torch.float32)
    healed, extras = _merged(load_adapter(in_memory(model), adapter), parent_info, dtype)
    mmlu_before = current_score(parent_info, digest_of_checkpoint(parent))
    return write_healed(
        healed,
        parent,
        parent_info,
        tokenizer,
        output_dir,
        healing={
            "method": "lora",
            "adapter": adapter.resolve().name,
            "steps": 0,
            "scores": {"before": scores(None, mmlu_before), "after": scores(None, None)},
        },
        format=format,
        description=description,
        overwrite=overwrite,
        extras=extras,
    )


def parent_of(parent: Path, format: str | None, dtype: torch.dtype | None) -> tuple[dict[str, Any], str, torch.dtype]:
    """The parent's info, and the format and dtype of the new checkpoint: those given, or else the parent's."""
    info = dict(read_info(parent))
    format = format or info.get("format", "pt")
    check_format(format)
    return info, format, dtype or getattr(torch, info["dtype"])


def _check_apart(flag: str, written: Path, parent: Path, *read: str | Path | None) -> None:
    """Raise SurgeryError if `written` is inside the parent, or if `written` is or contains anything in `read`."""
    place = written.resolve()
    if place.is_relative_to(parent.resolve()) and place != parent.resolve():
        raise SurgeryError(f"{parent} is only read, but {written} is inside it. Choose a {flag} outside.")
    for path in read:
        found = None if path is None else Path(path).expanduser().resolve()
        if found is not None and found.exists() and found.is_relative_to(place):
            where = f"{flag} is that folder too" if found == place else f"{flag} {written} contains it"
            raise SurgeryError(f"{path} is only read here, but {where}. Choose another {flag}.")


def _check_room(trainer: HealTrainer, states: Path, output_dir: Path, dtype: torch.dtype, copies: int) -> None:
    """Raise SurgeryError if one state, or the checkpoint, is too large for its disk."""
    count = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    weights = trained if trainer.is_lora else count
    check_space(states / PREFIX, 4 * (weights + 2 * trained))  # float32, and AdamW's two moments
    check_space(output_dir, copies * count * dtype.itemsize)


def _train(trainer: HealTrainer, states: Path) -> None:
    try:
        with warnings.catch_warnings():
            # DDP warns that the convolution's gradient has other strides. They differ only on an axis of length 1.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # The logits are a view without the padding of the vocabulary. Nothing writes into them.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            trainer.train_to_end()
    except OSError as error:
        newest = list_states(states)[0][-1:]
        kept = f"{newest[0].folder} is complete: the same command resumes from there" if newest else "Start again"
        raise SurgeryError(
            f"The state of step {trainer.state.global_step} could not be written ({error.strerror or error}). "
            f"Make room. {kept}."
        ) from error


def _healed_model(
    parent_info: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], run: Run, dtype: torch.dtype
) -> tuple[LlambaForCausalLM, dict[str, Any]]:
    """The model to write, and functions that write the other items of its folder, by the items' names."""
    tensors = without_wrapper_prefixes(tensors)
    if run.settings.method != "lora":
        return bare_model(parent_info, tensors, dtype), {}
    adapted = run.with_adapter(run.load_model()[0])  # a new model, because the trained one may be in shards
    adapted.load_state_dict(tensors)
    return _merged(adapted, parent_info, dtype)


def _merged(
    adapted: Any, parent_info: Mapping[str, Any], dtype: torch.dtype
) -> tuple[LlambaForCausalLM, dict[str, Any]]:
    """The merged model, and {`ADAPTER`: the function that writes the adapter into a folder}."""
    adapter = adapter_of(adapted)
    return bare_model(parent_info, merge(adapted).state_dict(), dtype), {ADAPTER: partial(write_adapter, adapter)}


def _describe(
    trainer: HealTrainer, settings: HealSettings, size: StepSize, train: Sequences, held_out: Sequences | None
) -> str:
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    held = "none held out" if held_out is None else f"{len(held_out)} held out"
    return (
        f"Training {count:,} of {total:,} parameters (method {settings.method}) on {train}, {held}; "
        f"{trainer.args.max_steps} steps of {size.sequences} sequences."
    )
