"""A healing run: its settings, its model, text and teacher, and the state from which it resumes."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.checkpoint_folder import describe_parent
from model_preparation.checkpoint.graft_parts import donor_prefixes
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.checkpoint.model_digests import (
    digest_of_checkpoint,
    digest_of_model,
    digest_of_tokenizer,
    digest_of_weights,
)
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, find_others, load_other
from model_preparation.io.complete_folder import remove_abandoned
from model_preparation.io.folder_lock import is_partial
from model_preparation.io.result_inputs import differences, name_of
from model_preparation.io.text import read_text
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.distill.settings import SELF
from model_preparation.train.heal.adapters import add_lora, is_adapter, load_adapter
from model_preparation.train.heal.load_weights import load_weights
from model_preparation.train.heal.losses import Distillation, LiveTeacher, check_teacher
from model_preparation.train.heal.resume_state import (
    ResumeState,
    check_state,
    list_states,
    read_state,
    remove_states,
    set_aside,
    set_aside_after,
)
from model_preparation.train.heal.self_conversations import write_conversations
from model_preparation.train.heal.sequences import Sequences, hold_out, load_sequences
from model_preparation.train.heal.settings import HealSettings, resumed_settings, saved_settings
from model_preparation.train.heal.step_size import step_size
from model_preparation.train.heal.teacher_cache import TeacherCache, recorded_teacher
from model_preparation.train.heal.trained_layers import trained_layers

Say = Callable[..., None]


@dataclass(frozen=True)
class Run:
    """What stays the same during a run, and functions that load its model, text and teacher.

    Attributes:
        parent: the checkpoint's folder.
        state: the state to resume from, or None.
        identity: fields that every state of the run has: `parent`, `data`, `model_args`, `run_id`, `inputs`, `texts`
            and `started_world_size`.
        sources: {model's name: its folder or hub id}, the `overrides` of `hub.sources.resolve`.
        say: prints, in the main process only.
    """

    parent: Path
    settings: HealSettings
    state: ResumeState | None
    identity: dict[str, Any]
    sources: Mapping[str, str] | None
    say: Say

    def load_model(self) -> tuple[LlambaForCausalLM, PreTrainedTokenizerBase]:
        """The parent's model and tokenizer, changed as the settings say. Weights are float32, copied into memory."""
        settings = self.settings
        model, tokenizer = load_checkpoint(self.parent, dtype=torch.float32)
        if settings.chat_template is not None:
            tokenizer.chat_template = _template(settings.chat_template)
        in_memory(model)
        in_state = self.state is not None and settings.method != "lora"  # the state's weights are loaded later
        if settings.init_from == "scratch" and not in_state:
            model.load_state_dict(LlambaForCausalLM(model.config).state_dict())
        elif settings.init_from != "checkpoint" and not in_state and self._initial_adapter() is None:
            path = _init_path(self.parent, settings, self.sources)
            self.say("\n".join([f"Weights from {path}:", *load_weights(model, path, settings.exclude).lines()]))
        for name, module in model.named_modules():
            if name.endswith((".self_attn", ".attention")):  # grafted layers and grafted heads
                module.attention_dropout = settings.dropout
        return model, tokenizer

    def choose_trained_weights(self, model: LlambaForCausalLM) -> Any:
        """Turn gradients on for the weights that the method trains. Returns the model, or with LoRA a PeftModel."""
        if self.settings.method == "lora":
            return self.with_adapter(model)
        config, method = model.config, self.settings.method
        prefixes = tuple(f"backbone.layers.{index}." for index in trained_layers(config, method))
        if method == "grafted":  # of a layer with grafted heads, only these heads are trained
            prefixes = donor_prefixes(config.llama_layers, config.llama_heads)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith(prefixes))
        return model

    def with_adapter(self, model: LlambaForCausalLM) -> Any:
        """A PeftModel with the adapter that the settings name, or a new one."""
        folder = self._initial_adapter()
        return add_lora(model, self.settings) if folder is None else load_adapter(model, folder, trainable=True)

    def load_data(
        self, data: str, tokenizer: PreTrainedTokenizerBase, processes: PartialState, states: Path, device: str
    ) -> tuple[Sequences, Sequences | None]:
        """The training and held-out sequences. Their digests go into `identity`.

        Raises:
            SurgeryError: if the state that is resumed has other digests, or a setting has no effect on `data`.
        """
        settings = self.settings
        place = data
        if data == SELF:

            def write() -> str:
                donor = find_others(["donor"], self.parent, sources=self.sources)[0].folder
                return str(write_conversations(donor, tokenizer, settings, states, device))

            place = _from_main_process(processes, write)
        elif settings.self_conversations != HealSettings.self_conversations:
            raise SurgeryError(f"self_conversations has no effect on {data}. Leave it out, or give --data self.")
        train, held_out = load_sequences(place, tokenizer, settings, self.say), None
        if settings.eval_interval and settings.eval_data is not None:
            held_out = load_sequences(settings.eval_data, tokenizer, settings, self.say)
        elif settings.eval_interval:
            train, held_out = hold_out(train, settings.eval_fraction)
        if not train.are_conversations and (held_out is None or not held_out.are_conversations):
            for name in ("loss_on", "long_conversations", "chat_template"):
                if getattr(settings, name) != getattr(HealSettings, name):
                    raise SurgeryError(f"{name} is given, but {data} holds texts and no conversations. Leave it out.")
        described = {
            "name": name_of(data),
            "blake3": train.digest(),
            "sequences": len(train),
            "tokens": train.size,
            "held_out_sequences": 0 if held_out is None else len(held_out),
            "held_out_blake3": None if held_out is None else held_out.digest(),
        }
        before = self.identity.get("data", described)
        changed = [name for name in ("blake3", "held_out_blake3") if before[name] != described[name]]
        if changed:
            assert self.state is not None
            text = f"The held-out text {settings.eval_data or data}" if changed == ["held_out_blake3"] else data
            raise SurgeryError(
                f"{text} has other sequences than the run of {self.state.folder} began with. Give the same text, or "
                "start again in another --output_dir."
            )
        self.identity["data"] = described
        return train, held_out

    def distillation(
        self,
        model: LlambaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequences,
        processes: PartialState,
        device: torch.device,
    ) -> Distillation | None:
        """The loss against the teacher; None without a teacher. First fills the teacher's cache, if the run has one."""
        settings = self.settings
        if not settings.has_teacher:
            return None

        def load() -> LiveTeacher:
            other = _find_teacher(self.parent, settings, self.sources)
            teacher, _ = load_other(other, tokenizer, device=device, dtype=torch.float32)
            check_teacher(teacher, model, settings)
            return LiveTeacher(teacher, settings)

        if settings.teacher_cache is None:
            return Distillation(load(), settings)
        vocabulary = model.config.vocab_size
        inputs = {
            "teacher": self.identity["inputs"]["teacher"],
            "tokenizer": digest_of_tokenizer(tokenizer),
            "sequences": train.digest(),
            "number of sequences": len(train),
            "block_size": settings.block_size,
            "teacher_top_k": min(settings.teacher_top_k, vocabulary),
            "temperature": settings.temperature,
            "vocabulary": vocabulary,
        }
        cache = TeacherCache(Path(settings.teacher_cache).expanduser(), inputs, train)
        self.say(f"The teacher's likeliest tokens are kept in {cache.folder}. Missing ones are computed now.")
        cache.fill(load, processes)
        return Distillation(cache, settings)

    def _initial_adapter(self) -> Path | None:
        """The folder of the adapter to begin with, if there is one."""
        folder = Path(self.settings.init_from).expanduser()
        if not is_adapter(folder):
            return None
        if self.settings.method != "lora":
            raise SurgeryError(
                f"{folder} is an adapter. Train it with --method lora, or merge it with --merge_adapter."
            )
        return folder


