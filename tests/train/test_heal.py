"""heal_checkpoint.py: what it makes, and of what."""

import importlib.util
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_preparation import build_checkpoint, heal_checkpoint, load_checkpoint, verify_checkpoint
from model_preparation.checkpoint.checkpoint_info import formats_of
from model_preparation.checkpoint.model_digests import recorded_weights
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import generate_text
from model_preparation.io.digests import describe_files
from model_preparation.io.self_checksum import with_checksum
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.heal.load_weights import load_weights
from model_preparation.train.heal.resume_state import list_states, load_plain
from model_preparation.train.heal.sequences import hold_out, load_sequences
from model_preparation.train.heal.settings import TRACKERS, HealSettings
from model_preparation.train.heal.trained_layers import trained_layers
from model_preparation.train.heal.training_arguments import TRACKER_VERSIONS, check_tracker
from tests.conftest import PACKAGE, assert_refused, run_command, run_python, seeded, tiny_config
from tests.train.cutting import write_text


def info_of(folder: Path) -> dict:
    return json.loads((folder / "checkpoint_info.json").read_text())


def origins(folder: Path) -> dict[str, str]:
    tensors = json.loads((folder / "tensor_digests.json").read_text())["tensors"]
    return {name: entry["from"] for name, entry in tensors.items()}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def states_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_resume")


@pytest.fixture(scope="module")
def held_out(text_file, checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir / "tokenizer")
    return hold_out(load_sequences(str(text_file), tokenizer, HealSettings(block_size=16), print), 0.05)[1]


def loss_on(model, sequences) -> float:
    """Mean cross-entropy per predicted token, worked out by hand."""
    ids = torch.from_numpy(sequences.tokens).long()
    with torch.no_grad():
        logits = model(ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_result_is_a_checkpoint_that_verifies_and_loads_in_every_way(healed):
    assert verify_checkpoint(healed) == []
    model, tokenizer = load_checkpoint(healed)
    module = torch.load(healed / "model.pt")
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, module(ids).logits)
    assert not module.training
    assert "Healed from" in (healed / "README.txt").read_text()


