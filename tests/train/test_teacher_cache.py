"""--teacher_cache: what a teacher says, kept on the disk, in place of the teacher."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.train.heal import teacher_cache
from model_preparation.train.heal.losses import LiveTeacher
from model_preparation.train.heal.sequences import Sequences
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.teacher_cache import CACHE_FILE, TeacherCache
from tests.conftest import VOCABULARY, assert_refused
from tests.train.cutting import outcome, write_text

ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None)
SEQUENCES = Sequences(np.random.default_rng(0).integers(0, VOCABULARY, (6, 8), dtype=np.int32))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in lines if "loss" in entry]


@pytest.fixture(scope="module")
def cached(heal, donor_dir, tmp_path_factory) -> Path:
    """A run that filled the cache of all tokens, and one with the teacher in memory. The teacher is gone."""
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(donor_dir, folder / "teacher")
    for name, more in (("live", ()), ("out", ("--teacher_cache", folder / "cache", "--teacher_top_k", VOCABULARY))):
        result = heal(folder / name, "--teacher", folder / "teacher", "--temperature", 2, *more)
        assert result.returncode == 0, result.stderr
    shutil.rmtree(folder / "teacher")
    return folder


def test_with_all_tokens_kept_the_losses_are_those_of_the_teacher_in_memory(cached):
    assert losses(cached / "out") == pytest.approx(losses(cached / "live"), abs=1e-6)
    info = json.loads((cached / "out" / "checkpoint_info.json").read_text())
    assert info["healing"]["objective"] == "distillation"
    assert info["healing"]["settings"]["teacher_cache"] == "cache"


def test_once_it_is_complete_no_teacher_is_needed_and_the_bits_are_the_same(heal, cached, tmp_path):
    given = ("--temperature", 2, "--teacher_cache", cached / "cache", "--teacher_top_k", VOCABULARY + 1)  # all
    assert heal(tmp_path / "out", *given).returncode == 0
    assert outcome(tmp_path / "out") == outcome(cached / "out")
    # A run that began with the teacher continues without it.
    shutil.copytree(cached / "out_resume", tmp_path / "again_resume")
    shutil.rmtree(tmp_path / "again_resume" / "checkpoint-6")
    result = heal(tmp_path / "again", "--teacher", cached / "teacher", *given)
    assert "Resuming from" in result.stdout
    assert outcome(tmp_path / "again") == outcome(cached / "out")


def test_a_cache_of_other_inputs_is_refused_in_a_sentence(heal, donor_dir, base_dir, cached, tmp_path):
    given = ["--teacher_cache", cached / "cache", "--teacher_top_k", VOCABULARY, "--temperature", 2]
    write_text(tmp_path / "other.txt", words=300, seed=3)
    for more, words in (
        (("--teacher", base_dir), "teacher: the content has changed"),
        (("--data", tmp_path / "other.txt"), "sequences: the content has changed"),
        (("--temperature", 3), "temperature: was 2.0, is now 3.0"),
    ):
        refused = heal(tmp_path / "out", *given, *more)
        assert_refused(refused, f"{cached / 'cache'} is the teacher cache of other inputs", words, "--teacher_cache")
    refused = heal(tmp_path / "out", "--teacher_cache", tmp_path / "none")
    assert_refused(refused, f"{tmp_path / 'none'} is no complete teacher cache", "give --teacher too")
    refused = heal(tmp_path / "out", "--teacher", donor_dir, "--teacher_cache", tmp_path)
    assert_refused(refused, f"{tmp_path} holds other files", "another --teacher_cache")
    assert_refused(heal(tmp_path / "out", *given, "--hidden_weight", 1), "hidden_weight", "a teacher in memory")
    assert_refused(heal(tmp_path / "out", "--teacher_top_k", 3), "teacher_top_k is given", "without teacher_cache")
    shard = cached / "cache" / "000000.safetensors"
    content = shard.read_bytes()
    for damaged, words in ((content[:-9], "bytes long instead of"), (content[:-1] + b"!", "changed")):
        shard.write_bytes(damaged)
        assert_refused(heal(tmp_path / "out", *given), str(shard), words, "Remove it, then run this again")
    shard.write_bytes(content)
    record = (cached / "cache" / CACHE_FILE).read_text()
    (cached / "cache" / CACHE_FILE).write_text(record[:-20])
    assert_refused(heal(tmp_path / "out", *given), f"{CACHE_FILE} cannot be read")
    (cached / "cache" / CACHE_FILE).write_text(record)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def teacher(donor_dir, checkpoint_dir, monkeypatch):
    """Makes a teacher that notes each question in `asked`, and kills its process at question `dies_at`."""
    monkeypatch.setattr(teacher_cache, "_SHARD_BYTES", 1)  # a shard for each sequence
    model = load_other(OtherModel("donor", donor_dir, is_checkpoint=False), None)[0]

    def load(asked: Path, dies_at: int | None = None) -> LiveTeacher:
        class Noting(LiveTeacher):
            def __call__(self, inputs, counted):
                with asked.open("a") as notes:
                    notes.write("asked\n")
                if len(asked.read_text().split()) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(inputs, counted)

        return Noting(model, HealSettings())

    return load


def cache_in(folder: Path, **more) -> TeacherCache:
    numbers = {"teacher": "a", "block_size": 8, "teacher_top_k": 5, "vocabulary": VOCABULARY}
    return TeacherCache(folder, numbers | more, SEQUENCES)


def in_child(work) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_killed_while_it_is_filled_it_continues_and_has_the_same_bytes(teacher, tmp_path):
    cache_in(tmp_path / "whole").fill(lambda: teacher(tmp_path / "of_whole"), ALONE)
    child = in_child(lambda: cache_in(tmp_path / "cut").fill(lambda: teacher(tmp_path / "first", 4), ALONE))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert teacher_cache.recorded_teacher(tmp_path / "cut") is None
    cache_in(tmp_path / "cut").fill(lambda: teacher(tmp_path / "second"), ALONE)
    assert len((tmp_path / "second").read_text().split()) == 3  # 6 shards, of which 3 were there
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert teacher_cache.recorded_teacher(tmp_path / "cut") == "a"


def test_two_runs_at_once_ask_the_teacher_once(teacher, tmp_path):
    runs = [
        in_child(lambda: cache_in(tmp_path / "cache").fill(lambda: teacher(tmp_path / "asked"), ALONE)) for _ in "ab"
    ]
    assert [os.waitpid(run, 0)[1] for run in runs] == [0, 0]
    assert len((tmp_path / "asked").read_text().split()) == len(SEQUENCES)


def test_what_is_kept_are_the_largest_log_probabilities_and_the_rest_of_1(teacher, donor_dir, tmp_path):
    cache = cache_in(tmp_path / "cache")
    cache.fill(lambda: teacher(tmp_path / "asked"), ALONE)
    shards = [load_file(path) for path in sorted(cache.folder.glob("*.safetensors"))]
    shard = {name: torch.cat([each[name] for each in shards]) for name in ("log_probs", "tokens", "others")}
    model = load_other(OtherModel("donor", donor_dir, is_checkpoint=False), None)[0]
    ids = torch.from_numpy(SEQUENCES.tokens).long()
    with torch.no_grad():
        exact = model(ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    wanted = exact.sort(descending=True)
    torch.testing.assert_close(shard["log_probs"].double(), wanted.values[:, :5], rtol=0, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, shard["tokens"].long()), wanted.values[:, :5], rtol=0, atol=1e-5)
    torch.testing.assert_close(shard["others"].double().exp(), wanted.values[:, 5:].exp().sum(1), rtol=1e-4, atol=1e-6)
    # The number of bytes per position that the documents state.
    assert sum(tensor.nbytes for tensor in shard.values()) == len(exact) * (5 * 6 + 4)
    with pytest.raises(SurgeryError, match="teacher_top_k: was 5, is now 4"):
        cache_in(tmp_path / "cache", teacher_top_k=4).fill(lambda: teacher(tmp_path / "asked"), ALONE)