def in_memory(model: LlambaForCausalLM) -> LlambaForCausalLM:
    """Copy the parameters into memory. They were mapped from the parent's file, which must not change."""
    for parameter in model.parameters():  # tied ones appear once
        parameter.data = parameter.data.clone()
    return model


def begin_or_resume(
    parent: Path,
    parent_info: Mapping[str, Any],
    states: Path,
    given: Mapping[str, Any],
    *,
    resume: str,
    overwrite: bool,
    processes: PartialState,
    sources: Mapping[str, str] | None,
    say: Say,
) -> Run:
    """Begin a new run, or resume a run from one of its states.

    Args:
        states: the folder of the run's states.
        given: fields of `HealSettings`. A resumed run keeps its saved settings, with few exceptions.
        resume: "auto" resumes from the newest state, and begins a new run if there is no state. "must" resumes too, but
            fails if there is no state. With "never", a new run begins. With a state's folder, the run resumes from it.
        overwrite: with "never", remove existing states.

    Raises:
        SurgeryError: if the wanted state is missing or damaged, or belongs to another run.
    """
    chosen = _from_main_process(processes, lambda: _choose_state(states, resume, overwrite, say))
    state = None if chosen is None else read_state(chosen)
    settings = HealSettings(**given) if state is None else saved_settings(state.info["settings"])
    described = describe_parent(parent, parent_info)
    del described["mmlu_score"]  # another program may measure the score during the run
    inputs = _from_main_process(processes, lambda: _input_digests(parent, settings, sources))
    if state is None:
        identity = {
            "parent": described,
            "started_world_size": processes.num_processes,
            "run_id": uuid.uuid4().hex[:21],  # SwanLab wants ids of 21 characters
            "inputs": inputs,
            "model_args": parent_info["config"],
        }
        return Run(parent, settings, None, identity, sources, say)
    names = ("parent", "data", "model_args", "run_id", "started_world_size", "texts")
    identity = {name: state.info[name] for name in names} | {"inputs": inputs}
    digests = "tensor_digests_sha256"  # states of versions before 0.2.0 have only this digest
    differing = differences(
        {**state.info.get("inputs", {}), digests: identity["parent"][digests]},
        {**inputs, digests: described[digests]},
        of_both=True,
    )
    if differing:
        raise SurgeryError(
            f"{state.folder} belongs to a run that heals {identity['parent']['id']}, but {parent} or another input has "
            f"changed since ({'; '.join(differing)}). Give the inputs that the run began with, or start again with "
            "another --output_dir."
        )
    settings, lines = resumed_settings(settings, given)
    for line in lines:
        say(line)
    _say_new_step_size(state, settings, identity["started_world_size"], processes.num_processes, say)
    return Run(parent, settings, state, identity, sources, say)


