"""Find the finished evaluation that a user means by a folder.

A user gives a checkpoint's folder (with `evaluations/<task>-<settings digest>/`), such an evaluation's folder, any
output folder of `lm_eval --log_samples`, or one results file. The files have the layout of lm-eval's EvaluationTracker
(lm_eval/loggers/evaluation_tracker.py): `results_<date>.json` and `samples_<task>_<date>.jsonl` in one folder, which
may be a subfolder with the model's name. If there are several dates, the newest one with all of its files counts.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, EVALUATIONS_ASIDE, INFO
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.efficiency import FOLDER as EFFICIENCY
from model_preparation.evaluation.models import find_model
from model_preparation.evaluation.results_folder import SETTINGS, read_checked_json
from model_preparation.io.result_inputs import differences
from model_preparation.io.untrusted.untrusted_files import bounded, check_fields

# With `--output_path FILE.json`, lm_eval calls the results file FILE_<date>.json.
_RESULTS = re.compile(r"(?!samples_).*_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.json")
_DEPTHS = ("*", "*/*", "*/*/*")  # the deepest: a --results_dir has <task>-<digest>/, which has a folder for the model
# The fields that are read from a results file; older versions of lm-eval lack some. In `_NAMED` are the fields with an
# entry for each task or group, by its name.
_NAMED: dict[str, Any] = {name: {"*": dict} for name in ("results", "configs", "n-samples", "higher_is_better")}
_NAMED |= {"group_subtasks": {"*": [str]}}
_FIELDS = {f"{name}?": kind for name, kind in _NAMED.items()} | {"config?": dict, "max_length?": (int, NoneType)}


@dataclass(frozen=True)
class EvaluationFiles:
    """A finished evaluation.

    Attributes:
        given: the path that the user gave, resolved.
        name: the name of the evaluation's folder. In our folders, it has the tasks and a digest of the settings.
        results_path: lm-eval's results file.
        results: the contents of that file.
        samples: {task: its samples file}.
        checkpoint: the folder of the checkpoint that contains the evaluation, or None.
        passed_over: newer results files, which were not taken because samples files are missing.
    """

    given: Path
    name: str
    results_path: Path
    results: dict[str, Any]
    samples: dict[str, Path]
    checkpoint: Path | None = None
    passed_over: tuple[Path, ...] = ()

    @property
    def place(self) -> Path:
        """The folder after which the model is named. For an evaluation in a --results_dir, it is the parent folder."""
        return self.checkpoint or (self.given.parent if (self.given / SETTINGS).is_file() else self.given)

    @property
    def date(self) -> str:
        """The day on which the evaluation was finished."""
        return _date(self.results_path)[:10]

    @property
    def groups(self) -> dict[str, list[str]]:
        """{group: its groups and tasks}. Older versions of lm-eval list tasks as empty groups; these are left out."""
        return {name: children for name, children in self.results["group_subtasks"].items() if children}

    def tasks_of(self, name: str) -> list[str]:
        """The tasks in a group and in its inner groups, each once. For a task: that task. For other names: nothing."""
        found, waiting, seen = [], [name], set()
        while waiting:
            name = waiting.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self.samples:
                found.append(name)
            else:
                waiting = [*self.groups.get(name, []), *waiting]
        return found


def find_evaluations(folders: Sequence[str | Path], task: str | None = None) -> list[EvaluationFiles]:
    """Find one evaluation per folder.

    Args:
        folders: as the top of this file says.
        task: a task or group that the evaluation must have; or the name of an evaluation's folder.

    Raises:
        SurgeryError: if a folder has no finished evaluation, or has several and `task` does not choose one; or if a
            checkpoint's weights, config or tokenizer have changed since its evaluation.
    """
    found = [_candidates(Path(folder).expanduser(), task) for folder in folders]
    # Our folders are named after their settings. If exactly one name is in all checkpoints, take its evaluations.
    shared = set.intersection(*({each.name for each in candidates} for candidates in found))
    if len(shared) == 1:
        found = [[each for each in candidates if each.name in shared] for candidates in found]
    for folder, candidates in zip(folders, found, strict=True):
        if len(candidates) > 1:
            raise SurgeryError(
                f"{folder} has {len(candidates)} evaluations: {_listed(candidates)}. "
                "Name one by --task, or give its folder instead of this one."
            )
    chosen = [candidates[0] for candidates in found]
    for evaluation in chosen:
        _check_weights(evaluation)
    return chosen


def _check_weights(evaluation: EvaluationFiles) -> None:
    """Raise SurgeryError if an evaluation's checkpoint now has other weights, config or tokenizer."""
    settings = evaluation.results_path.parents[1] / SETTINGS
    if evaluation.checkpoint is None or not settings.is_file():
        return
    checkpoint = evaluation.checkpoint
    if odd := differences((read_checked_json(settings) or {}).get("model", {}), find_model(checkpoint).inputs):
        raise SurgeryError(
            f"{checkpoint} has changed since the evaluation in {settings.parent} ({'; '.join(odd)}). Evaluate again: "
            f"python test_checkpoint.py --checkpoint {checkpoint} --full_eval and the flags of that evaluation."
        )


