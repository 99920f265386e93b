"""The command test_checkpoint.py: what it prints of a checkpoint, and what makes it fail."""

import json
import random
import re
import shutil
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import evaluate_model
from model_preparation.evaluation.generation_report import printable
from model_preparation.evaluation.mmlu_questions import SUBJECTS
from model_preparation.hub.sources import EMBEDDED
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.test_checkpoint import main
from tests.conftest import assert_refused, on_devices, run_command
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
    for line in (
        f"{model.num_parameters():,}",
        "Grafted +2 of 4 layers: 1 3",
        "On disk +.*B",
        r"Loaded +in [\d.]+ s, float32",
    ):
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
    out = command("--checkpoint", checkpoint_dir, "--prompt", "Hello", "--dtype", "bfloat16")
    assert re.search(r"^Loaded       in [\d.]+ s, bfloat16$", out, re.MULTILINE)


def test_full_eval_prints_the_score_of_lm_evals_mmlu_and_enters_it(command, checkpoint_dir, mmlu_data, tmp_path):
    checkpoint = shutil.copytree(checkpoint_dir, tmp_path / "checkpoint")
    model, tokenizer = load_checkpoint(checkpoint)
    expected = evaluate_model(model, tokenizer, mmlu_data=mmlu_data, limit=2, num_fewshot=1)
    assert 0 < expected["score"] < 1

    flags = ("--full_eval", "--limit", 2, "--num_fewshot", 1, "--mmlu_data", mmlu_data, "--batch_size", 2)
    out = command("--checkpoint", checkpoint, "--prompt", "Hello", "--max_new_tokens", 2, *flags)

    def score(row):
        return f"{row['score']:.4f} ± {row['stderr']:.4f} ({row['questions']} questions)"

    assert f"\nMMLU score   {score(expected)}; 1-shot, likeliest choice, " in out
    assert expected["questions"] == 2 * 57
    for name, group in expected["groups"].items():
        assert f"{name:<16} {score(group)}\n" in out
    assert "--limit 2 is per subject" in out
    assert "not comparable with the full score" in out
    info = json.loads((checkpoint / "checkpoint_info.json").read_text())
    assert info["mmlu_score"] == expected["score"]
    (folder,) = (checkpoint / "evaluations").glob("mmlu-*")
    assert out.splitlines()[-1] == f"Results are in {folder}"


def test_weights_that_are_missing_and_questions_for_no_task_are_told(checkpoint_dir, mmlu_data, tmp_path):
    checkpoint = shutil.copytree(checkpoint_dir, tmp_path / "checkpoint")
    flags = ("--checkpoint", checkpoint, "--full_eval", "--skip_generation", "--tasks", "embedded_recall")
    refused = run_command("test_checkpoint", *flags, "--mmlu_data", mmlu_data)
    assert_refused(refused, "--mmlu_data belongs to --tasks mmlu or parts of it", code=2)
    (checkpoint / "model_state_dict.pt").unlink()
    assert_refused(run_command("test_checkpoint", *flags), "model_state_dict.pt is missing")