def test_scores_before_and_after_are_those_of_the_two_checkpoints(healed, checkpoint_dir, held_out):
    scores = info_of(healed)["healing"]["scores"]
    for folder, when in ((checkpoint_dir, "before"), (healed, "after")):
        wanted = loss_on(load_checkpoint(folder)[0], held_out)
        assert scores[when]["eval_loss"] == pytest.approx(wanted, abs=1e-5)
        assert scores[when]["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert scores["after"]["eval_loss"] < scores["before"]["eval_loss"]


def with_score(checkpoint: Path, target: Path, weights: str) -> Path:
    """A copy of the checkpoint whose score was measured on weights of that digest."""
    shutil.copytree(checkpoint, target)
    measured = {"score": 0.5, "stderr": None, "questions": 9, "lm_eval_version": "0.4.9", "settings": {}}
    entered = {"mmlu_score": 0.5, "mmlu_result": measured | {"model": {"weights": weights}}}
    (target / "checkpoint_info.json").write_bytes(with_checksum(info_of(checkpoint) | entered))
    return target


def test_other_text_may_be_held_out_and_the_same_is_warned_of(heal, checkpoint_dir, text_file, tmp_path):
    warning = "The held-out text is the training text"
    other = write_text(tmp_path / "other.txt", words=200, seed=1)
    scored = with_score(checkpoint_dir, tmp_path / "scored", weights=recorded_weights(checkpoint_dir))
    given = ("--checkpoint", scored, "--eval_data", other)
    result = heal(tmp_path / "other", "--max_steps", 1, "--eval_interval", 1, *given)
    assert result.returncode == 0, result.stderr
    assert warning not in result.stdout
    assert info_of(tmp_path / "other")["healing"]["scores"]["before"]["mmlu_score"] == 0.5
    model, tokenizer = load_checkpoint(checkpoint_dir)
    wanted = loss_on(model, load_sequences(str(other), tokenizer, HealSettings(block_size=16), print))
    assert info_of(tmp_path / "other")["healing"]["scores"]["before"]["eval_loss"] == pytest.approx(wanted, abs=1e-5)
    write_text(other, words=200, seed=2)
    changed = heal(tmp_path / "other", "--max_steps", 2, "--eval_interval", 1, *given, "--overwrite")
    assert_refused(changed, f"The held-out text {other} has other sequences", "Give the same text")
    assert str(text_file) not in changed.stderr
    same = shutil.copy(text_file, tmp_path / "copy.txt")
    scored = with_score(checkpoint_dir, tmp_path / "of_others", weights="0" * 64)
    given = ("--checkpoint", scored, "--eval_data", same)
    result = heal(tmp_path / "same", "--max_steps", 1, "--eval_interval", 1, *given)
    assert result.returncode == 0, result.stderr
    assert warning in result.stdout
    assert info_of(tmp_path / "same")["healing"]["scores"]["before"]["mmlu_score"] is None


def test_the_info_says_from_what_on_what_and_how(healed, checkpoint_dir, text_file):
    info, parent = info_of(healed), info_of(checkpoint_dir)
    assert info["parent"]["id"] == checkpoint_dir.name
    assert info["parent"]["tensor_digests_sha256"] == parent["files"]["tensor_digests.json"]["sha256"]
    assert info["replaced_layers"] == parent["replaced_layers"]
    healing = info["healing"]
    assert (healing["method"], healing["steps"], healing["sequences_seen"]) == ("full", 6, 24)
    assert healing["data"]["name"] == text_file.name
    assert healing["settings"]["learning_rate"] == 1e-2
    assert str(healed.parent) not in json.dumps(healing)


def test_loss_and_learning_rate_are_printed_and_logged(healed):
    stdout = (healed.parent / "stdout").read_text()
    for entry in log_of(healed):
        if "loss" in entry:
            assert f"loss {entry['loss']:.4f}   lr {entry['learning_rate']:.2e}" in stdout
    assert [entry["step"] for entry in log_of(healed) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert stdout.splitlines()[-1] == f"Healed checkpoint: {healed}"


def test_the_first_steps_loss_is_that_of_the_first_sequences_in_the_shuffled_order(
    heal, checkpoint_dir, text_file, tmp_path
):
    heal(tmp_path / "out", "--max_steps", 1, "--dropout", 0, "--seed", 7)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir / "tokenizer")
    train, _ = hold_out(load_sequences(str(text_file), tokenizer, HealSettings(block_size=16), print), 0.05)
    train.tokens = train.tokens[np.random.default_rng((7, 0)).permutation(len(train))[:4]]
    logged = next(entry["loss"] for entry in log_of(tmp_path / "out") if "loss" in entry)
    assert logged == pytest.approx(loss_on(load_checkpoint(checkpoint_dir)[0], train), abs=1e-5)


def test_grafted_layers_and_neighbours_are_what_is_trained_where_asked(checkpoint_dir):
    config = load_checkpoint(checkpoint_dir)[0].config
    assert trained_layers(config, "grafted") == [1, 3]
    assert trained_layers(config, "neighbours") == [0, 1, 2, 3]
    assert trained_layers(config, "full") == trained_layers(config, "lora") == [0, 1, 2, 3]
    config.llama_layers = []
    with pytest.raises(SurgeryError, match="No layers are grafted"):
        trained_layers(config, "grafted")


def test_what_is_not_trained_stays_the_parents_bit_by_bit(heal, base_dir, layers_dir, tmp_path):
    build_checkpoint(str(base_dir), [3], layers_dir, tmp_path / "one")
    before = describe_files(tmp_path / "one")
    result = heal(tmp_path / "out", "--checkpoint", tmp_path / "one", "--method", "neighbours", "--max_steps", 2)
    assert result.returncode == 0, result.stderr
    assert describe_files(tmp_path / "one") == before
    healed = {name for name, origin in origins(tmp_path / "out").items() if origin == "healed"}
    trained = ("backbone.layers.2.", "backbone.layers.3.")
    assert healed == {name for name in origins(tmp_path / "out") if name.startswith(trained)}
    # The others are still compared with the base's.
    assert verify_checkpoint(tmp_path / "out", str(base_dir), layers_dir) == []


def test_format_and_type_are_the_parents_or_those_asked_for(heal, healed, base_dir, layers_dir, tmp_path):
    """The training is in float32 and its weights are the same, whatever they are written as."""
    build_checkpoint(str(base_dir), [1, 3], layers_dir, tmp_path / "parent", format="hf")
    more = ("--format", "both", "--dtype", "float16", "--clean_up")
    for name, given, opens, dtype in (("hf", (), {"hf"}, torch.float32), ("both", more, {"pt", "hf"}, torch.float16)):
        folder = tmp_path / name
        result = heal(folder, "--checkpoint", tmp_path / "parent", *given)
        assert result.returncode == 0, result.stderr
        assert states_of(folder).exists() == ("--clean_up" not in given)
        assert formats_of(info_of(folder)) == opens
        assert (folder / "model.pt").is_file() == ("pt" in opens)
        assert verify_checkpoint(folder) == []
        model, tokenizer = load_checkpoint(healed, dtype=dtype)
        ids = tokenizer("hello", return_tensors="pt").input_ids
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
        assert AutoTokenizer.from_pretrained(folder)("hello").input_ids == ids[0].tolist()
    digests = [json.loads((folder / "tensor_digests.json").read_text()) for folder in (tmp_path / "hf", healed)]
    assert digests[0] == digests[1]
    half, full = (torch.load(folder / "model_state_dict.pt") for folder in (tmp_path / "both", healed))
    assert all(
        torch.equal(half[name], tensor.half()) and half[name].device.type == "cpu" for name, tensor in full.items()
    )


def test_a_changed_tensor_of_a_healed_checkpoint_is_found(healed, tmp_path):
    shutil.copytree(healed, tmp_path / "copy")
    path = tmp_path / "copy" / "model_state_dict.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify_checkpoint(tmp_path / "copy")


def test_no_recipe_gives_healed_weights(healed, layers_dir, tmp_path):
    result = run_command(
        "create_replaced_model_checkpoint",
        *("--from_info", healed / "checkpoint_info.json", "--output_dir", tmp_path / "again"),
        *("--llama_layers_dir", layers_dir),
    )
    assert_refused(result, "describes a healed checkpoint", "Copy the checkpoint itself")


def test_bfloat16_checkpointing_and_a_teacher_together(heal, donor_dir, checkpoint_dir, tmp_path):
    more = ("--max_steps", 3, "--precision", "bfloat16", "--gradient_checkpointing", "--teacher", donor_dir)
    more += ("--teacher_weight", 0.5, "--hidden_weight", 0.1, "--temperature", 2, "--reverse_weight", 0.5)
    result = heal(tmp_path / "out", *more)
    assert result.returncode == 0, result.stderr
    healing = info_of(tmp_path / "out")["healing"]
    assert healing["objective"] == "distillation"
    assert healing["scores"]["after"]["eval_loss"] < healing["scores"]["before"]["eval_loss"]
    weights = load_plain(list_states(states_of(tmp_path / "out"))[0][-1].folder / "optimizer.pt")
    assert weights["state"][0]["exp_avg"].dtype == torch.float32


# A learning rate that wrecks the model after its first steps.
WRECKING = ("--learning_rate", 1.5, "--schedule", "constant", "--warmup", 1, "--eval_interval", 1)
WRECKING += ("--max_grad_norm", 0, "--save_total_limit", 9)


def test_the_best_weights_are_written_and_always_save_no_keeps_only_improvements(heal, held_out, tmp_path):
    result = heal(tmp_path / "out", *WRECKING, "--always_save", "no")
    assert result.returncode == 0, result.stderr
    looks = {
        entry["step"]: entry["eval_loss"]
        for entry in log_of(tmp_path / "out")
        if "eval_loss" in entry and entry["step"]
    }
    best = min(looks, key=looks.get)
    assert best != max(looks)
    improved = [step for step in looks if all(looks[step] < looks[before] for before in looks if before < step)]
    states, _ = list_states(states_of(tmp_path / "out"))
    assert [state.steps for state in states] == improved
    assert states[-1].info["best_val_loss"] == looks[best]
    assert info_of(tmp_path / "out")["healing"]["best_step"] == best
    assert loss_on(load_checkpoint(tmp_path / "out")[0], held_out) == pytest.approx(looks[best], abs=1e-4)


def test_the_best_state_is_found_beside_the_one_gone_on_from_and_missed_by_name(heal, tmp_path):
    more = (*WRECKING, "--save_steps", 1)
    assert heal(tmp_path / "out", *more).returncode == 0
    best = info_of(tmp_path / "out")["healing"]["best_step"]
    last = list_states(states_of(tmp_path / "out"))[0][-1]
    assert best < last.steps
    result = heal(tmp_path / "on", *more, "--resume", last.folder)
    assert result.returncode == 0, result.stderr
    assert info_of(tmp_path / "on")["healing"]["best_step"] == best
    weights = [torch.load(tmp_path / name / "model_state_dict.pt")["lm_head.weight"] for name in ("out", "on")]
    assert torch.equal(*weights)
    shutil.copytree(last.folder, tmp_path / "alone" / last.folder.name)
    result = heal(tmp_path / "lost", *more, "--resume", tmp_path / "alone" / last.folder.name)
    assert "The state of the lowest held-out loss is not in" in result.stdout
    assert info_of(tmp_path / "lost")["healing"]["best_step"] is None


def test_weights_from_elsewhere_are_reported_key_by_key(heal, checkpoint_dir, tmp_path):
    weights = torch.load(checkpoint_dir / "model_state_dict.pt")
    weights.pop("backbone.final_layernorm.weight")
    weights["backbone.layers.0.mixer.D"] = torch.zeros(5)
    weights["odd.weight"] = torch.zeros(2)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}
    torch.save(wrapped, tmp_path / "weights.bin")
    more = ("--init_from", tmp_path / "weights.bin", "--exclude", "lm_head", "--max_steps", 1)
    result = heal(tmp_path / "out", *more)
    assert result.returncode == 0, result.stderr
    for line in (
        f"loaded {len(weights) - 3} tensors",
        "missing 1: backbone.final_layernorm.weight",
        "unexpected 1: odd.weight",
        "mismatched 1: backbone.layers.0.mixer.D [5] instead of [2]",
        "excluded 1: lm_head.weight",
    ):
        assert line in result.stdout.splitlines()