def _say_new_step_size(state: ResumeState, settings: HealSettings, started: int, now: int, say: Say) -> None:
    before = state.info["world_size"]
    if before != now:
        size = step_size(settings, started, now)
        say(
            f"Processes: {now} instead of {before}. The {state.sequences_seen} sequences seen so far were "
            f"{state.steps} steps, and count as {state.sequences_seen // size.sequences} steps now. Each step has "
            f"{size.sequences} sequences, in {size.accumulation} forward passes of each process. The last step is "
            f"step {size.steps_here(settings.max_steps)}."
        )


def _from_main_process(processes: PartialState, compute: Callable[[], Any]) -> Any:
    """Run `compute` in the main process only, and give its result to all processes."""
    found = [compute() if processes.is_main_process else None]
    if processes.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _choose_state(states: Path, resume: str, overwrite: bool, say: Say) -> Path | None:
    is_named = resume not in ("auto", "must", "never")
    found, incomplete = list_states(states, damaged_too=is_named or resume == "never")
    if states.is_dir():
        asides = set_aside(states / name for name in incomplete if not is_partial(name))
        removed = {folder.name for folder in remove_abandoned(states)}
        for name in incomplete:
            end = f"renamed to {asides[name]}" if name in asides else "removed" if name in removed else "left there"
            say(f"{states / name} is damaged, or incomplete because its run was killed: it is not used, and {end}.")
    if resume == "never":
        if found and not overwrite:
            raise SurgeryError(
                f"{states} holds states of a run, the newest {found[-1].folder.name}. Resume it with --resume auto, "
                "remove them with --resume never --overwrite, or give another --resume_dir."
            )
        remove_states(state.folder for state in found)
        return None
    if not is_named and not found:
        if resume == "must":
            raise SurgeryError(
                f"{states} holds no complete state, which --init_from resume needs. Give another --init_from."
            )
        return None
    state = read_state(Path(resume).expanduser()) if is_named else found[-1]
    check_state(state)
    if is_named:
        for name, aside in set_aside_after(states, state).items():
            say(f"{name} has seen more sequences than {state.folder.name}: it is renamed to {aside}.")
    say(f"Resuming from {state.folder}: step {state.steps}, {state.sequences_seen} sequences seen.")
    return state.folder


def _input_digests(parent: Path, settings: HealSettings, sources: Mapping[str, str] | None) -> dict[str, str]:
    """Digests of all inputs that change the healed weights, apart from settings and text."""
    digests = {"parent": digest_of_checkpoint(parent)}
    if settings.has_teacher:
        digests["teacher"] = _digest_of_teacher(parent, settings, sources)
    if settings.method == "lora" and settings.init_from not in ("checkpoint", "scratch"):
        # A LoRA state has only the adapter, so a resumed run needs these weights again. Other states have all weights.
        digests["init_from"] = digest_of_weights(_init_path(parent, settings, sources))
    return digests


def _template(path: str) -> str:
    try:
        return read_text(Path(path).expanduser())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SurgeryError(f"{path} cannot be read ({reason}). Give a file with a chat template.") from error


def _find_teacher(parent: Path, settings: HealSettings, sources: Mapping[str, str] | None) -> OtherModel:
    if settings.teacher is None:
        raise SurgeryError(f"{settings.teacher_cache} is no complete teacher cache. To make one, give --teacher too.")
    return find_others([settings.teacher], parent, sources=sources)[0]


def _digest_of_teacher(parent: Path, settings: HealSettings, sources: Mapping[str, str] | None) -> str:
    """The teacher's digest. If the teacher is not on this machine any more, a complete teacher cache has its digest."""
    try:
        return digest_of_model(_find_teacher(parent, settings, sources).folder)
    except SurgeryError:
        cache = settings.teacher_cache
        recorded = None if cache is None else recorded_teacher(Path(cache).expanduser())
        if recorded is None:
            raise
        return recorded


def _init_path(parent: Path, settings: HealSettings, sources: Mapping[str, str] | None) -> Path:
    """The file or folder that `init_from` names."""
    path = Path(settings.init_from).expanduser()
    return path if path.exists() else find_others([settings.init_from], parent, sources=sources)[0].folder
