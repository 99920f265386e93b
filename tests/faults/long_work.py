"""Work that keeps what it has so far, for the power cuts: healing, evaluating, and a search's journal.

Each prints a line per thing that it has promised to keep. To add one, add a line to `WORKS`.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from model_preparation import build_checkpoint, evaluate_checkpoint, verify_checkpoint
from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, INFO, TENSOR_DIGESTS
from model_preparation.evaluation.mmlu_questions import SUBJECTS
from model_preparation.evaluation.results_folder import RESULT, ResultsFolder
from model_preparation.io.self_checksum import checksum_fault
from model_preparation.search.journal import Journal
from model_preparation.train.heal import heal_trainer
from model_preparation.train.heal.heal import heal_checkpoint
from model_preparation.train.heal.resume_state import check_state, list_states
from tests.evaluation.test_mmlu import question, write_questions
from tests.faults.scenarios import Models
from tests.train.cutting import write_text


@dataclass(frozen=True)
class Work:
    """Work in a folder.

    Attributes:
        start: makes what is there before.
        run: does the work, or what is left of it.
        faults: given a folder after a power cut and the lines printed before it, what is wrong there.
        result: given the folder when all is done, what must be the same after every run.
        share_again: a factor of how often the work is run again after a power cut; below 1.0 for slow work.
    """

    start: Callable[[Models, Path], object]
    run: Callable[[Models, Path], None]
    faults: Callable[[Path, list[str]], Iterator[str]]
    result: Callable[[Path], object]
    share_again: float = 1.0


def _material(models: Models) -> Path:
    """The folder of what the works read in addition to the models."""
    folder = models.folder.with_name("material")
    folder.mkdir(exist_ok=True)
    return folder


# --- Healing ----------------------------------------------------------------------------------------------------------

_STATES = "out_resume"


def _start_healing(models: Models, folder: Path) -> None:
    folder.mkdir()
    text = _material(models) / "text.txt"
    if not text.exists():
        write_text(text, words=600)
        build_checkpoint(str(models.base), (1, 3), models.layers, _material(models) / "checkpoint")


def _heal(models: Models, folder: Path) -> None:
    rotate = heal_trainer.rotate

    def say_and_rotate(states: Path, *args) -> list[str]:
        print("saved", list_states(states)[0][-1].folder.name)
        return rotate(states, *args)

    with patch.object(heal_trainer, "rotate", say_and_rotate):
        heal_checkpoint(
            _material(models) / "checkpoint",
            _material(models) / "text.txt",
            folder / "out",
            prompts=[],
            overwrite=True,
            milestones={2: "checkpoint-2-kept"},
            max_steps=3,
            save_steps=1,
            save_total_limit=1,
            batch_size=2,
            block_size=16,
            learning_rate=1e-2,
            method="grafted",
            eval_interval=0,
            device="cpu",
        )
    print("done")


def _wrong_with_healing(folder: Path, said: list[str]) -> Iterator[str]:
    states = list_states(folder / _STATES)[0]
    for state in states:
        check_state(state)
    saved = [int(line.rpartition("-")[2]) for line in said if line.startswith("saved")]
    if saved and (not states or states[-1].steps < saved[-1]):
        yield f"the state of step {saved[-1]} was saved and is lost; there are {states}"
    if (folder / "out" / INFO).is_file():
        yield from map(str, verify_checkpoint(folder / "out", files_only=True))
    elif "done" in said:
        yield "the healed checkpoint is lost"


def _healed(folder: Path) -> object:
    tensors = json.loads((folder / "out" / TENSOR_DIGESTS).read_text())["tensors"]
    return tensors, sorted(path.name for path in folder.iterdir())


# --- Evaluating -------------------------------------------------------------------------------------------------------


def _start_evaluating(models: Models, folder: Path) -> None:
    folder.mkdir()
    build_checkpoint(str(models.base), (1, 3), models.layers, folder / "out")
    if not (_material(models) / "mmlu").exists():
        (_material(models) / "mmlu").mkdir()
        chance = random.Random(1)
        rows = {subject: {"dev": [question(chance)], "test": [question(chance)]} for subject in SUBJECTS}
        write_questions(_material(models) / "mmlu", rows)


def _evaluate(models: Models, folder: Path) -> None:
    keep = ResultsFolder.keep_record

    def keep_and_say(results: ResultsFolder, name: str, record) -> None:
        keep(results, name, record)
        print("kept", name)

    describe = "torch.utils.collect_env.get_pretty_env_info"  # runs pip, a second each time
    with patch.object(ResultsFolder, "keep_record", keep_and_say), patch(describe, lambda: "a machine"):
        evaluate_checkpoint(folder / "out", mmlu_data=_material(models) / "mmlu")
    print("done")


def _wrong_with_results(folder: Path, said: list[str]) -> Iterator[str]:
    yield from map(str, verify_checkpoint(folder / "out", files_only=True))
    evaluations = folder / "out" / EVALUATIONS
    for path in evaluations.glob("*/answers/*.json"):
        if (fault := checksum_fault(path.read_bytes())) is not None:
            yield f"{path.name} {fault}"
    kept = {path.stem for path in evaluations.glob("*/answers/*.json")}
    lost = [line for line in said if line.startswith("kept") and line.split()[1] not in kept]
    if lost:
        yield f"kept and lost: {lost}"
    finished = list(evaluations.glob(f"*/{RESULT}"))
    for path in finished:
        files = json.loads(path.read_text())["files"]
        for name, entry in files.items():
            if hashlib.sha256((path.parent / name).read_bytes()).hexdigest() != entry["sha256"]:
                yield f"{name} is not as {path} says"
    if "done" in said and (not finished or json.loads((folder / "out" / INFO).read_text())["mmlu_score"] is None):
        yield "the result is lost"


def _evaluated(folder: Path) -> object:
    [path] = (folder / "out" / EVALUATIONS).glob(f"*/{RESULT}")
    result = json.loads(path.read_text())
    beside = {path.name for path in [*folder.iterdir(), *(folder / "out" / EVALUATIONS).iterdir()]}
    return result["score"], result["tasks"], json.loads((folder / "out" / INFO).read_text())["mmlu_score"], beside


# --- A search's journal -----------------------------------------------------------------------------------------------

_ENTRIES = [{"layers": [number], "right": "01" * (100 + number)} for number in range(40)]  # more than a block of 4096
_JOURNAL = "a/search/journal.jsonl"


def _write_journal(models: Models, folder: Path) -> None:
    journal = Journal(folder / _JOURNAL)
    for entry in _ENTRIES[len(journal.entries) :]:
        journal.append(entry)
        print("kept", len(journal.entries))
    journal.close()
    print("done")


def _journal(folder: Path) -> list[dict]:
    if not (folder / _JOURNAL).exists():
        return []
    journal = Journal(folder / _JOURNAL)
    journal.close()
    return journal.entries


def _wrong_with_journal(folder: Path, said: list[str]) -> Iterator[str]:
    found = _journal(folder)
    kept = sum(line.startswith("kept") for line in said)
    if found != _ENTRIES[: len(found)] or len(found) < kept:
        yield f"{kept} entries were kept, and {len(found)} are there: {found[-1:]}"


WORKS = {
    "heal": Work(_start_healing, _heal, _wrong_with_healing, _healed, 0.3),
    "evaluate": Work(_start_evaluating, _evaluate, _wrong_with_results, _evaluated, 0.3),
    "journal": Work(lambda models, folder: folder.mkdir(), _write_journal, _wrong_with_journal, _journal),
}
