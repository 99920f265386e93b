"""Healing: a grafted checkpoint trained a little more, into a new checkpoint.

In: a checkpoint's folder, text, settings. Out: another checkpoint's folder, which says what it was healed from, on
what, how, and the scores before and after; beside it, while and after it is made, a folder of states from which the run
goes on wherever it was stopped. The parent is only read.
"""

import json
import math
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from model_preparation.checkpoint.checkpoint_info import FORMATS, INFO, check_format, current_score, read_info
from model_preparation.checkpoint.checkpoint_loading import load_checkpoint, without_wrapper_prefixes
from model_preparation.checkpoint.healed_folder import ADAPTER, LOSS_CURVE, TRAINING_LOG, bare_model, write_healed
from model_preparation.checkpoint.model_digests import digest_of_checkpoint
from model_preparation.checkpoint.trial import PROMPT
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import generate_text
from model_preparation.io.names import name_of
from model_preparation.io.new_folder import check_space, check_target
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.untrusted.untrusted_files import without_links
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.train.heal.adapters import adapter_of, load_adapter, merge, write_adapter
from model_preparation.train.heal.arguments import check_tracker, milestones_here, training_arguments
from model_preparation.train.heal.callbacks import Console, SaveMilestones, SaveWhenStopped
from model_preparation.train.heal.heal_trainer import HealTrainer
from model_preparation.train.heal.loss_curve import plot_losses
from model_preparation.train.heal.resume_state import PREFIX, list_states, remove_states
from model_preparation.train.heal.run_model import (
    Run,
    distillation_of,
    in_memory,
    load_data,
    with_adapter,
    with_trained_weights_chosen,
)
from model_preparation.train.heal.run_start import check_data, settings_and_identity, state_to_go_on_from
from model_preparation.train.heal.sequences import Sequences
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.step_size import StepSize, step_size
from model_preparation.train.heal.trainable import trained_layers

_NEW_TOKENS = 40  # of the texts before and after
_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "step")  # nothing that depends on the clock


