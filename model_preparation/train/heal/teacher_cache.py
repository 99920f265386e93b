"""Keeps a teacher's likeliest tokens on the disk, for each position of the loss: training then needs no teacher.

A folder has `teacher_cache.json` and shards of a fixed number of sequences. Per position, a shard has the K largest
log-probabilities at the run's temperature, their tokens, and the log-probability of all other tokens together. Without
this last number, the student would learn that only K tokens exist (arXiv 2503.16870, section 3).
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model_preparation.checkpoint.base_store import locked
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder, write_file
from model_preparation.io.complete_folder import check_space
from model_preparation.io.digests import FILE_FIELDS, describe_files, fault_of
from model_preparation.io.progress import bar
from model_preparation.io.result_inputs import differences
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json
from model_preparation.train.heal.conversation_tokens import NOT_COUNTED
from model_preparation.train.heal.losses import LiveTeacher, TeacherOutput, next_tokens
from model_preparation.train.heal.sequences import Sequences

CACHE_FILE = "teacher_cache.json"
_FIELDS = {"format_version": int, "inputs": {"teacher": str}, "files": {"*": FILE_FIELDS}}
_SHARD_BYTES = 64 << 20


class TeacherCache:
    """The cache in a folder, for one teacher and one set of training sequences.

    Args:
        inputs: all that the cache depends on: digests of teacher, tokenizer and sequences, and numbers such as
            `teacher_top_k`, `vocabulary` and `block_size`.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any], sequences: Sequences):
        self.folder, self._inputs, self._sequences = folder, inputs, sequences
        self._shards: dict[int, Any] = {}  # the open shards, by number
        self._token_dtype = torch.uint16 if inputs["vocabulary"] <= 1 << 16 else torch.int32
        self._position_bytes = inputs["teacher_top_k"] * (4 + self._token_dtype.itemsize) + 4
        self._per_shard = max(1, _SHARD_BYTES // (inputs["block_size"] * self._position_bytes))

    @cached_property
    def _paths(self) -> list[Path]:
        return [self.folder / f"{n:06}.safetensors" for n in range(-(-len(self._sequences) // self._per_shard))]

    def fill(self, load: Callable[[], LiveTeacher], processes: PartialState) -> None:
        """Make the shards that are missing. The processes of this run share the work; other runs wait.

        Args:
            load: loads the teacher; it is called only if a shard is missing.

        Raises:
            SurgeryError: if the folder holds other files, the cache of other inputs, or a damaged shard.
        """
        with contextlib.ExitStack() as stack:
            if processes.is_main_process:
                make_folder(self.folder)
                stack.enter_context(locked(self.folder))
                self._begin()
            processes.wait_for_everyone()
            mine = range(processes.process_index, len(self._paths), processes.num_processes)
            missing = [number for number in mine if not self._paths[number].is_file()]
            if missing:
                teacher = load()
                with bar("Asking the teacher", len(missing)) as advance:
                    for number in missing:
                        write_file(self._paths[number], save(self._shard(number, teacher)))
                        advance(1)
            processes.wait_for_everyone()
            if processes.is_main_process:
                self._write_record(describe_files(self.folder, "*.safetensors"))

    def _begin(self) -> None:
        """Check the files in the folder. If there are none, record the inputs of the shards."""
        recorded = _read(self.folder)
        if recorded is None:
            if others := [path.name for path in self.folder.iterdir() if path.name != "lock"]:
                raise SurgeryError(
                    f"{self.folder} holds other files ({others[0]}) and no {CACHE_FILE}. Give another --teacher_cache."
                )
            positions = sum(int((self._targets(index) != NOT_COUNTED).sum()) for index in range(len(self._sequences)))
            check_space(self.folder / CACHE_FILE, positions * self._position_bytes)
            self._write_record({})
        elif found := differences(recorded["inputs"], self._inputs):
            raise SurgeryError(
                f"{self.folder} is the teacher cache of other inputs ({'; '.join(found)}). "
                "Give another --teacher_cache, or the inputs that it was made from."
            )
        else:
            for name, entry in recorded["files"].items():
                if (fault := fault_of(inside(self.folder, name), entry)) not in (None, "missing"):
                    raise SurgeryError(f"{self.folder / name} is {fault}. Remove it, then run this again.")

    def _write_record(self, files: Mapping[str, Any]) -> None:
        record = {"format_version": 1, "inputs": self._inputs, "files": files}
        write_file(self.folder / CACHE_FILE, json.dumps(record, indent=2) + "\n")

    def _targets(self, index: int) -> Tensor:
        return next_tokens(self._sequences[index]["labels"].unsqueeze(0))

    @torch.no_grad()
    def _shard(self, number: int, teacher: LiveTeacher) -> dict[str, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        starts = [0]
        first = number * self._per_shard
        last = min(first + self._per_shard, len(self._sequences))
        for index in range(first, last):
            inputs = {name: tensor.unsqueeze(0).to(teacher.device) for name, tensor in self._sequences[index].items()}
            found = teacher(inputs, self._targets(index) != NOT_COUNTED)
            log_probs, tokens = found.log_probs.topk(self._inputs["teacher_top_k"])
            others = found.log_probs.scatter(1, tokens, -torch.inf).logsumexp(1)
            parts.append((log_probs.cpu(), tokens.to("cpu", self._token_dtype), others.cpu()))
            starts.append(starts[-1] + len(tokens))
        log_probs, tokens, others = map(torch.cat, zip(*parts, strict=True))
        return {"log_probs": log_probs, "tokens": tokens, "others": others, "starts": torch.tensor(starts)}

    def __call__(self, inputs: Mapping[str, Tensor], counted: Tensor) -> TeacherOutput:
        """As in `Teacher`. `inputs` has `sequence` (batch, 1), the index of each row's training sequence.

        For a segment, it also has `skipped` (batch,), the number of counted positions in the segments before.
        """
        rows: list[list[Tensor]] = []
        device = counted.device
        skipped = inputs.get("skipped", torch.zeros(len(counted), dtype=torch.int64))
        for index, count, before in zip(inputs["sequence"].flatten(), counted.sum(1), skipped, strict=True):
            number, place = divmod(int(index), self._per_shard)
            if number not in self._shards:
                self._shards[number] = self._open(number)
            shard = self._shards[number]
            start = int(shard.get_slice("starts")[place : place + 1]) + int(before)
            rows.append(
                [shard.get_slice(name)[start : start + int(count)] for name in ("log_probs", "tokens", "others")]
            )
        log_probs, tokens, others = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
        is_whole = self._inputs["teacher_top_k"] == self._inputs["vocabulary"]
        return TeacherOutput(log_probs, tokens.long(), None if is_whole else others)

    def _open(self, number: int) -> Any:
        path = self._paths[number]
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{path} cannot be read ({error}). Remove it, then run this again.") from error


def recorded_teacher(folder: Path) -> str | None:
    """The digest of a cache's teacher; None if there is no cache, or it was never complete."""
    recorded = _read(folder)
    return recorded["inputs"]["teacher"] if recorded is not None and recorded["files"] else None


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / CACHE_FILE
    if not path.is_file():
        return None
    try:
        recorded = read_json(path)
        check_fields(recorded, _FIELDS)
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"{path} cannot be read ({error}). Give another --teacher_cache, or remove this one."
        ) from error
    return recorded