def test_a_folder_that_is_no_checkpoint_is_refused_with_one_line(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert_refused(run_command("test_checkpoint", "--checkpoint", tmp_path), "has no checkpoint_info.json")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "x", "--limit", "3"], "--limit belongs to --full_eval"),
        (["--checkpoint", "x", "--mmlu_data", "y"], "--mmlu_data belongs to --full_eval"),
        (
            ["--checkpoint", "x", "--full_eval", "--skip_generation", "--top_k", "3"],
            "--top_k has no effect with --skip",
        ),
        (["--checkpoint", "x", "--full_eval", "--limit", "0"], "0 is too small"),
        (["--checkpoint", "x", "--full_eval", "--limit", "0.5"], "'0.5' is not an integer"),
        (["--checkpoint", "x", "--full_eval", "--num_fewshot", "-1"], "-1 is too small"),
        (["--checkpoint", "x", "--max_new_tokens", "0"], "0 is too small"),
        (["--checkpoint", "x", "--dtype", "int8"], "int8"),
        (["--checkpoint", "x", "--temperature", "0"], "0 is too small; it must be greater than 0"),
        (["--checkpoint", "x", "--temperature", "nan"], "nan is not finite"),
        (["--checkpoint", "x", "--top_p", "1.5"], "1.5 is too large; it must be at most 1"),
        (["--checkpoint", "x", "--top_k", "0"], "0 is too small; it must be at least 1"),
        (["--checkpoint", "x", "--seed", "-1"], "-1 is too small; it must be at least 0"),
        (["--checkpoint", "x", "--num_return_sequences", "2"], "greedy texts are all the same"),
        (["--checkpoint", "x", "--compare_with", "base", "--compare_with", "base"], "has base more than once"),
        (["--checkpoint", "x", "--source", "llama=y"], "--source llama=... does nothing"),
    ],
)
def test_wrong_usage_exits_with_2(command, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        command(*flags)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_questions_are_looked_for_before_the_model_is_loaded(command, copy, tmp_path):
    (copy / "model_state_dict.pt").write_bytes(b"none")
    with pytest.raises(SurgeryError, match="nowhere does not exist"):
        command("--checkpoint", copy, "--full_eval", "--mmlu_data", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(SurgeryError, match=r"Results cannot be kept in .* is a file\)"):
        command("--checkpoint", copy, "--full_eval", "--results_dir", tmp_path / "file" / "results")


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


# --- Any model --------------------------------------------------------------------------------------------------------


def test_any_model_writes_the_base_and_the_donor_too(command, donor_dir, base_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(donor_dir)
    monkeypatch.chdir(donor_dir)
    for given, more, model in (
        (".", (), LlamaForCausalLM.from_pretrained(donor_dir)),
        ("llama", ("--source", f"llama={donor_dir}"), LlamaForCausalLM.from_pretrained(donor_dir)),
        (base_dir, ("--tokenizer", donor_dir), LlambaForCausalLM.from_pretrained(base_dir)),
        # This base is published without a tokenizer. Its name says whose tokenizer it needs.
        (
            "unaligned_llamba",
            ("--source", f"unaligned_llamba={base_dir}", "--source", f"llama_tokenizer={donor_dir}"),
            LlambaForCausalLM.from_pretrained(base_dir),
        ),
    ):
        out = command("--checkpoint", given, *more, "--prompt", "Hello", "--max_new_tokens", 7, "--device", "cpu")
        ids = continuation(model, tokenizer, "Hello", 7)
        assert side_by_side("Text", tokenizer, ids) in out
        assert f"Parameters   {model.num_parameters():,}\n" in out
        assert "Grafted" not in out
        assert out.count("Device       cpu\n") == 1


def test_a_model_spread_over_what_there_is_writes_the_same(command, checkpoint_dir, donor_dir):
    for given in (donor_dir, checkpoint_dir):
        flags = ("--checkpoint", given, "--prompt", "Hello", "--max_new_tokens", 7)
        whole, spread = command(*flags), command(*flags, "--parallelize")
        text = re.compile(r"^Text .*$", re.MULTILINE)
        assert text.search(whole).group() == text.search(spread).group()
        assert ", spread over cpu\n" in spread
        assert "Device " not in spread


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{donor}", "has a tokenizer of its own. Leave out --tokenizer llama_tokenizer"),
        ("{checkpoint}", "has a tokenizer of its own. Leave out --tokenizer llama_tokenizer"),
        ("here/not_built", "Checkpoint here/not_built is not there. Build it"),
        ("tiny_lama", "'tiny_lama' is neither one of the names llama, "),
    ],
)
def test_a_tokenizer_without_use_and_models_that_are_not_there_are_told(
    command, checkpoint_dir, donor_dir, tmp_path, monkeypatch, given, words
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    more = ("--tokenizer", "llama_tokenizer") if "{" in given else ()
    with pytest.raises(SurgeryError, match=words):
        command("--checkpoint", given.format(donor=donor_dir, checkpoint=checkpoint_dir), *more)


def test_results_are_named_by_the_folder_however_its_path_is_written(command, tmp_path, monkeypatch):
    model = shutil.copytree(EMBEDDED / "tiny_llama", tmp_path / "model")
    (model / "inside").mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model / "inside")
    flags = (
        "--full_eval",
        "--skip_generation",
        "--tasks",
        "embedded_recall",
        "--limit",
        2,
        "--results_dir",
        tmp_path / "r",
    )
    for given in ("..", f"{model}/", tmp_path / "link"):
        out = command("--checkpoint", given, *flags)
        assert out.splitlines()[-1].startswith(f"Results are in {tmp_path / 'r' / 'model'}/embedded_recall-"), out
    out = command("--checkpoint", "llama", "--source", f"llama={model}", *flags)
    assert out.splitlines()[-1].startswith(f"Results are in {tmp_path / 'r' / 'llama'}/embedded_recall-"), out
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["llama", "model"]


# --- Prompts, sampling, results ---------------------------------------------------------------------------------------


def test_prompts_of_a_file_follow_those_of_the_command_line(command, checkpoint_dir, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Second"}\n{"prompt": "Third [x]"}\n')
    flags = ("--prompt", "First", "--prompts_file", tmp_path / "prompts.jsonl", "--max_new_tokens", 2)
    out = command("--checkpoint", checkpoint_dir, *flags)
    assert re.findall(r"^Prompt  +(.*)$", out, re.MULTILINE) == ["First", "Second", "Third [x]"]
    assert re.search(r"^Peak memory  \d+\.\d\d GB resident, the whole process since its start$", out, re.MULTILINE)


def test_a_bad_file_of_prompts_is_told_before_the_model_is_loaded(copy, tmp_path):
    (copy / "model_state_dict.pt").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 1}')
    result = run_command("test_checkpoint", "--checkpoint", copy, "--prompts_file", tmp_path / "prompts.jsonl")
    assert_refused(result, "Line 1 of", "is not a prompt")


def test_chat_needs_a_template_and_uses_it(checkpoint_dir, copy):
    flags = ("--prompt", "Hello", "--chat", "--max_new_tokens", 2)
    assert_refused(run_command("test_checkpoint", "--checkpoint", checkpoint_dir, *flags), "has no chat template")
    (copy / "tokenizer" / "chat_template.jinja").write_text("<s>{{ messages[0].role }}: {{ messages[0].content }}")
    result = run_command("test_checkpoint", "--checkpoint", copy, *flags)
    assert result.returncode == 0, result.stderr
    assert "Prompt read  12 tokens" in result.stdout  # of one byte each, after <s>


def test_results_are_written_and_repeat_with_the_seed(command, checkpoint_dir, tmp_path):
    def rows(name, *flags):
        out = command("--checkpoint", checkpoint_dir, *flags, "--max_new_tokens", 9, "--output", tmp_path / name)
        assert out.endswith(f"Texts are in {tmp_path / name}\n")
        return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    flags = ("--prompt", "Hello", "world", "--top_p", 0.9, "--num_return_sequences", 2)
    drawn = rows("drawn.jsonl", *flags, "--seed", 3)
    assert [(row["prompt"], row["number"]) for row in drawn] == [("Hello", 0), ("Hello", 1), ("world", 0), ("world", 1)]
    again, other = rows("again.jsonl", *flags, "--seed", 3), rows("other.jsonl", *flags, "--seed", 30)
    assert [row["new_ids"] for row in again] == [row["new_ids"] for row in drawn]
    assert [row["new_ids"] for row in other] != [row["new_ids"] for row in drawn]

    [greedy] = rows("greedy.jsonl", "--prompt", "Hello")
    model, tokenizer = load_checkpoint(checkpoint_dir)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()
    assert greedy["new_ids"] == new
    assert greedy["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert greedy["decode_tokens_per_second"] == (len(new) - 1) / greedy["decode_seconds"]
    expected = {"model": "checkpoint", "source": str(checkpoint_dir), "dtype": "float32", "device": "cpu"}
    expected |= {"chat": False, "max_new_tokens": 9, "sampling": None, "prompt_tokens": 5, "new_tokens": len(new)}
    assert {name: greedy[name] for name in expected} == expected
    assert drawn[0]["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "seed": 3}


def test_results_never_replace_a_file_that_is_there(copy, tmp_path):
    (copy / "model_state_dict.pt").unlink()
    (tmp_path / "texts.jsonl").write_text("kept")
    run = ("test_checkpoint", "--checkpoint", copy, "--output")
    assert_refused(run_command(*run, tmp_path / "texts.jsonl"), "texts.jsonl exists already")
    assert (tmp_path / "texts.jsonl").read_text() == "kept"
    assert_refused(run_command(*run, tmp_path / "none" / "texts.jsonl"), "is not a folder you can write to")


def test_what_was_written_before_a_failure_is_in_the_results(command, copy, tmp_path):
    def spoil(state_dict):
        state_dict["backbone.embedding.weight"][ord("X") - ord("!")] = float("nan")  # the byte's place in the alphabet

    change_weights(copy, spoil)
    with pytest.raises(SurgeryError, match="not finite in the prompt 'X'"):
        command("--checkpoint", copy, "--prompt", "Hello", "X", "--output", tmp_path / "texts.jsonl")
    first, failed = map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines())
    assert first["prompt"] == "Hello"
    assert first["text"]
    assert failed["prompt"] == "X"
    assert "not finite in the prompt 'X'" in failed["error"]


@on_devices
def test_the_seed_repeats_and_the_memory_is_told(command, checkpoint_dir, tmp_path, device):
    torch.manual_seed(7)
    expected = torch.rand(3, device=device)
    torch.manual_seed(7)
    flags = ("--device", device, "--prompt", "Hello", "--temperature", 2, "--compare_with", "donor")
    outs = [command("--checkpoint", checkpoint_dir, *flags, "--output", tmp_path / f"{i}.jsonl") for i in range(2)]
    assert torch.equal(torch.rand(3, device=device), expected)
    where = {"cpu": "resident, the whole process since its start", "cuda": "on cuda:0, allocated by torch"}
    assert re.search(rf"^Peak memory  \d+\.\d\d GB {where[device]}", outs[0], re.MULTILINE)
    ids = [
        [json.loads(line)["new_ids"] for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()] for i in range(2)
    ]
    assert ids[0] == ids[1]


# --- Other models beside it -------------------------------------------------------------------------------------------


def continuation(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=END, pad_token_id=END
    )[0, ids.shape[1] :].tolist()


def side_by_side(label, tokenizer, ids):
    text = printable(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return f"\n{label:<12} " + text.replace("\n", "\n" + " " * 13) + "\n"


def test_donor_and_base_write_beside_the_checkpoint(command, checkpoint_dir, donor_dir, base_dir, tmp_path):
    out = command(
        *("--checkpoint", checkpoint_dir, "--prompt", "Hello", "--max_new_tokens", 8),
        *("--compare_with", "donor", "base", "--output", tmp_path / "texts.jsonl"),
    )
    checkpoint, tokenizer = load_checkpoint(checkpoint_dir)
    models = {
        "checkpoint": checkpoint,
        "donor": LlamaForCausalLM.from_pretrained(donor_dir),
        "base": LlambaForCausalLM.from_pretrained(base_dir),
    }
    ids = {name: continuation(model, tokenizer, "Hello", 8) for name, model in models.items()}
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert {row["model"]: row["new_ids"] for row in rows} == ids
    assert [row["source"] for row in rows] == [str(checkpoint_dir), str(donor_dir), str(base_dir)]
    table = out[out.index("Prompt       Hello") :]
    for name in ids:
        assert side_by_side(name, tokenizer, ids[name]) in table
    for name in ("donor", "base"):
        pairs = zip(ids["checkpoint"], ids[name], strict=False)
        first = next(place for place, (ours, theirs) in enumerate(pairs, start=1) if ours != theirs)
        assert side_by_side(name, tokenizer, ids[name]) + f"{'':<13}(first differing token: {first})\n" in table


def test_the_same_weights_write_the_same_tokens_and_one_model_is_in_memory_at_a_time(
    command, checkpoint_dir, copy, donor_dir, monkeypatch
):
    alive, counts = weakref.WeakSet(), []
    for kind in (LlamaForCausalLM, LlambaForCausalLM):

        def counting(self, *args, _forward=kind.forward, **kwargs):
            alive.add(self)
            counts.append(len(alive))
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counting)
    flags = ("--prompt", "Hello", "--max_new_tokens", 3, "--compare_with", copy, donor_dir)
    out = command("--checkpoint", checkpoint_dir, *flags)
    assert "(the same 3 tokens)" in out
    assert len(counts) > 2 * 3
    assert set(counts) == {1}


def test_another_models_failure_is_told_and_is_no_failure_of_the_checkpoint(checkpoint_dir, donor_dir, tmp_path):
    broken, short = (shutil.copytree(donor_dir, tmp_path / name) for name in ("broken", "short"))
    weights = load_file(donor_dir / "model.safetensors")
    bad = weights | {"model.norm.weight": torch.full((32,), float("nan"))}
    save_file(bad, broken / "model.safetensors", metadata={"format": "pt"})
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, short / "model.safetensors", metadata={"format": "pt"})
    result = run_command(
        *("test_checkpoint", "--checkpoint", checkpoint_dir, "--prompt", "Hello", "--max_new_tokens", 3),
        *("--compare_with", broken, short, "--output", tmp_path / "texts.jsonl"),
    )
    assert result.returncode == 0, result.stderr
    assert "failed: The model's logits are not finite in the prompt 'Hello'" in result.stdout
    assert "lacks 1 weights, model.layers.2.mlp.up_proj.weight among them" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert ["error" in row for row in rows] == [False, True, True]


def test_texts_of_another_tokenizer_are_compared_as_texts(command, checkpoint_dir, donor_dir, tmp_path):
    other = shutil.copytree(donor_dir, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ("--prompt", "Hello", "--max_new_tokens", 8, "--compare_with", other)
    out = command("--checkpoint", checkpoint_dir, *flags)
    ours, tokenizer = load_checkpoint(checkpoint_dir)
    texts = [
        model_tokenizer.decode(continuation(model, model_tokenizer, "Hello", 8), skip_special_tokens=True)
        for model, model_tokenizer in (
            (ours, tokenizer),
            (LlamaForCausalLM.from_pretrained(donor_dir), AutoTokenizer.from_pretrained(other)),
        )
    ]
    first = next(place for place, (one, two) in enumerate(zip(*texts, strict=False), start=1) if one != two)
    assert f"(other tokenizer; first differing character: {first})" in out


def test_the_donor_of_a_name_is_where_source_says(command, copy, donor_dir):
    info = json.loads((copy / "checkpoint_info.json").read_text())
    hub = {"name": "llama", "hub": "modelscope", "id": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "revision": "master"}
    info["replacement_source"] = hub | {"layers": info["replacement_source"]["layers"]}
    (copy / "checkpoint_info.json").write_text(json.dumps(info))
    flags = ("--prompt", "Hello", "--max_new_tokens", 2, "--compare_with", "donor", "--source", f"llama={donor_dir}")
    assert f"Compared     donor: {donor_dir}," in command("--checkpoint", copy, *flags)


@pytest.mark.parametrize(
    ("change", "other", "words"),
    [
        (lambda info: None, "nowhere/at/all", "nowhere/at/all"),
        (lambda info: info["base_model"].update(path="/gone"), "base", "/gone, but it is not here. Say where it is by"),
        (lambda info: info.pop("replacement_source"), "donor", "does not say what its donor is"),
        (lambda info: info["replacement_source"].update(legacy=True), "donor", "imported from old layer files"),
    ],
)
def test_models_to_compare_with_are_looked_for_before_the_model_is_loaded(command, copy, change, other, words):
    (copy / "model_state_dict.pt").write_bytes(b"none")
    info = json.loads((copy / "checkpoint_info.json").read_text())
    change(info)
    (copy / "checkpoint_info.json").write_text(json.dumps(info))
    with pytest.raises(SurgeryError, match=words):
        command("--checkpoint", copy, "--compare_with", other)
