"""A measured MMLU score, entered into the checkpoint it belongs to.

In: the checkpoint's folder and the result. Out: `mmlu_score` and `mmlu_result` in its checkpoint_info.json. The file is
the old one or the new one, whatever happens. A score of other weights does not stay.
"""

import errno
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.folder_lock import take
from model_preparation.io.identity import differences
from model_preparation.io.self_checksum import with_checksum

_PARTS = ("score", "stderr", "questions", "lm_eval_version", "settings", "weights", "model", "date")
_WAIT_SECONDS = 10  # for another evaluation of the same checkpoint that enters its score just now


def enter_score(directory: Path, result: Mapping[str, Any], *, is_mmlu: bool = True) -> bool:
    """Enter an MMLU score with where it comes from; returns whether it is there now.

    A score of the same model over more questions stays; one of another model does not, nor one that somebody gave when
    the checkpoint was built.

    Args:
        directory: the checkpoint's folder.
        result: as `evaluate_checkpoint` returns it.
        is_mmlu: whether it is of MMLU; a result of other tasks only tells what the model is now.

    Raises:
        OSError, SurgeryError: if checkpoint_info.json cannot be written.
    """
    measured = {name: result[name] for name in _PARTS}
    path = directory / INFO
    hold = _take(path)
    try:
        info = read_info(directory)
        before = info.get("mmlu_result")
        is_current = not differences((before or {}).get("model", {}), measured["model"])
        if is_mmlu and not (before and is_current and before["questions"] > measured["questions"]):
            if before != measured:
                write_file(path, with_checksum({**info, "mmlu_score": result["score"], "mmlu_result": measured}))
            return True
        if before and not is_current:
            without = {name: value for name, value in info.items() if name != "mmlu_result"}
            write_file(path, with_checksum({**without, "mmlu_score": None}))
        return False
    finally:
        hold.release()


def _take(path: Path):
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return take(path)
        except SurgeryError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def is_read_only(error: OSError) -> bool:
    """Whether an error says that a folder may not be written, as that of a shared store of models."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
