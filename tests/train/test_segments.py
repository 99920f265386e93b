"""--segment_length: sequences that are trained in segments, compared with whole ones."""

import json
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from model_preparation import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.train.heal.losses import Distillation, LiveTeacher, next_tokens
from model_preparation.train.heal.segments import segments
from model_preparation.train.heal.sequences import Sequences
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.teacher_cache import TeacherCache
from tests.conftest import VOCABULARY, assert_refused, seeded, tiny_config, tiny_llama_cfg
from tests.train.test_heal import info_of, log_of
from tests.train.test_teacher_cache import ALONE

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (2, 23), dtype=np.int32)
IDS = torch.from_numpy(TOKENS).long()
LABELS = IDS.clone()
LABELS[0, 3:10] = -100
BATCH = {"input_ids": IDS, "labels": LABELS, "sequence": torch.tensor([[0], [1]])}
PACKED = torch.cat([torch.arange(11), torch.arange(9), torch.arange(3)]).expand(2, -1)


@pytest.fixture(scope="module", params=["layers", "heads"])
def model(request) -> LlambaForCausalLM:
    grafted = {"llama_layers": [1]} if request.param == "layers" else {"llama_heads": {"1": [0, 1], "2": [1]}}
    return seeded(LlambaForCausalLM(tiny_config(llama_cfg=tiny_llama_cfg(), **grafted)))


def for_model(part: dict) -> dict:
    return {name: part[name] for name in part if name not in ("targets", "sequence", "start", "skipped")}


def loss_of(model, part) -> torch.Tensor:
    logits = model(**for_model(part)).logits
    return cross_entropy(logits.flatten(0, 1), part["targets"].flatten(), reduction="sum")


def gradients(model) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert all(gradient is not None for gradient in found)
    return found


@pytest.mark.parametrize("more", [{}, {"position_ids": PACKED}], ids=["one_document", "packed"])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_logits_and_loss_are_those_of_the_whole_sequence(model, length, more):
    whole = model(IDS, labels=LABELS, **more)
    parts, total = [], 0.0
    for part in segments({**BATCH, **more}, length, model.config):
        parts.append(model(**for_model(part)).logits.detach())
        total += cross_entropy(parts[-1].flatten(0, 1), part["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(total / (LABELS[:, 1:] != -100).sum(), whole.loss, rtol=0, atol=1e-5)


def test_gradients_are_those_of_one_segment_or_end_where_a_segment_begins(model):
    (model(IDS, labels=LABELS).loss * (LABELS[:, 1:] != -100).sum()).backward()
    whole = gradients(model)
    for length in (0, 23, 50):
        for part in segments(BATCH, length, model.config):
            loss_of(model, part).backward()
        torch.testing.assert_close(gradients(model), whole, rtol=1e-5, atol=1e-6)

    for part in segments(BATCH, 9, model.config):
        loss_of(model, part).backward()
    found = gradients(model)
    for start in (0, 9, 18):  # what is before is computed anew, and without gradients
        cache = LlambaCache(model.config)
        with torch.no_grad():
            if start:
                model(IDS[:, :start], **{CACHE_NAME: cache}, use_cache=True)
        logits = model(IDS[:, start : start + 9], **{CACHE_NAME: cache}, use_cache=True).logits
        targets = next_tokens(LABELS)[:, start : start + 9]
        cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-5)


def test_the_distance_to_a_teacher_is_that_of_the_whole_sequence(checkpoint_dir, donor_dir, tmp_path):
    student, tokenizer = load_checkpoint(checkpoint_dir)
    teacher = load_other(OtherModel("donor", donor_dir, is_checkpoint=False), tokenizer)[0]
    settings = HealSettings(teacher="donor", temperature=2.0, teacher_weight=0.6, reverse_weight=0.3)
    live = LiveTeacher(teacher, settings)
    sequences = Sequences(TOKENS)
    inputs = {"teacher": "a", "block_size": 23, "teacher_top_k": 9, "vocabulary": VOCABULARY}
    cached = TeacherCache(tmp_path / "cache", inputs, sequences)
    cached.fill(lambda: live, ALONE)
    batch = {"input_ids": IDS, "labels": IDS, "sequence": BATCH["sequence"]}
    for source in (live, cached):
        distillation = Distillation(source, settings)
        found = []
        for length in (0, 8):
            with torch.no_grad():
                parts = [
                    distillation.loss(student(**for_model(part)), part, 44)
                    for part in segments(batch, length, student.config)
                ]
            found.append(sum(parts).item())
        assert found[1] == pytest.approx(found[0], abs=1e-5)
    with pytest.raises(SurgeryError, match="would mix the documents"):
        live({"input_ids": IDS, "position_ids": PACKED, "start": 0}, IDS > 0)


def test_every_process_has_as_many_segments_however_long_its_rows_are(model):
    parts = [dict(part) for part in segments(BATCH, 8, model.config, width=40)]
    assert [part["targets"].shape[1] for part in parts] == [8] * 5
    assert int(sum((part["targets"] != -100).sum() for part in parts)) == int((LABELS[:, 1:] != -100).sum())


def test_a_run_in_segments_begins_with_the_losses_of_a_run_without(heal, tmp_path):
    more = ("--block_size", 40, "--dropout", 0, "--max_steps", 1, "--eval_interval", 1, "--method", "lora")
    for name, length in (("whole", 0), ("segments", 12)):
        result = heal(tmp_path / name, *more, "--segment_length", length)
        assert result.returncode == 0, result.stderr
    logs = [log_of(tmp_path / name) for name in ("whole", "segments")]
    for name in ("loss", "eval_loss"):
        first = [next(entry[name] for entry in log if name in entry) for log in logs]
        assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert info_of(tmp_path / "segments")["healing"]["steps"] == 1
    with pytest.raises(SurgeryError, match="segment_length is 40, but a whole sequence has 40 tokens"):
        HealSettings(segment_length=40, block_size=40)
    with pytest.raises(SurgeryError, match="gradient_checkpointing and segment_length cannot be used together"):
        HealSettings(segment_length=8, gradient_checkpointing=True)


def test_packed_texts_a_teacher_on_the_disk_and_segments_go_together(heal, donor_dir, tmp_path):
    draw = random.Random(3)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    rows = [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    given = ("--data", tmp_path / "rows.jsonl", "--packing", "--block_size", 64, "--dropout", 0, "--max_steps", 1)
    given += ("--eval_interval", 1, "--teacher", donor_dir)
    cache = ("--teacher_cache", tmp_path / "cache", "--teacher_top_k", VOCABULARY)
    first = {}
    for name, more in {"memory": (), "disk": (*cache, "--segment_length", 24)}.items():
        result = heal(tmp_path / name, *given, *more)
        assert result.returncode == 0, result.stderr
        log = log_of(tmp_path / name)
        first[name] = [next(entry[key] for entry in log if key in entry) for key in ("loss", "eval_loss")]
    assert first["disk"] == pytest.approx(first["memory"], abs=1e-5)
    assert_refused(
        heal(tmp_path / "refused", *given, "--segment_length", 24), "would mix the documents", "--teacher_cache"
    )