def heal_checkpoint(
    checkpoint: str | Path,
    data: str,
    output_dir: str | Path,
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
    """Heal a checkpoint; returns the new one's checkpoint_info.json (of processes but the main one, an empty dict).

    Args:
        checkpoint: a folder written by `build_checkpoint`, or by this.
        data: text; see `sequences.load_sequences`.
        output_dir: the new checkpoint's folder; it appears whole or not at all.
        resume: "auto" or True to go on from the newest complete state if there is one, "never" or False to start anew,
            or the folder of a state.
        resume_dir: of the states; by default `output_dir` with `_resume` after it.
        device: where to train, where no launcher has decided that.
        dtype: of the new checkpoint; by default its parent's. Training has its weights in float32.
        format: of the new checkpoint, as `build_checkpoint` takes it; by default its parent's.
        overwrite: replace a checkpoint in `output_dir`, and with resume "never" the states of an earlier run.
        description: free text for checkpoint_info.json.
        prompts: texts to go on with before and after, greedily; by default one sentence.
        milestones: by step, the name of a state that is never rotated away.
        clean_up: remove the states once the checkpoint is there.
        sources: targets by name, as `resolve(overrides=...)` takes them; for the teacher and `init_from`.
        given: fields of `HealSettings`; of a run that goes on the saved ones count.

    Raises:
        SurgeryError: for anything the user can put right: a damaged state, other data than before, a full disk, ...
        KeyboardInterrupt, SystemExit: if the run was asked to stop; its state is on the disk then.
    """
    parent, output_dir = Path(checkpoint).expanduser(), Path(output_dir).expanduser()
    dtype = torch_dtype(dtype)
    states = Path(resume_dir).expanduser() if resume_dir else Path(f"{os.path.abspath(output_dir)}_resume")
    without_links(states.resolve() if resume_dir else states)
    only_read = [parent, data, *(given.get(name) for name in ("teacher", "init_from", "eval_data"))]
    for place in (output_dir, states):
        _check_apart(place, parent, *only_read)
    if output_dir.resolve() == states.resolve():
        raise SurgeryError(f"{states} cannot hold both the states and the checkpoint. Choose another --resume_dir.")
    if states.exists() and not states.is_dir():
        raise SurgeryError(f"{states} is a file, and states are folders in it. Choose another --resume_dir.")
    if isinstance(resume, bool):
        resume = "auto" if resume else "never"
    parent_info = read_info(parent)
    format = format or parent_info.get("format", "pt")
    check_format(format)
    processes = PartialState(cpu=device == "cpu")
    say = print if processes.is_main_process else _say_nothing
    if processes.is_main_process:
        check_target(output_dir, overwrite=overwrite, marker_file=INFO)
    if given.get("init_from") == "resume":
        given = {name: value for name, value in given.items() if name != "init_from"}
        resume = "must" if resume == "auto" else resume
    state = state_to_go_on_from(states, resume, overwrite, processes, say)
    settings, identity = settings_and_identity(state, given, parent, parent_info, processes, sources, say)
    parent_info = {**parent_info, "mmlu_score": current_score(parent_info, identity["inputs"]["parent"])}
    run = Run(parent, settings, state, sources, say)
    check_tracker(settings)

    set_seed(settings.seed)
    model, tokenizer = run.load_model()
    train, held_out = load_data(data, tokenizer, settings)
    check_data(data, train, held_out, state, identity)
    if held_out is not None and held_out.digest() == train.digest():
        say("The held-out text is the text trained on: its loss says nothing about any other. Give other --eval_data.")
    if state is not None and prompts is not None and list(prompts) != [text["prompt"] for text in identity["texts"]]:
        say("The prompts stay those that the run began with: --prompt does not count.")
    if state is None:
        prompts = (PROMPT,) if prompts is None else prompts
        written = _texts(model, tokenizer, prompts) if processes.is_main_process else []
        identity["texts"] = [{"prompt": p, "text": text} for p, text in zip(prompts, written, strict=False)]
    size = step_size(settings, identity["started_world_size"], processes.num_processes)
    resumed = state is not None
    args = training_arguments(
        settings, states, identity["run_id"], size, processes.num_processes, device, resumed=resumed
    )
    kept = milestones_here(milestones or {}, settings, size)
    for step, name in kept.items():
        if state is not None and step <= state.sequences_seen // size.sequences and not (states / name).is_dir():
            say(f"The milestone {name} is not made: its step {step} is behind.")
    stopper = SaveWhenStopped()
    trainer = HealTrainer(
        with_trained_weights_chosen(model, run),
        args,
        settings=settings,
        sequences_per_step=size.sequences,
        train=train,
        held_out=held_out,
        states=states,
        identity=identity,
        state=state,
        distillation=distillation_of(model, tokenizer, run, args.device),
        milestones=kept,
        callbacks=[Console(), SaveMilestones(kept), stopper],
    )
    trainer.remove_callback(PrinterCallback)
    if processes.is_main_process:
        _check_room(trainer, states, output_dir, dtype or getattr(torch, parent_info["dtype"]), FORMATS[format])
    say(_describe(trainer, settings, size, train, held_out))
    if state is not None and trainer.first_step > args.max_steps:
        raise SurgeryError(
            f"{state.folder} has done {trainer.first_step} steps, more than --max_steps {args.max_steps}. "
            "Give as many or more, or an earlier state by --resume DIR."
        )
    if state is not None and trainer.first_step == args.max_steps:
        say(f"{state.folder.name} has done all of these steps. The checkpoint is made of it; nothing is trained.")
    _train(trainer, states)
    if stopper.received is not None and trainer.state.global_step < args.max_steps:
        say(f"Stopped after step {trainer.state.global_step}. The same command goes on from {states}.")
        raise KeyboardInterrupt if stopper.received == signal.SIGINT else SystemExit(128 + stopper.received)
    if settings.load_best:
        if settings.eval_interval and trainer.state.best_model_checkpoint is None:
            say(f"The state of the lowest held-out loss is not in {states} any more: the last weights are taken.")
        trainer.load_best()
    tensors = trainer.weights()
    info: dict[str, Any] = {}
    if processes.is_main_process:
        wanted = dtype or getattr(torch, parent_info["dtype"])
        healed, extras = _healed_model(parent, parent_info, tensors, run, wanted)
        texts_after = _texts(healed, tokenizer, [text["prompt"] for text in identity["texts"]])
        log = [{name: entry[name] for name in _LOGGED if name in entry} for entry in trainer.state.log_history]
        log = [entry for entry in log if "loss" in entry or "eval_loss" in entry]
        extras |= {TRAINING_LOG: partial(_write_lines, log), LOSS_CURVE: partial(plot_losses, log)}
        info = write_healed(
            healed,
            parent,
            parent_info,
            tokenizer,
            output_dir,
            healing=_healing(trainer, run, identity, parent_info, texts_after),
            format=format,
            description=description,
            overwrite=overwrite,
            extras=extras,
        )
        if clean_up:
            remove_states(state.folder for state in list_states(states)[0])
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
    """Merge an adapter into a checkpoint that it fits, and write that as a new checkpoint; returns its info.

    Raises:
        SurgeryError: if there is no such checkpoint or adapter, or the two do not fit.
    """
    parent, adapter = Path(checkpoint).expanduser(), Path(adapter).expanduser()
    dtype = torch_dtype(dtype)
    output_dir = Path(output_dir).expanduser()
    parent_info = read_info(parent)
    format = format or parent_info.get("format", "pt")
    check_format(format)
    _check_apart(output_dir, parent, parent, adapter)
    check_target(output_dir, overwrite=overwrite, marker_file=INFO)
    model, tokenizer = load_checkpoint(parent, dtype=torch.float32)
    adapted = load_adapter(in_memory(model), adapter)
    tensors_and_config = adapter_of(adapted)
    healed = bare_model(parent_info, merge(adapted).state_dict(), dtype or getattr(torch, parent_info["dtype"]))
    nothing = {"eval_loss": None, "perplexity": None, "mmlu_score": None}
    healing = {"method": "lora", "adapter": adapter.resolve().name, "steps": 0}
    score = current_score(parent_info, digest_of_checkpoint(parent))
    healing |= {"scores": {"before": nothing | {"mmlu_score": score}, "after": nothing}}
    return write_healed(
        healed,
        parent,
        parent_info,
        tokenizer,
        output_dir,
        healing=healing,
        format=format,
        description=description,
        overwrite=overwrite,
        extras={ADAPTER: partial(write_adapter, tensors_and_config)},
    )


def _check_apart(written: Path, parent: Path, *read: str | Path | None) -> None:
    """Raise SurgeryError if a folder to write is one that is read or lies around it, or is in the parent."""
    place = written.resolve()
    if place.is_relative_to(parent.resolve()) and place != parent.resolve():
        raise SurgeryError(f"{parent} is only read, and {written} is in it. Choose a folder outside.")
    for path in read:
        found = None if path is None else Path(path).expanduser().resolve()
        if found is not None and found.exists() and found.is_relative_to(place):
            raise SurgeryError(f"{path} is only read, and {written} would replace it. Choose another folder.")


def _check_room(trainer: HealTrainer, states: Path, output_dir: Path, dtype: torch.dtype, copies: int) -> None:
    """Raise SurgeryError if one state, or the checkpoint, is too large for the disk it will be on."""
    count = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    weights = trained if trainer.is_lora else count
    check_space(states / PREFIX, 4 * (weights + 2 * trained))  # float32, and AdamW's two moments
    check_space(output_dir, copies * count * dtype.itemsize)


def _train(trainer: HealTrainer, states: Path) -> None:
    try:
        with warnings.catch_warnings():
            # The convolution's gradient comes in another order of axes of length 1, which DDP thinks worth a word.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # The logits are a view, without the rows that pad the vocabulary; nobody writes into them.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            trainer.go_on()
    except OSError as error:
        newest = list_states(states)[0][-1:]
        kept = f"{newest[0].folder} is complete: the same command goes on from there" if newest else "Start again"
        raise SurgeryError(
            f"The state of step {trainer.state.global_step} could not be written ({error.strerror or error}). "
            f"Make room. {kept}."
        ) from error


def _healed_model(
    parent: Path, parent_info: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], run: "Run", dtype: torch.dtype
) -> tuple[LlambaForCausalLM, dict[str, Any]]:
    """The model to write, and what goes beside it."""
    tensors = without_wrapper_prefixes(tensors)
    if run.settings.method != "lora":
        return bare_model(parent_info, tensors, dtype), {}
    adapted = with_adapter(run.load_model()[0], run)  # anew: what was trained may lie in shards
    adapted.load_state_dict(tensors)
    adapter = adapter_of(adapted)
    return bare_model(parent_info, merge(adapted).state_dict(), dtype), {ADAPTER: partial(write_adapter, adapter)}


