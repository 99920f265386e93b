"""Heals in stages, such as short texts, then conversations, then long texts. Each stage trains the previous result.

A stage is a healing like any other. In the folder of states, NAME_resume holds the states of stage NAME, and
NAME holds its checkpoint. Only the last checkpoint goes into OUTPUT_DIR instead. A killed run resumes in the
stage in which it was.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from model_preparation.checkpoint.checkpoint_folder import describe_parent
from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.errors import SurgeryError
from model_preparation.flags_file import nearest
from model_preparation.io.complete_folder import check_target
from model_preparation.io.result_inputs import differences, name_of
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.setting_flags import flags_of
from model_preparation.train.heal.heal import heal_checkpoint, parent_of
from model_preparation.train.heal.resume_state import list_states
from model_preparation.train.heal.settings import FREE, HealSettings, described
from model_preparation.train.texts import files_of_text

_NAME = re.compile(r"[\w-]+")
STAGE_KEYS = ("data", "milestones", *(name for name, _, _ in flags_of(HealSettings)))


class _Stage(NamedTuple):
    name: str
    data: str
    milestones: Mapping[int, str]
    given: dict[str, Any]  # fields of `HealSettings`
    settings: HealSettings  # made from `given`


def heal_in_stages(
    checkpoint: str | Path,
    stages: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    settings: HealSettings | None = None,
    *,
    data: str | None = None,
    resume: str | bool = "auto",
    resume_dir: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    clean_up: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """Heal a checkpoint in stages. Returns the result's checkpoint_info.json, or {} in all but the main process.

    The field `healing` there describes the last stage, and in `earlier_stages` the other stages.

    Args:
        stages: each has a `name`, and may have its own `data`, `milestones` and fields of `HealSettings`.
        data: the text for stages that have no `data` of their own.
        clean_up: in the end, remove the last stage's states and the earlier stages' checkpoints.
        given: other arguments of `heal_checkpoint` except `milestones`, and fields of `HealSettings` for all stages.

    Raises:
        SurgeryError: as from `heal_checkpoint`. A stage that is not valid is refused before any training.
    """
    if "milestones" in given:
        raise SurgeryError("milestones belongs into a stage, because each stage counts its own steps.")
    shared = {} if settings is None else settings.as_dict()
    shared |= {name: given.pop(name) for name in HealSettings.__dataclass_fields__ if name in given}
    plan = [_checked(number, stage, data, shared) for number, stage in enumerate(stages, start=1)]
    names = [stage.name for stage in plan]
    if not plan:
        raise SurgeryError("There are no stages. Give one or more, each with a name.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SurgeryError(f"Two stages have the name {twice}. Give each stage its own name.")
    if resume not in ("auto", "never", True, False):
        raise SurgeryError(f"--resume {resume} names a state, but each stage finds its own state. Give auto or never.")
    start, result = Path(checkpoint).expanduser(), Path(output_dir).expanduser()
    work = Path(resume_dir).expanduser() if resume_dir else Path(f"{os.path.abspath(result)}_resume")
    _, format, dtype = parent_of(start, format, torch_dtype(dtype))
    is_main = PartialState(cpu=given.get("device", "cpu") == "cpu").is_main_process
    if is_main:
        check_target(result, overwrite=overwrite, marker_file=INFO)
        if states := list_states(work, damaged_too=True)[0]:
            raise SurgeryError(
                f"{work} holds states of a run without stages, such as {states[0].folder.name}. "
                "Give another --output_dir or --resume_dir."
            )
        print(f"{len(plan)} stages:", *map(_line, plan), sep="\n")
    parent, info = start, {}
    for stage in plan:
        is_last = stage is plan[-1]
        target = result if is_last else work / stage.name
        if not is_last and (target / INFO).is_file() and resume in ("auto", True):
            _check_done(target, stage, parent)
            if is_main:
                print(f"Stage {stage.name} is done: {target}")
        else:
            if is_main:
                print(f"Stage {stage.name}")
            AcceleratorState._reset_state()  # the next Trainer sets it again, perhaps with another precision
            info = heal_checkpoint(
                parent,
                stage.data,
                target,
                resume=resume,
                resume_dir=work / f"{stage.name}_resume",
                dtype=dtype if is_last else torch.float32,
                format=format if is_last else "hf",
                overwrite=overwrite,
                milestones=stage.milestones,
                clean_up=clean_up or not is_last,
                **given,
                **stage.given,
            )
        parent = target
    if clean_up and is_main:
        for name in names[:-1]:
            shutil.rmtree(work / name)
        if not any(work.iterdir()):
            work.rmdir()
    return info


def _checked(number: int, stage: Mapping[str, Any], data: str | None, shared: Mapping[str, Any]) -> _Stage:
    name = stage.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith("_resume"):
        said = "has no name" if name is None else f"has the name {name!r}"
        raise SurgeryError(f"Stage {number} {said}. Use letters, digits, _ and -, but not _resume at the end.")
    if unknown := [key for key in stage if key not in ("name", *STAGE_KEYS)]:
        raise SurgeryError(f"Stage {name} has the unknown key {unknown[0]!r}.{nearest(unknown[0], STAGE_KEYS)}")
    own = {key: value for key, value in stage.items() if key not in ("name", "data", "milestones")}
    if number > 1:  # only the first stage takes the shared init_from: the others begin with the previous result
        shared = {key: value for key, value in shared.items() if key not in ("init_from", "exclude")}
    text = stage.get("data", data)
    if text is None:
        raise SurgeryError(f"Stage {name} has no data. Give data for it, or for all stages.")
    try:
        files_of_text(text)
        given = {**shared, **own, "stage": name}
        return _Stage(name, text, stage.get("milestones", {}), given, HealSettings(**given))
    except SurgeryError as error:
        raise SurgeryError(f"Stage {name}: {error}") from error


def _line(stage: _Stage) -> str:
    settings = stage.settings
    return (
        f"  {stage.name}: {settings.max_steps} steps on {name_of(stage.data)}, {settings.block_size} tokens per "
        f"sequence, learning rate {settings.learning_rate:g}, method {settings.method}"
    )


def _check_done(folder: Path, stage: _Stage, parent: Path) -> None:
    """Raise SurgeryError unless the checkpoint in `folder` is the result of this stage."""
    info = read_info(folder)
    healing = info["healing"]
    digest = "tensor_digests_sha256"
    found = differences(
        {**healing["settings"], "data": healing["data"]["name"], "begins with": info["parent"][digest]},
        {
            **described(stage.settings),
            "data": name_of(stage.data),
            "begins with": describe_parent(parent, read_info(parent))[digest],
        },
        of_both=True,
    )
    if found := [each for each in found if not each.startswith(FREE)]:
        raise SurgeryError(
            f"{folder} is stage {stage.name} of another run ({'; '.join(found)}). Give the same stages, start again "
            "with --resume never --overwrite, or give another --output_dir."
        )