def _candidates(given: Path, task: str | None) -> list[EvaluationFiles]:
    """The finished evaluations in a folder, at least one; only those of `task`, if it is given."""
    if given.is_file() and not _RESULTS.fullmatch(given.name):
        raise SurgeryError(f"{given} is not a results file (results_<date>.json). Give the folder it is in.")
    if not given.exists():
        raise SurgeryError(f"{given} is not there. Give a checkpoint's folder, or one that lm_eval wrote.")
    given = given.resolve()
    root = given / EVALUATIONS if (given / INFO).is_file() else given
    files = [given] if given.is_file() else [path for depth in _DEPTHS for path in root.glob(depth)]
    files = [path for path in files if path.is_file() and _RESULTS.fullmatch(path.name)]
    if not given.is_file():  # results of earlier weights count only if `given` is their own folder or file
        files = [path for path in files if not any(EVALUATIONS_ASIDE in part for part in path.relative_to(root).parts)]
    if not files:
        raise _not_finished(given, root)
    candidates = [_newest_complete(given, root, folder, files) for folder in sorted({path.parent for path in files})]
    wanted = [each for each in candidates if task in (None, each.name) or each.tasks_of(str(task))]
    if not wanted:
        raise SurgeryError(
            f"{given} has no finished evaluation of {task!r}. Give another --task; there are {_listed(candidates)}."
        )
    return wanted


def _newest_complete(given: Path, root: Path, folder: Path, files: list[Path]) -> EvaluationFiles:
    """The newest evaluation in `folder` that has all of its files; `files` has the results files of all folders."""
    passed_over: list[Path] = []
    for path in sorted((path for path in files if path.parent == folder), key=_date, reverse=True):
        results = read_results(path)
        samples = {task: folder / f"samples_{task}_{_date(path)}.jsonl" for task in results["configs"]}
        missing = [sample.name for sample in samples.values() if not sample.is_file()]
        if samples and not missing:
            below = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
            name = below[0] if below else folder.name
            return EvaluationFiles(given, name, path, results, samples, _checkpoint_of(given), tuple(passed_over))
        passed_over.append(path)
    example = (missing or ["samples_<task>_<date>.jsonl"])[0]
    raise SurgeryError(
        f"{passed_over[-1]} lacks samples files, such as {example} in the same folder. Without them, questions cannot "
        "be compared one by one. Run the evaluation again; lm_eval needs --log_samples."
    )


def read_results(path: Path) -> dict[str, Any]:
    """Read lm-eval's results file.

    Raises:
        SurgeryError: if the file is damaged, or is another kind of file.
    """
    try:
        results = json.loads(path.read_bytes(), parse_int=bounded)
        if not isinstance(results, dict):
            raise ValueError("it holds no JSON object")
        check_fields(results, _FIELDS)
        results = {name: {} for name in (*_NAMED, "config")} | results
        names: Iterator[str] = itertools.chain(*(results[name] for name in _NAMED), *results["group_subtasks"].values())
        if wrong := [name for name in names if not _is_name(name)]:
            raise ValueError(f"{wrong[0]!r:.80} is not the name of a task")
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path} is not a whole results file of lm-eval: {error}. Evaluate again.") from error
    return results


def _is_name(name: str) -> bool:
    """Whether this can be the name of a task or group. Such names become part of file names, and are printed."""
    return bool(name) and name.isprintable() and not set(name) & set("/\\")


def _not_finished(given: Path, root: Path) -> SurgeryError:
    checkpoint = _checkpoint_of(given)
    command = f"python test_checkpoint.py --checkpoint {checkpoint or 'CHECKPOINT'} --full_eval"
    begun = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    begun = [name for name in begun if name != EFFICIENCY]
    if checkpoint == given and not begun:
        return SurgeryError(f"{given} has not been evaluated. Run {command}.")
    if checkpoint is not None:
        which = ", ".join(begun) if checkpoint == given else given.name
        return SurgeryError(
            f"{given} has no finished evaluation: {which} has no results_<date>.json yet. "
            f"Continue it by {command} and the flags it was begun with."
        )
    return SurgeryError(
        f"{given} has no results_<date>.json, so no evaluation was finished there. Continue an evaluation by "
        f"{command} and the flags it was begun with, or run lm_eval with --output_path {given} --log_samples."
    )


def _checkpoint_of(given: Path) -> Path | None:
    """The checkpoint that `given` is, or that has `given` in its `evaluations`."""
    if (given / INFO).is_file():
        return given
    above = next((parent for parent in given.parents if parent.name == EVALUATIONS), None)
    return above.parent if above is not None and (above.parent / INFO).is_file() else None


def _date(path: Path) -> str:
    match = _RESULTS.fullmatch(path.name)
    return match["date"] if match else ""


def _listed(candidates: list[EvaluationFiles]) -> str:
    return "; ".join(f"{each.name} ({_settings(each)})" for each in candidates)


def _settings(evaluation: EvaluationFiles) -> str:
    below = {child for children in evaluation.groups.values() for child in children}
    tops = [name for name in [*evaluation.groups, *evaluation.samples] if name not in below]
    shots = sorted({str(evaluation.results["configs"][task].get("num_fewshot")) for task in evaluation.samples})
    limit = evaluation.results["config"].get("limit")
    return ", ".join([*tops[:3], f"{'/'.join(shots) or '?'}-shot", *([f"limit {limit}"] if limit else [])])