def test_scratch_begins_with_random_weights_of_the_seed(heal, tmp_path):
    for seed in (3, 4):
        result = heal(tmp_path / f"{seed}", "--init_from", "scratch", "--max_steps", 1, "--seed", seed)
        assert result.returncode == 0, result.stderr
    losses = [info_of(tmp_path / seed)["healing"]["scores"]["before"]["eval_loss"] for seed in ("3", "4")]
    assert losses[0] != losses[1]
    assert losses == pytest.approx([math.log(260)] * 2, abs=0.2)  # the untrained model only guesses


def test_of_tied_weights_a_file_needs_only_one(tmp_path):
    source, model = (seeded(LlambaForCausalLM(tiny_config(tie_embeddings=True)), seed) for seed in (1, 2))
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    tied = ("lm_head.weight", "backbone.embedding.weight")
    for left_out in tied:
        save_file({name: tensor for name, tensor in state.items() if name != left_out}, tmp_path / "w.safetensors")
        torch.nn.init.zeros_(model.lm_head.weight)
        report = load_weights(model, tmp_path / "w.safetensors")
        assert report.complete, report.lines()
        for name in tied:
            assert torch.equal(model.state_dict()[name], state[name])


def test_weights_with_code_in_them_are_refused_by_name(heal, tmp_path):
    torch.save({"weight": torch.zeros(1), "run": print}, tmp_path / "weights.pth")
    result = heal(tmp_path / "out", "--init_from", tmp_path / "weights.pth")
    assert_refused(result, str(tmp_path / "weights.pth"), "builtins.print")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("intervals", [("--eval_interval", 0), ("--eval_interval", 0, "--logging_steps", 9), ()])
