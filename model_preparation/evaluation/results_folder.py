"""The folder of one evaluation. It belongs to one model with its tasks and settings.

The folder is called `TASKS-DIGEST/`, with a digest of the settings. So the same settings give every model's folder the
same name. Only one run at a time can use the folder. It has:
    settings.json            the settings and the model
    answers/KIND.TASK.json   the answers to a task; a text that is not generated yet is null
    MODEL/                   lm-eval's own files: results_DATE.json, samples_TASK_DATE.jsonl
    result.json              the scores; written last, so its presence means that the evaluation is finished
Every file except lm-eval's is JSON with a checksum of its own content (io/self_checksum.py). Such a file is complete or
absent. If the folder has results of another model (other weights, config or tokenizer), they are moved to
`TASKS-DIGEST.of-weights-DIGEST/`. They are moved back when that model is evaluated again.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS_ASIDE
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder, sync, sync_tree, write_file
from model_preparation.io.digests import FILE_FIELDS, describe_files, fault_of
from model_preparation.io.folder_lock import Hold, take
from model_preparation.io.result_inputs import differences, digest_of
from model_preparation.io.self_checksum import checksum_fault, with_checksum
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

SETTINGS, RESULT, ANSWERS = "settings.json", "result.json", "answers"
_ROW = {"score": (int, float), "stderr": (int, float, NoneType), "metric": str, "questions": int, "protocol?": dict}
_ROWS = {"*": _ROW}
_RESULT_FIELDS = {
    **{"tasks": _ROWS, "groups": _ROWS, "subjects": _ROWS, "lm_eval_version": str, "asked": {"*": str}},
    **{"files": {"*": FILE_FIELDS}, "questions": int, "truncated?": {"*": int}},
    **{"score?": _ROW["stderr"], "stderr?": _ROW["stderr"]},
}
_FIELDS: dict[str, Any] = {RESULT: _RESULT_FIELDS, SETTINGS: {"settings": dict, "weights": str, "model?": dict}}
_ANSWER = (str, int, float, NoneType, [(int, float, bool)])
_ANSWERS_FIELDS = {"requests": str, "answers": [_ANSWER], "seconds?": (int, float), "truncated?": int}
_SAFE = re.compile(r"[^\w.+-]+")


class ResultsFolder:
    """One evaluation's folder.

    Args:
        root: the folder of all evaluations of a model.
        settings: everything that the scores depend on, except the model. The field `tasks` is required.
        model: digests of everything that the model's answers depend on; see `ScoredModel.inputs`.

    Attributes:
        weights: one digest of `model`.
        put_aside: the folder to which `held` moved another model's results; None if there were none.
        differing: phrases that say how that model differs.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], model: Mapping[str, Any]):
        self.settings = dict(settings)
        self.model = dict(model)
        self.weights = digest_of(model)
        digest = digest_of(settings)[:12]
        names = "+".join(settings["tasks"])
        self.folder = root / f"{_SAFE.sub('_', names)[:60]}-{digest}"
        self.put_aside: Path | None = None
        self.differing: list[str] = []
        self._hold: Hold  # from `held`

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, no other run can use the folder. First, results of another model are moved away.

        Raises:
            SurgeryError: if another run is using the folder, or if the folder has results of other settings.
            OSError: if the folder cannot be written.
        """
        self._hold = take(self.folder)
        try:
            self._empty_staging()  # of a killed run
            self._move_other_model_aside()
            make_folder(self.folder / ANSWERS)
            for unfinished in self.folder.rglob("*.partial-*"):  # of killed runs
                unfinished.unlink()
            self._write(SETTINGS, {"settings": self.settings, "weights": self.weights, "model": self.model})
            yield
        finally:
            self._empty_staging()
            self._hold.release()

    def result(self) -> dict[str, Any] | None:
        """The result of the evaluation; None if it is not finished, or if lm-eval's files were changed later."""
        result = read_checked_json(self.folder / RESULT)
        files = {} if result is None else result["files"]
        return None if any(fault_of(inside(self.folder, name), entry) for name, entry in files.items()) else result

    def read_record(self, name: str) -> dict[str, Any] | None:
        """A record that `keep_record` wrote; None if it is missing or damaged."""
        return read_checked_json(self.folder / ANSWERS / f"{_SAFE.sub('_', name)}.json")

    def keep_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record, such as a task's answers. It is safely on the disk when this method returns."""
        self._write(f"{ANSWERS}/{_SAFE.sub('_', name)}.json", record)

    def tracker(self) -> "EvaluationTracker":
        """Make the object that writes lm-eval's own files. `finish` needs it."""
        from lm_eval.loggers import EvaluationTracker  # slow to import, and not needed to read results

        return EvaluationTracker(output_path=str(self._staging()))

    def finish(
        self,
        tracker: "EvaluationTracker",
        results: dict[str, Any],
        samples: Mapping[str, Sequence],
        result: Mapping[str, Any],
    ) -> None:
        """Write lm-eval's results and samples files in place of older ones. Then write `result`, as the last file.

        Raises:
            SurgeryError: if lm-eval did not write its files completely. lm-eval itself only logs this failure.
        """
        tracker.save_results_aggregated(results=results, samples=dict(samples))
        for task in samples:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        written = [path for path in self._staging().iterdir() if path.is_dir()]
        if len(written) != 1 or not _is_whole(written[0], samples):
            free = shutil.disk_usage(self.folder).free
            raise SurgeryError(
                f"lm-eval could not write its results whole in {self.folder}. The disk has {free:,} bytes free. "
                "Make room and run the same command again: the answers are kept."
            )
        sync_tree(written[0], "")
        target = self.folder / written[0].name
        shutil.rmtree(target, ignore_errors=True)  # of a run killed before it wrote the result
        written[0].rename(target)
        sync(self.folder)  # the result names these files, so they must be on the disk before it
        self._write(RESULT, {**result, "files": describe_files(self.folder, f"{target.name}/*")})

    def _staging(self) -> Path:
        folder = self._hold.folder / "new"
        folder.mkdir(exist_ok=True)
        return folder

    def _empty_staging(self) -> None:
        for entry in self._hold.entries():
            shutil.rmtree(entry, ignore_errors=True)

    def _move_other_model_aside(self) -> None:
        found = read_checked_json(self.folder / SETTINGS)
        if found is None:
            return
        if odd := differences(found["settings"], self.settings):
            raise SurgeryError(
                f"{self.folder} holds results of other settings ({'; '.join(odd)}): it was renamed. "
                "Move it elsewhere, or choose another --results_dir."
            )
        # Files from before 0.2.0 have one digest of the whole model.
        self.differing = differences(found.get("model", {"weights": found["weights"]}), self.model)
        if self.differing:
            self.put_aside = self._aside(found["weights"])
            self.folder.rename(self.put_aside)
            if self._aside(self.weights).is_dir():
                self._aside(self.weights).rename(self.folder)
            sync(self.folder.parent)

    def _aside(self, weights: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}{EVALUATIONS_ASIDE}{weights[:12]}")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if not self._hold.is_intact():
            raise SurgeryError(f"{self._hold.folder} was deleted while it was in use. Run the command again.")
        write_file(self.folder / name, with_checksum(content))