def _healing(
    trainer: HealTrainer,
    run: "Run",
    identity: Mapping[str, Any],
    parent_info: Mapping[str, Any],
    texts_after: Sequence[str],
) -> dict[str, Any]:
    """What was done, for checkpoint_info.json; folders of this machine are named by their last part only."""
    settings, history = run.settings, trainer.state.log_history
    looks = [entry for entry in history if "eval_loss" in entry]
    best = settings.load_best and trainer.state.best_model_checkpoint is not None
    after = trainer.state.best_metric if best else looks[-1]["eval_loss"] if looks else None
    config = LlambaConfig.from_dict(parent_info["config"])
    score = parent_info["mmlu_score"] if settings.init_from == "checkpoint" else None
    said = settings.as_dict()
    for name in ("teacher", "eval_data", "init_from"):
        said[name] = said[name] and name_of(said[name])
    return {
        "method": settings.method,
        "objective": "language modelling" if settings.teacher is None else "distillation",
        "data": identity["data"],
        "settings": said,
        "layers": trained_layers(config, settings.method),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if best else None,
        "sequences_seen": trainer.sequences_seen,
        "passes": trainer.passes,
        "world_size": trainer.args.world_size,
        "scores": {"before": _scores(looks[0]["eval_loss"] if looks else None, score), "after": _scores(after, None)},
        "texts": [
            {"prompt": text["prompt"], "before": text["text"], "after": after}
            for text, after in zip(identity["texts"], texts_after, strict=True)
        ],
    }


def _scores(eval_loss: float | None, mmlu_score: float | None) -> dict[str, float | None]:
    """Held-out loss in nats per token, its exponential, and an MMLU score where one is known."""
    perplexity = None if eval_loss is None or eval_loss > 700 else math.exp(eval_loss)
    return {"eval_loss": eval_loss, "perplexity": perplexity, "mmlu_score": mmlu_score}


def _texts(model: LlambaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """What the model writes after each prompt, greedily."""
    return [generate_text(model, tokenizer, prompt, max_new_tokens=_NEW_TOKENS).text for prompt in prompts]


def _describe(
    trainer: HealTrainer, settings: HealSettings, size: StepSize, train: Sequences, held_out: Sequences | None
) -> str:
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    held = "none held out" if held_out is None else f"{len(held_out)} held out"
    return (
        f"Training {count:,} of {total:,} parameters (method {settings.method}) on {len(train)} sequences of "
        f"{settings.block_size} tokens, {held}; {trainer.args.max_steps} steps of {size.sequences} sequences."
    )


def _write_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _say_nothing(*words: object) -> None:
    pass
