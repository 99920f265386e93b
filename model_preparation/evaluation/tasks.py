"""Turn the names of `--tasks` into lm-eval's task objects.

MMLU's tasks are lm-eval's own, with another source of questions. lm-eval needs 8 s or more to parse all of its 14,000
definitions. So it gets only the folders with a definition that mentions the name.
"""

import difflib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.api.task
import lm_eval.tasks
import lm_eval.tasks._factory
import lm_eval.utils
from blake3 import blake3
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from model_preparation.errors import SurgeryError, one_line
from model_preparation.evaluation.mmlu_questions import STOCK_TASKS, SUBJECTS, Questions, find_questions, read_subject
from model_preparation.evaluation.recall_tasks import (
    EMBEDDED_RECALL,
    RecallRecipe,
    is_recall,
    recall_names,
    task_config,
)
from model_preparation.evaluation.suites import Protocol
from model_preparation.hub.sources import EMBEDDED

MMLU = "mmlu"
GROUPS = ("stem", "humanities", "social_sciences", "other")
_STOCK = Path(lm_eval.tasks.__file__).parent
_EMBEDDED = {EMBEDDED_RECALL: EMBEDDED / EMBEDDED_RECALL}  # the definitions inside this package, by name
_MMLU_NAMES = {MMLU, *(f"mmlu_{name}" for name in (*GROUPS, *SUBJECTS))}
_DECLARATION = re.compile(r"""^["']?(?:task|group|tag)["']?\s*:\s*["']?([\w.:+-]+)["']?\s*$""", re.MULTILINE)
# lm-eval compiles its templates again for every question, which takes most of the time of preparing the question.
# So compiled templates are kept.
lm_eval.utils.env.from_string = lru_cache(lm_eval.utils.env.from_string)  # type: ignore[method-assign]
_OUT_OF_REACH = (ConnectionError, DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


@dataclass
class Tasks:
    """Tasks to evaluate.

    Attributes:
        names: as the user gave them.
        manager: a TaskManager of lm-eval, which its evaluation requires.
        items: lm-eval's tasks and groups, one or several per name.
        questions: MMLU's, if a name is MMLU or part of it.
        digests: the digests of task definitions that are not lm-eval's, {last part of the path: digest}.
            If two paths have the same last part, the later path is given whole.
        made: the settings that the documents of recall tasks depend on.
        suite: the name of the suite, if these are its tasks.
        metrics: {task or group: the metric that counts}, where the suite sets one.
        leaves_of: {name that the user gave: the names of its single tasks}.
    """

    names: tuple[str, ...]
    manager: TaskManager
    items: list[Task | Group] = field(default_factory=list)
    questions: Questions | None = None
    digests: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    suite: str | None = None
    metrics: dict[str, str] = field(default_factory=dict)
    leaves_of: dict[str, list[str]] = field(default_factory=dict)

    @property
    def single(self) -> list[Task]:
        """All single tasks, also those inside groups."""
        return _single(self.items)


def _single(items: Sequence[Task | Group]) -> list[Task]:
    found = [item.get_all_tasks() if isinstance(item, Group) else [item] for item in items]
    return [task for tasks in found for task in tasks]


def is_mmlu(name: str) -> bool:
    """Whether a name is MMLU, one of its groups or one of its subjects. `find_questions` finds their questions."""
    return name in _MMLU_NAMES


def check_names(names: Sequence[str]) -> None:
    """Raise SurgeryError if there is no name, or if a name is repeated or unknown. This takes seconds at most."""
    if isinstance(names, str):
        raise SurgeryError(f"tasks is the text {names!r}, but must be a list of names. Give [{names!r}].")
    if not names:
        raise SurgeryError("No task is named. Give one with --tasks, such as mmlu.")
    for name in names:
        if names.count(name) > 1:
            raise SurgeryError(f"The task {name} is given {names.count(name)} times. Give it once.")
    unknown = [name for name in names if not (is_mmlu(name) or is_recall(name) or _path_of(name).exists())]
    if not unknown:
        return
    declared = {name for text in _definitions().values() for name in _DECLARATION.findall(text)}
    for name in unknown:
        if name not in declared and not any(_mentions(text, name) for text in _definitions().values()):
            close = difflib.get_close_matches(name, {*declared, *_MMLU_NAMES, *_EMBEDDED, *recall_names()}, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise _unknown(name, hint)


def load_tasks(
    names: Sequence[str],
    *,
    mmlu_data: str | Path | None = None,
    num_fewshot: int | None = None,
    task_data: Mapping[str, str] | None = None,
    recall: RecallRecipe | None = None,
    protocols: Mapping[str, Protocol] | None = None,
) -> Tasks:
    """Load the tasks that are named.

    Args:
        names: lm-eval's tasks, groups and tags; recall tasks; folders of task definitions, which stand for all tasks
            in them; single .yaml files. Your own definitions may run code, as with lm-eval.
        mmlu_data: where MMLU's questions are, as in `find_questions`.
        num_fewshot: the number of solved examples that each of MMLU's subjects must have.
        task_data: {name of a task in `names`: the folder with its questions}.
        recall: how to make the documents of recall tasks. Without lengths in `recall`, embedded_recall has the fixed
            questions of this package.
        protocols: {name of a task in `names`: how to ask it}. Other tasks are asked as their definitions say.

    Raises:
        SurgeryError: for an unknown name, a definition that does not work, or data that cannot be reached.
    """
    check_names(names)
    tasks = Tasks(tuple(names), TaskManager(include_defaults=False))
    for name, folder in (task_data or {}).items():
        if name not in names or is_mmlu(name) or is_recall(name):
            raise SurgeryError(f"--task_data has {name}, which is not an lm-eval task in --tasks. Leave it out.")
        if not Path(folder).expanduser().is_dir():
            raise SurgeryError(f"The data of {name}, {folder}, is not a folder. Give another one with --task_data.")
    fixed = recall is None or recall.lengths is None  # then embedded_recall has the package's questions
    made = [name for name in names if is_recall(name) and not (fixed and _path_of(name).exists())]
    if made and recall is None:
        raise SurgeryError(f"The documents of {made[0]} are made for a model's tokenizer, and no model is given here.")
    if any(is_mmlu(name) for name in names):
        tasks.questions = find_questions(mmlu_data, num_fewshot=num_fewshot or 0)
    with quiet():
        for name in names:
            loaded_before = len(tasks.items)
            try:
                if is_mmlu(name):
                    assert tasks.questions is not None
                    tasks.items += _load_mmlu(name, tasks.questions)
                elif name in made:
                    assert recall is not None
                    tasks.items += recall.tasks(name)
                else:
                    path, given = _path_of(name), (task_data or {}).get(name)
                    with nullcontext() if given is None else _questions_from(Path(given).expanduser()):
                        tasks.items += _load_path(path) if path.exists() else _load_stock(name)
                    if path.exists():
                        short = short_name(name)
                        tasks.digests[name if short in tasks.digests else short] = _digest(path)
            except _OUT_OF_REACH as error:
                raise SurgeryError(
                    f"The data of the task {name} cannot be reached ({one_line(error)}). Check the network connection, "
                    "name a mirror of the Hugging Face hub in HF_ENDPOINT, or give a folder: "
                    f"--task_data {name}=DIR."
                ) from error
            except SurgeryError:
                raise
            except KeyError as error:
                if "is not a registered task" in str(error) and not _path_of(name).exists():
                    raise _unknown(name) from error
                raise _broken(name, error) from error
            except Exception as error:  # a definition may run code, which may raise anything
                raise _broken(name, error) from error
            tasks.leaves_of[name] = [task.task_name for task in _single(tasks.items[loaded_before:])]
            if protocol := (protocols or {}).get(name):
                for item in tasks.items[loaded_before:]:
                    tasks.metrics |= _apply(item, protocol)
    leaves = [task.task_name for task in tasks.single]
    for leaf in leaves:
        if leaves.count(leaf) > 1:
            raise SurgeryError(f"--tasks has {leaf} more than once, alone or in several groups. Leave out all but one.")
    if made and recall is not None:
        tasks.made = recall.recorded(made)
    return tasks


def _apply(item: Task | Group, protocol: Protocol) -> dict[str, str]:
    """Set the number of solved examples as the protocol says. Return {task or group: the metric that counts}."""
    single = _single([item])
    for task in single:
        task.set_config("num_fewshot", protocol.shots)
    metric = protocol.metric
    return {} if metric is None else {name_of(each): metric for each in (item, *single)}


def read_configs(names: Sequence[str]) -> list[TaskConfig]:
    """The configs of the single tasks that the names stand for, without MMLU's. No data is read or downloaded.

    The exception is a task that is a Python class: it is loaded with its data.

    Raises:
        SurgeryError: as in `load_tasks`.
    """
    check_names(names)
    made = [name for name in names if is_recall(name) and not _path_of(name).exists()]
    found = [task_config(name) for name in made]
    others = [name for name in names if not is_mmlu(name) and name not in made]
    if others:
        with patch.object(lm_eval.tasks._factory, "ConfigurableTask", _WithoutData):
            found += [task.config for task in load_tasks(others).single]
    return found


class _WithoutData(ConfigurableTask):
    """A task with a config and no data."""

    def __init__(self, config: dict[str, Any]):
        self._config = TaskConfig(**config)


def short_name(name: str) -> str:
    """A task's name. For a path, it is the last part: a task stays the same if its folder moves."""
    return Path(name).resolve().name


def _path_of(name: str) -> Path:
    """The name as a path; for a task of this package, the folder of its definition. The path may not exist."""
    return _EMBEDDED.get(name, Path(name))


def _broken(name: str, error: BaseException) -> SurgeryError:
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # the cause describes the fault of the data
    return SurgeryError(
        f"The task {name} cannot be loaded ({type(error).__name__}: {one_line(error)}). "
        "Correct its definition or its data. Relative paths in the definition begin at the current folder."
    )


def _unknown(name: str, hint: str = ".") -> SurgeryError:
    return SurgeryError(
        f"lm-eval {lm_eval.__version__} has no task {name!r}, and there is no such folder or file{hint} "
        "`lm_eval ls tasks` lists all. For your own tasks, give their folder."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's warnings and its progress bars. lm-eval has no option that turns the bars off."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with patch.object(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)


def _load_mmlu(name: str, questions: Questions) -> list[Task | Group]:
    reader = f"{read_subject.__module__}.{read_subject.__name__}"
    with tempfile.TemporaryDirectory() as scratch:
        for stock in STOCK_TASKS.glob("*.yaml"):
            lines = [f"include: {json.dumps(str(stock))}"]
            if not stock.name.startswith("_"):  # a subject; the others are groups
                source = {"folder": str(questions.folder), "subject": stock.stem.removeprefix("mmlu_")}
                lines += [f"custom_dataset: !function {reader}", f"dataset_kwargs: {json.dumps(source)}"]
            (Path(scratch) / stock.name).write_text("\n".join(lines), encoding="utf-8")
        return _roots(TaskManager(include_defaults=False, include_path=scratch).load(name))


@contextmanager
def _questions_from(folder: Path) -> Iterator[None]:
    """Within the block, lm-eval reads a task's questions from `folder`, not from the hub that the definition names."""
    read = datasets.load_dataset

    def read_here(path: str, name: str | None = None, **_of_the_hub: Any) -> Any:
        known = datasets.get_dataset_config_names(str(folder))
        return read(str(folder), name if name in known else None)

    with patch.object(datasets, "load_dataset", read_here):
        try:
            yield
        except KeyError as error:
            raise SurgeryError(
                f"The folder {folder} has no split {error}. Name a file in it after the split, such as "
                f"{error.args[0]}.jsonl."
            ) from error


def _load_path(path: Path) -> list[Task | Group]:
    if path.is_file():
        return _roots(TaskManager(include_defaults=False, include_path=str(path.resolve().parent)).load(str(path)))
    manager = TaskManager(include_defaults=False, include_path=str(path.resolve()))
    defined = [*manager.all_groups, *manager.all_subtasks]
    if not defined:
        raise SurgeryError(f"{path} holds no task definition (*.yaml with `task:` or `group:`). Give another folder.")
    items: list[Task | Group] = []
    for name in defined:  # groups come first, so that their members are not loaded again
        if not any(isinstance(item, Group) and name in _members(item) for item in items):
            items += _roots(manager.load(name))
    inner = {member for item in items if isinstance(item, Group) for member in _members(item)}
    return [item for item in items if name_of(item) not in inner]


def _load_stock(name: str) -> list[Task | Group]:
    folders = sorted(
        {_STOCK / path.relative_to(_STOCK).parts[0] for path, text in _definitions().items() if _mentions(text, name)}
    )
    try:
        return _roots(TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders]).load(name))
    except KeyError as error:
        if "not a registered" not in str(error):  # a split of the data is missing
            raise
        # The group has tasks that other folders define. Parsing all definitions takes seconds.
        return _roots(TaskManager().load(name))


def _roots(loaded: Any) -> list[Task | Group]:
    """The tasks and groups that were loaded, without those inside another loaded group."""
    groups = list(loaded["groups"].values())
    inner = {member for group in groups for member in _members(group)}
    return [item for item in [*groups, *loaded["tasks"].values()] if name_of(item) not in inner]


def _members(group: Group) -> set[str]:
    return {name_of(item) for item in [*group.get_all_groups(), *group.get_all_tasks()]}


def name_of(item: Task | Group) -> str:
    """The name of a task or group in lm-eval's results."""
    return item.name if isinstance(item, Group) else item.task_name


@cache
def _definitions() -> dict[Path, str]:
    """The text of each of lm-eval's definitions. The 14,000 files are read only once."""
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in _STOCK.glob("*/**/*.yaml")}


def _mentions(text: str, name: str) -> bool:
    """Whether a definition contains the name as a whole word."""
    return name in text and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text) is not None


def _digest(path: Path) -> str:
    """BLAKE3 of a folder of task definitions. For a single definition: of all files that it may include or call."""
    folder = path if path.is_dir() else path.parent
    found = path.rglob("*") if path.is_dir() else [path, *folder.glob("*.yaml"), *folder.glob("*.py")]
    digest = blake3()
    for file in sorted({file for file in found if file.is_file() and "__pycache__" not in file.parts}):
        digest.update(f"{file.relative_to(folder)}\0{blake3(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