def chosen_metric(row: Mapping[str, Any], wanted: str = "acc") -> str | None:
    """The name of the score that counts, such as "acc,none", in a row of lm-eval's results.

    It is `wanted` if the row has that score, else the row's first score; None if the row has no score.
    """
    metrics = [key for key in row if "," in key and "_stderr," not in key]
    return min(metrics, key=lambda key: key != f"{wanted},none", default=None)


def read_checked_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of an evaluation; None if the file is missing or its checksum does not match.

    Raises:
        SurgeryError: if the fields are not those that this program writes.
    """
    if not path.is_file() or checksum_fault(path.read_bytes()) is not None:
        return None
    try:
        found = read_json(path)
        check_fields(found, _FIELDS.get(path.name, _ANSWERS_FIELDS))
    except ValueError as error:
        raise SurgeryError(
            f"{path} is not a result of this program ({error}). Remove it and run the command again."
        ) from error
    return found


def _is_whole(folder: Path, samples: Mapping[str, Sequence]) -> bool:
    """Whether lm-eval's files are complete: one results file, which is JSON, and for each task a line per sample."""
    lines = {}
    for path in folder.glob("samples_*.jsonl"):
        with path.open("rb") as file:
            lines[path.name.removeprefix("samples_").rsplit("_", 1)[0]] = sum(line.endswith(b"\n") for line in file)
    try:
        (results,) = folder.glob("results_*.json")
        json.loads(results.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return all(lines.get(task) == len(samples[task]) for task in samples)