def test_a_loss_that_is_no_number_ends_the_run_and_is_in_no_state(heal, intervals, tmp_path):
    result = heal(tmp_path / "out", "--learning_rate", 1e25, "--max_grad_norm", 0, *intervals)
    assert_refused(result, "The loss is ", " at step", "smaller --learning_rate")
    assert not (tmp_path / "out").exists()
    states = list_states(states_of(tmp_path / "out"))[0]
    assert all(math.isfinite(loss) for state in states for loss in state.info["unlogged"]["losses"])


def test_a_single_step_trains_and_a_worse_end_is_told(flags, checkpoint_dir, tmp_path):
    """This run is not `brief`: its texts and its plot are whole."""
    out = tmp_path / "out"
    out.mkdir()
    more = ("--max_steps", 1, "--eval_interval", 1, "--learning_rate", 1.0, "--output_dir", ".")
    result = run_command("heal_checkpoint", *flags, *more, cwd=out)
    assert result.returncode == 0, result.stderr
    assert list_states(tmp_path / "out_resume")[0]
    healing = info_of(out)["healing"]
    assert healing["scores"]["after"]["eval_loss"] > healing["scores"]["before"]["eval_loss"]
    assert "It is higher than before" in result.stdout
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    (text,) = healing["texts"]
    for folder, when in ((checkpoint_dir, "before"), (out, "after")):
        model, tokenizer = load_checkpoint(folder)
        assert generate_text(model, tokenizer, text["prompt"], max_new_tokens=40).text == text[when]


