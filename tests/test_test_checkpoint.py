"""The command test_checkpoint.py: what it prints of a checkpoint, and what makes it fail."""

import random
import re
import shutil
import sys

import pytest
import torch

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.mmlu import SUBJECTS, evaluate_checkpoint
from model_preparation.surgery.checkpoint_loading import load_checkpoint
from model_preparation.test_checkpoint import main
from tests.conftest import assert_refused, run_command
from tests.evaluation.test_mmlu import question, write_questions

END = 257  # of the tiny tokenizer


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process and return its standard output."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["test_checkpoint.py", *map(str, args)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def copy(checkpoint_dir, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(checkpoint_dir, tmp_path / "copy")


def change_weights(folder, change):
    path = folder / "model_state_dict.pt"
    state_dict = torch.load(path)
    change(state_dict)
    torch.save(state_dict, path)


@pytest.fixture(scope="module")
def mmlu_data(tmp_path_factory):
    rng = random.Random(0)
    rows = {subject: {split: [question(rng) for _ in range(3)] for split in ("dev", "test")} for subject in SUBJECTS}
    return write_questions(tmp_path_factory.mktemp("mmlu"), rows)


def test_a_fresh_process_in_another_folder_prints_what_the_checkpoint_is_and_writes(checkpoint_dir, tmp_path):
    result = run_command("test_checkpoint", "--checkpoint", checkpoint_dir, "--max_new_tokens", 6, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model, _ = load_checkpoint(checkpoint_dir)
    for line in (f"{model.num_parameters():,}", "Grafted +2 of 4 layers: 1 3", "On disk +.*B", "onto cpu, float32"):
        assert re.search(line, result.stdout), result.stdout
    speeds = r"Prompt read +\d+ tokens, [\d.]+ per second\nWritten +6 tokens, [\d.]+ per second\n"
    assert len(re.findall(r"Prompt  .+\nText .+\n" + speeds, result.stdout)) == 3


def test_the_text_is_the_models_greedy_continuation(command, checkpoint_dir):
    model, tokenizer = load_checkpoint(checkpoint_dir)
    inputs = tokenizer("Hello", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs.input_ids.shape[1] :]

    out = command(
        "--checkpoint", checkpoint_dir, "--prompt", "Hello", "world", "--max-new-tokens", 7, "--device", "cpu"
    )

    assert f"Prompt       Hello\nText         {tokenizer.decode(new, skip_special_tokens=True).strip()}\n" in out
    assert "Prompt       world\n" in out


def test_the_dtype_can_be_chosen(command, checkpoint_dir):
    assert "onto cpu, bfloat16" in command("--checkpoint", checkpoint_dir, "--prompt", "Hello", "--dtype", "bfloat16")


def test_full_eval_ends_with_the_score_of_lm_evals_mmlu_and_leaves_the_checkpoint_alone(
    command, checkpoint_dir, mmlu_data
):
    before = (checkpoint_dir / "checkpoint_info.json").read_bytes()
    expected = evaluate_checkpoint(checkpoint_dir, mmlu_data=mmlu_data, limit=2, num_fewshot=1)
    assert 0 < expected["score"] < 1

    flags = ("--full_eval", "--limit", 2, "--num_fewshot", 1, "--mmlu_data", mmlu_data, "--batch_size", 2)
    out = command("--checkpoint", checkpoint_dir, "--prompt", "Hello", *flags)

    def score(row):
        return f"{row['score']:.4f} ± {row['stderr']:.4f} ({row['questions']} questions)"

    assert out.splitlines()[-1] == f"MMLU score   {score(expected)}"
    assert expected["questions"] == 2 * 57
    for name, group in expected["groups"].items():
        assert f"{name:<16} {score(group)}\n" in out
    assert "--limit 2 is per subject" in out
    assert "not comparable with the full one" in out
    assert (checkpoint_dir / "checkpoint_info.json").read_bytes() == before


def test_a_folder_that_is_no_checkpoint_is_refused_with_one_line(tmp_path):
    assert_refused(run_command("test_checkpoint", "--checkpoint", tmp_path), "has no checkpoint_info.json")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "x", "--limit", "3"], "--limit belongs to --full_eval"),
        (["--checkpoint", "x", "--mmlu_data", "y"], "--mmlu_data belongs to --full_eval"),
        (["--checkpoint", "x", "--full_eval", "--limit", "0"], "0 is too small"),
        (["--checkpoint", "x", "--full_eval", "--limit", "0.5"], "'0.5' is not an integer"),
        (["--checkpoint", "x", "--full_eval", "--num_fewshot", "-1"], "-1 is too small"),
        (["--checkpoint", "x", "--max_new_tokens", "0"], "0 is too small"),
        (["--checkpoint", "x", "--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage_exits_with_2(command, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        command(*flags)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_questions_are_looked_for_before_the_model_is_loaded(command, copy, tmp_path):
    (copy / "model_state_dict.pt").unlink()
    with pytest.raises(SurgeryError, match="nowhere does not exist"):
        command("--checkpoint", copy, "--full_eval", "--mmlu_data", tmp_path / "nowhere")


def test_logits_that_are_not_finite_are_a_failure(command, copy):
    change_weights(copy, lambda state_dict: state_dict["backbone.final_layernorm.weight"].fill_(float("nan")))
    with pytest.raises(SurgeryError, match="logits are not finite"):
        command("--checkpoint", copy)


def test_an_empty_answer_is_a_failure_after_all_else_is_printed(command, copy, capsys):
    def end_at_once(state_dict):
        # The first feature is large and positive whatever is read, and only the end token's logit depends on it.
        state_dict["backbone.embedding.weight"][:, 0] = 1000
        state_dict["lm_head.weight"].zero_()
        state_dict["lm_head.weight"][END, 0] = 1

    change_weights(copy, end_at_once)
    with pytest.raises(SurgeryError, match="wrote nothing after 'Hello'"):
        command("--checkpoint", copy, "--prompt", "Hello", "world")
    assert "Prompt       world" in capsys.readouterr().out


def test_a_prompt_without_a_token_is_refused(command, checkpoint_dir):
    with pytest.raises(SurgeryError, match="has no tokens"):
        command("--checkpoint", checkpoint_dir, "--prompt", "")
