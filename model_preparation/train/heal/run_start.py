"""Where a healing run stands: at its beginning, or at a state of before.

In: the folder of its states, and what the command was given. Out: the state to go on from, the settings that count, and
what the run is of: parent, data, number of processes; what differs from before is refused or said.
"""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from model_preparation.checkpoint.healed_folder import describe_parent
from model_preparation.checkpoint.model_digests import digest_of_checkpoint, digest_of_model, digest_of_weights
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.other_models import find_others
from model_preparation.io.identity import differences
from model_preparation.io.names import name_of
from model_preparation.io.new_folder import remove_abandoned
from model_preparation.train.heal.resume_state import (
    ResumeState,
    check_state,
    list_states,
    read_state,
    remove_states,
    set_aside,
    set_aside_after,
)
from model_preparation.train.heal.sequences import Sequences
from model_preparation.train.heal.settings import HealSettings, resumed_settings, saved_settings
from model_preparation.train.heal.step_size import step_size


def state_to_go_on_from(
    states: Path, resume: str, overwrite: bool, processes: PartialState, say: Callable[..., None]
) -> ResumeState | None:
    """The main process chooses and checks; all get the same."""
    chosen: list[Any] = [None]
    if processes.is_main_process:
        chosen[0] = _choose_state(states, resume, overwrite, say)
    if processes.num_processes > 1:
        broadcast_object_list(chosen)
    return None if chosen[0] is None else read_state(Path(chosen[0]))


def _choose_state(states: Path, resume: str, overwrite: bool, say) -> str | None:
    found, incomplete = list_states(states, damaged_too=resume not in ("auto", "must"))
    for name in incomplete:
        say(f"{states / name} is half-written by a run that was killed, or damaged: it is skipped.")
    if states.is_dir():
        set_aside(states / name for name in incomplete if not name.endswith(".partial"))
        remove_abandoned(states)
    if resume == "never":
        if found and not overwrite:
            raise SurgeryError(
                f"{states} holds states of a run, the newest {found[-1].folder.name}. Go on with --resume auto, remove "
                "them with --resume never --overwrite, or give another --resume_dir."
            )
        remove_states(state.folder for state in found)
        return None
    if resume in ("auto", "must"):
        if not found and resume == "must":
            raise SurgeryError(f"{states} holds no complete state to resume from. Start with another --init_from.")
        if not found:
            return None
        state = found[-1]
    else:
        state = read_state(Path(resume).expanduser())
    check_state(state)
    if resume not in ("auto", "must"):
        for name in set_aside_after(states, state):
            say(f"{name} has seen more than {state.folder.name}: it is put aside as {name}.aside.")
    say(f"Going on from {state.folder}: step {state.steps}, {state.sequences_seen} sequences seen.")
    return str(state.folder)


def settings_and_identity(
    state: ResumeState | None,
    given: Mapping[str, Any],
    parent: Path,
    parent_info: Mapping[str, Any],
    processes: PartialState,
    sources: Mapping[str, str] | None,
    say: Callable[..., None],
) -> tuple[HealSettings, dict[str, Any]]:
    """The settings that count, and what the run is of; raises SurgeryError if a state is of other inputs."""
    world_size = processes.num_processes
    described = describe_parent(parent, parent_info)
    del described["mmlu_score"]  # may be measured while the run goes on
    if state is None:
        try:
            settings = HealSettings(**given)
        except TypeError as error:
            raise SurgeryError(f"{error}. Look at HealSettings for what there is.") from error
        run_id = uuid.uuid4().hex[:21]  # as long as SwanLab wants it
        identity: dict[str, Any] = {"parent": described, "started_world_size": world_size, "run_id": run_id}
        identity["inputs"] = _inputs(parent, settings, sources, processes)
        return settings, identity | {"model_args": parent_info["config"]}
    names = ("parent", "data", "model_args", "run_id", "started_world_size", "texts")
    identity = {name: state.info[name] for name in names}
    identity["inputs"] = _inputs(parent, saved_settings(state.info["settings"]), sources, processes)
    digests = "tensor_digests_sha256"  # all that states of before 0.2.0 have
    odd = differences(
        {**state.info.get("inputs", {}), digests: identity["parent"][digests]},
        {**identity["inputs"], digests: described[digests]},
        of_both=True,
    )
    if odd:
        raise SurgeryError(
            f"{state.folder} is of a run that heals {identity['parent']['id']}, and {parent} or what goes with it is "
            f"another now ({'; '.join(odd)}). Give what it was begun with, or start anew with another --output_dir."
        )
    settings, lines = resumed_settings(saved_settings(state.info["settings"]), given)
    for line in lines:
        say(line)
    saved = state.info["world_size"]
    if saved != world_size:
        size = step_size(settings, identity["started_world_size"], world_size)
        say(
            f"The number of processes is {world_size}, was {saved}: step {state.steps} is now step "
            f"{state.sequences_seen // size.sequences}, after the same {state.sequences_seen} sequences; a step is "
            f"{size.sequences} sequences, in {size.accumulation} forward passes of each process, and the last one is "
            f"step {size.steps_here(settings.max_steps)}."
        )
    return settings, identity


def _inputs(
    parent: Path, settings: HealSettings, sources: Mapping[str, str] | None, processes: PartialState
) -> dict[str, str]:
    """By digests, what decides on the healed weights beside settings and text; read by the main process."""
    found: list[Any] = [None]
    if processes.is_main_process:
        found[0] = {"parent": digest_of_checkpoint(parent)}
        if settings.teacher is not None:
            found[0]["teacher"] = digest_of_model(find_others([settings.teacher], parent, sources=sources)[0].folder)
        if settings.method == "lora" and settings.init_from not in ("checkpoint", "scratch"):
            # An adapter is trained on these weights; otherwise all weights of a run that goes on are in its state.
            path = Path(settings.init_from).expanduser()
            if not path.exists():
                path = find_others([settings.init_from], parent, sources=sources)[0].folder
            found[0]["init_from"] = digest_of_weights(path)
    if processes.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def check_data(
    data: str, train: Sequences, held_out: Sequences | None, state: ResumeState | None, identity: dict[str, Any]
) -> None:
    """Enter what the data are into `identity`; of a run that goes on they have to be the same."""
    described = {
        "name": name_of(data),
        "blake3": train.digest(),
        "sequences": len(train),
        "tokens": train.tokens.size,
        "held_out_sequences": 0 if held_out is None else len(held_out),
        "held_out_blake3": None if held_out is None else held_out.digest(),
    }
    if state is not None and any(identity["data"][name] != described[name] for name in ("blake3", "held_out_blake3")):
        raise SurgeryError(
            f"{data} gives other sequences than {state.folder} was trained on ({described['sequences']} instead of "
            f"{identity['data']['sequences']}, or others). Give the same text, or start anew in another --output_dir."
        )
    identity["data"] = described