def test_after_a_failed_training_ctrl_c_works_again(checkpoint_dir, text_file, tmp_path):
    code = """
import signal, sys
from model_preparation import heal_checkpoint
from model_preparation.errors import SurgeryError
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
wild = {"block_size": 16, "batch_size": 2, "max_steps": 3, "learning_rate": 1e25, "max_grad_norm": 0.0}
try:
    heal_checkpoint(*sys.argv[1:], **wild, logging_steps=1, device="cpu")
except SurgeryError as error:
    print(error)
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before)
"""
    result = run_python("-c", code, str(checkpoint_dir), str(text_file), str(tmp_path / "out"), cwd=PACKAGE.parent)
    assert "The loss is " in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == "True"


def test_the_second_sigterm_ends_a_program_that_has_no_handler():
    code = """
import os, signal
from model_preparation.train.heal.callbacks import SaveWhenStopped
SaveWhenStopped().on_train_begin(None, None, None)
os.kill(os.getpid(), signal.SIGTERM)
print("saving", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    result = run_python("-c", code, cwd=PACKAGE.parent)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "saving\n"), result.stderr


def test_a_tracker_that_is_not_installed_or_too_new_is_named(heal, tmp_path, monkeypatch):
    lines = (PACKAGE.parent / "pyproject.toml").read_text().splitlines()
    for name, wanted in TRACKER_VERSIONS.items():
        assert any(line.startswith(f'{name} = ["{wanted}"]') for line in lines)
    missing = [name for name in TRACKERS[1:] if importlib.util.find_spec(name) is None]
    if missing:
        refused = heal(tmp_path / "out", "--report_to", missing[0])
        assert_refused(refused, f"{missing[0]} is not installed", f"pip install '{TRACKER_VERSIONS[missing[0]]}'")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.3")
    with pytest.raises(SurgeryError, match=r"swanlab 0\.10\.3 does not work here"):
        check_tracker(HealSettings(report_to="swanlab"))


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(checkpoint_dir, text_file, tmp_path):
    with pytest.raises(SurgeryError, match=r"HealSettings has no learningrate\. It has .*, learning_rate, "):
        heal_checkpoint(checkpoint_dir, str(text_file), tmp_path / "out", HealSettings(), learningrate=1e-3)


def test_what_cannot_work_is_said_before_anything_is_written(heal, healed, checkpoint_dir, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert_refused(heal(tmp_path / "out", "--data", short), "shorter than one sequence", "of 16 tokens")
    assert_refused(heal(tmp_path / "out", "--data", tmp_path / "none.txt"), "none.txt is not there")
    assert_refused(heal(tmp_path / "out", "--init_from", "resume"), "no complete state")
    assert_refused(heal(tmp_path / "out", "--precision", "float16"), "needs a GPU")
    assert_refused(heal(healed), "exists already", "--overwrite")
    assert_refused(heal(tmp_path / "out", "--milestones", "9=late"), "late is at step 9", "steps 1 to 6")
    for read in ("--checkpoint", "--teacher", "--init_from"):
        refused = heal(healed, "--overwrite", read, healed)
        assert_refused(
            refused, f"{healed} is only read here, but --output_dir is that folder too", "another --output_dir"
        )
    for place in (("--output_dir", checkpoint_dir / "in"), ("--resume_dir", checkpoint_dir)):
        assert_refused(heal(tmp_path / "out", *place), f"{checkpoint_dir} is only read", "Choose a")
    assert_refused(heal(tmp_path / "out", "--resume_dir", tmp_path / "out"), "cannot hold both")
    assert_refused(heal(tmp_path / "out", "--resume_dir", short), "is a file", "--resume_dir")
    assert_refused(heal(tmp_path / "out", "--temperature", 2), "temperature is given", "without teacher")
    assert_refused(heal(tmp_path / "out", "--exclude", "lm_head"), "exclude is given", "without init_from FILE")
    assert_refused(heal(tmp_path / "out", "--lora_rank", 4), "lora_rank is given", "without method lora")
    assert_refused(heal(tmp_path / "out", "--milestones", "2=a", "3=a"), "its own name", code=2)
    assert_refused(heal(tmp_path / "out", "--seed", 2**32), "too large", code=2)
    assert_refused(heal(tmp_path / "out", "--dropout", 1), "too large", code=2)
    assert_refused(heal(tmp_path / "out", "--data", ""), "name of the text is empty")
    held_out = ("--eval_data", short)
    assert_refused(heal(tmp_path / "out", *held_out, "--eval_interval", 0), "measures no held-out loss", code=2)
    assert_refused(
        heal(tmp_path / "out", *held_out, "--eval_fraction", 0.3),
        "--eval_fraction has no effect with --eval_data",
        code=2,
    )
    merge = ("--checkpoint", checkpoint_dir, "--output_dir", tmp_path / "out", "--merge_adapter")
    assert_refused(run_command("heal_checkpoint", *merge, healed), "has no adapter_config.json", "folder of an adapter")
    assert_refused(
        run_command("heal_checkpoint", "--data", short, "--checkpoint", "tiny_llamba", *merge[2:4]), "name of"
    )
    of_training = [
        ("--max_steps", 3),
        ("--resume", "never"),
        ("--prompt", "x"),
        ("--milestones", "2=a"),
        ("--clean_up",),
    ]
    of_training += [("--gpu", 0), ("--device", "cpu"), ("--source", "llama=x"), ("--teacher", "donor")]
    for flag, *value in of_training:
        refused = run_command("heal_checkpoint", *merge, healed, flag, *value)
        assert_refused(refused, f"{flag} belongs to training, and --merge_adapter trains nothing", code=2)
    assert list(tmp_path.iterdir()) == [short]
