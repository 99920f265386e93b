"""Evaluating a checkpoint: after a kill it goes on and ends the same. No result is mixed up, lost or made up.

Model: the tiny pair with two layers grafted. Questions: one or two made-up ones for each of the 57 subjects.
"""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from model_preparation import evaluate_checkpoint, load_checkpoint, verify_checkpoint
from model_preparation.checkpoint.checkpoint_info import read_info
from model_preparation.errors import SurgeryError
from model_preparation.evaluation import evaluate, models, results_folder
from model_preparation.evaluation.evaluate import evaluate_model
from model_preparation.evaluation.mmlu_questions import SUBJECTS
from model_preparation.evaluation.results_folder import ResultsFolder, read_checked_json
from model_preparation.evaluation.tasks import load_tasks
from model_preparation.io.folder_lock import take
from model_preparation.io.self_checksum import with_checksum
from tests.conftest import assert_refused, run_command
from tests.evaluation.test_mmlu import question, write_questions

PART = ("mmlu_other",)  # 13 of the 57 subjects: more would test nothing else
COMPARED = ("score", "stderr", "questions", "tasks", "groups", "subjects", "settings")


@pytest.fixture(scope="module", autouse=True)
def no_list_of_packages():
    """Replaces lm-eval's description of the machine, which takes a second each time because it runs pip."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
        yield


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    rng = random.Random(1)
    rows = {
        subject: {"dev": [question(rng)], "test": [question(rng) for _ in range(1 + index % 2)]}
        for index, subject in enumerate(SUBJECTS)
    }
    return write_questions(tmp_path_factory.mktemp("questions"), rows)


@pytest.fixture
def checkpoint(checkpoint_dir, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def evaluated(checkpoint_dir, mmlu, tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint that was evaluated without interruption, and the result. Copy it before changing anything in it."""
    folder = Path(shutil.copytree(checkpoint_dir, tmp_path_factory.mktemp("evaluated") / "checkpoint"))
    return folder, evaluate_checkpoint(folder, mmlu_data=mmlu)


@pytest.fixture(scope="module")
def part(checkpoint_dir, mmlu, tmp_path_factory) -> dict:
    """The result of PART for the same checkpoint, without interruption."""
    folder = tmp_path_factory.mktemp("part")
    return evaluate_checkpoint(checkpoint_dir, tasks=PART, mmlu_data=mmlu, results_dir=folder)


def killed_after(records: int, monkeypatch, checkpoint: Path, mmlu: Path) -> None:
    """Evaluate PART in a process that is killed after it has kept the answers to `records` subjects."""
    child = os.fork()
    if child == 0:
        kept, keep = [], ResultsFolder.keep_record

        def keep_or_die(results, name, record):
            if len(kept) == records:
                os.kill(os.getpid(), signal.SIGKILL)
            keep(results, name, record)
            kept.append(name)

        monkeypatch.setattr(ResultsFolder, "keep_record", keep_or_die)
        monkeypatch.setattr(results_folder, "sync_tree", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def answered_anew(monkeypatch) -> list[str]:
    """A list that names, from now on, every task the model itself is asked about."""
    asked = []
    original = evaluate.ResumableLM._ask
    monkeypatch.setattr(
        evaluate.ResumableLM,
        "_ask",
        lambda lm, kind, task, *rest: (asked.append(task), original(lm, kind, task, *rest))[1],
    )
    return asked


@pytest.mark.parametrize("records", [0, 12, 13])
def test_killed_it_goes_on_and_gives_the_score_of_an_uninterrupted_run(records, checkpoint, mmlu, part, monkeypatch):
    with monkeypatch.context() as patched:
        killed_after(records, patched, checkpoint, mmlu)
    asked = answered_anew(monkeypatch)

    result = evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)

    assert len(asked) == 13 - records
    assert {name: result[name] for name in COMPARED} == {name: part[name] for name in COMPARED}
    assert not result["kept"]
    assert [path.name for path in (checkpoint / "evaluations").iterdir() if path.suffix == ".partial"] == []


def test_what_is_finished_is_given_again_without_the_model(evaluated, mmlu, monkeypatch):
    folder, result = evaluated
    monkeypatch.setattr(models, "load_checkpoint", None)
    again = evaluate_checkpoint(folder, mmlu_data=mmlu)
    assert again == {**result, "kept": True}


def test_every_setting_has_a_folder_of_its_own(checkpoint, mmlu):
    folders = set()
    settings = ({}, {"limit": 1}, {"num_fewshot": 1}, {"batch_size": 2}, {"seed": 5}, {"dtype": torch.bfloat16})
    for setting in settings:
        result = evaluate_checkpoint(checkpoint, tasks=["mmlu_virology"], mmlu_data=mmlu, **setting)
        folders.add(Path(result["results_dir"]).name)
    assert len(folders) == 6
    assert all(name.startswith("mmlu_virology-") for name in folders)


def test_results_of_other_weights_are_put_aside_and_come_back_with_them(checkpoint, part, mmlu, tmp_path, monkeypatch):
    before = Path(part["results_dir"])
    shutil.copytree(before, checkpoint / "evaluations" / before.name)
    old = (checkpoint / "model_state_dict.pt").read_bytes()
    change(checkpoint, "model_state_dict.pt")
    asked = answered_anew(monkeypatch)

    result = evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)

    assert len(asked) == 13
    assert Path(result["results_dir"]).name == before.name
    assert result["settings"] == part["settings"]
    assert result["weights"] != part["weights"]
    assert result["subjects"] != part["subjects"]
    compared = run_command("compare_checkpoints", checkpoint, before.parent, "--output_dir", tmp_path / "comparison")
    assert compared.returncode == 0, compared.stderr
    assert f"on {part['questions']} common questions" in compared.stdout

    aside = f"{before.name}.of-weights-{part['weights'][:12]}"
    assert aside in {path.name for path in (checkpoint / "evaluations").iterdir()}

    (checkpoint / "model_state_dict.pt").write_bytes(old)
    stale = run_command("compare_checkpoints", checkpoint, before.parent, "--output_dir", tmp_path / "stale")
    assert_refused(stale, "has changed since the evaluation in", "weights: the content has changed")
    again = evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)
    assert len(asked) == 13
    assert again["kept"]
    assert again["subjects"] == part["subjects"]


def test_results_of_something_else_under_the_right_name_are_refused(checkpoint, mmlu, part):
    other = Path(evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu, limit=1)["results_dir"])
    wanted = Path(part["results_dir"]).name
    other.rename(other.with_name(wanted))
    with pytest.raises(SurgeryError, match=rf"{wanted} holds results of other settings \(limit: was 1"):
        evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", {"settings": {}, "weights": 5}),
        ("result.json", {"files": []}),
        ("answers/loglikelihood.quiz.json", {"requests": "0", "answers": {}}),
        ("answers/loglikelihood.quiz.json", {"requests": "0", "answers": [[None]]}),
    ],
)
def test_a_checked_file_of_what_we_never_write_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(with_checksum(content))
    with pytest.raises(SurgeryError, match=rf"{name} is not a result of this program \(.*\)\. Remove it"):
        read_checked_json(path)


def test_a_damaged_record_is_asked_anew(checkpoint, mmlu, part, monkeypatch):
    with monkeypatch.context() as patched:
        killed_after(9, patched, checkpoint, mmlu)
    (folder,) = (checkpoint / "evaluations").glob("mmlu_other-*[0-9a-f]")
    records = sorted((folder / "answers").iterdir())
    data = bytearray(records[7].read_bytes())
    data[len(data) // 2] ^= 1
    records[7].write_bytes(data)
    asked = answered_anew(monkeypatch)
    assert evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)["score"] == part["score"]
    assert len(asked) == 13 - 9 + 1


def test_the_score_is_entered_with_where_it_comes_from(evaluated):
    folder, result = evaluated
    info = read_info(folder)
    measured = info["mmlu_result"]
    assert info["mmlu_score"] == measured["score"] == result["score"]
    assert measured["questions"] == result["questions"] == 85
    assert measured["lm_eval_version"] == lm_eval.__version__
    settings = measured["settings"]
    assert (settings["limit"], settings["num_fewshot"], settings["dtype"]) == (None, 0, "float32")
    assert len(settings["questions"]) == len(measured["weights"]) == 64
    assert measured["date"] == result["date"]
    assert result["entered"]
    assert verify_checkpoint(folder) == []  # its checksum was written again


def test_a_score_of_fewer_questions_does_not_replace_one_of_more(evaluated, mmlu, tmp_path):
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "checkpoint"))
    result = evaluate_checkpoint(folder, mmlu_data=mmlu, limit=1)
    assert not result["entered"]
    assert read_info(folder)["mmlu_result"]["questions"] == 85


def change(folder: Path, what: str) -> None:
    """Change the contents of one of the files that a score depends on."""
    if what == "tokenizer":
        path = folder / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(content))
        return
    path = folder / what
    weights = torch.load(path, weights_only=False)
    with torch.no_grad():
        (weights["lm_head.weight"] if isinstance(weights, dict) else weights.lm_head.weight).neg_()
    torch.save(weights, path)


@pytest.mark.parametrize("what", ["model_state_dict.pt", "model.pt", "tokenizer"])
def test_a_score_of_another_model_does_not_stay(what, evaluated, part, mmlu, tmp_path):
    """Even if the other model is asked fewer questions, and its results are kept elsewhere."""
    folder, results = tmp_path / "checkpoint", tmp_path / "results"
    shutil.copytree(evaluated[0], folder, ignore=shutil.ignore_patterns("evaluations"))
    change(folder, what)
    result = evaluate_checkpoint(folder, mmlu_data=mmlu, limit=1, results_dir=results)
    assert result["entered"]
    assert read_info(folder)["mmlu_score"] == result["score"]
    assert read_info(folder)["mmlu_result"]["questions"] == 57
    assert read_info(folder)["mmlu_result"]["weights"] == result["weights"]
    assert Path(result["results_dir"]).parent == results / "checkpoint"
    assert not (folder / "evaluations").exists()
    earlier = Path(part["results_dir"])
    shutil.copytree(earlier, folder / "evaluations" / earlier.name)
    again = evaluate_checkpoint(folder, tasks=PART, mmlu_data=mmlu)
    name = "weights" if what == "model_state_dict.pt" else what
    assert again["differing"] == [f"{name}: the content has changed"]
    assert not again["kept"]


def test_a_result_of_other_tasks_takes_a_score_of_other_weights_away(evaluated, mmlu, tmp_path):
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "checkpoint"))
    evaluate_checkpoint(folder, tasks=["mmlu_virology"], mmlu_data=mmlu)
    assert read_info(folder)["mmlu_score"] == evaluated[1]["score"]
    change(folder, "model_state_dict.pt")
    evaluate_checkpoint(folder, tasks=["mmlu_virology"], mmlu_data=mmlu)
    assert read_info(folder)["mmlu_score"] is None
    assert "mmlu_result" not in read_info(folder)


def test_lm_eval_s_own_files_are_what_stock_lm_eval_writes(checkpoint_dir, part, mmlu):
    model, tokenizer = load_checkpoint(checkpoint_dir)
    loaded = load_tasks(PART, mmlu_data=mmlu)
    stock = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), tasks=loaded.items, task_manager=loaded.manager
    )
    files = Path(part["results_dir"])
    (results,) = files.glob("*/results_*.json")
    written = json.loads(results.read_text())
    assert written["results"] == stock["results"]
    assert written["groups"] == stock["groups"]
    assert written["config"]["limit"] is None
    for task, samples in stock["samples"].items():
        (lines,) = files.glob(f"*/samples_{task}_2*.jsonl")
        found = [json.loads(line) for line in lines.read_text().splitlines()]
        for name in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "acc"):
            assert [row[name] for row in found] == [row[name] for row in samples]


def test_two_at_once_in_one_folder_are_refused(evaluated, mmlu):
    hold = take(Path(evaluated[1]["results_dir"]))
    try:
        with pytest.raises(SurgeryError, match=f"is being written by process {os.getpid()}"):
            evaluate_checkpoint(evaluated[0], mmlu_data=mmlu)
    finally:
        hold.release()


def test_when_files_cannot_be_written_whole_nothing_counts_as_finished(checkpoint, mmlu, part, monkeypatch):
    """lm-eval logs that its files cannot be written, and goes on."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the answers are smaller, the results not
        try:
            evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)
        except SurgeryError as error:
            os._exit(7 if "could not write its results whole" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list((checkpoint / "evaluations").glob("*/result.json")) == []
    asked = answered_anew(monkeypatch)
    assert evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)["score"] == part["score"]
    assert asked == []


def test_a_model_spread_by_accelerate_answers_the_same(checkpoint, mmlu, part):
    result = evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu, parallelize=True)
    assert result["subjects"] == part["subjects"]


def recall_task(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "tiny_recall",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "recall.yaml").write_text(json.dumps(definition))
    return folder


def test_a_folder_of_task_files(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"context": f"{word} = ", "choices": ["one", "two", "three"], "answer": 1} for word in "abcdef"]
    folder = recall_task(tmp_path / "recall", rows)
    result = evaluate_checkpoint(checkpoint, tasks=[str(folder)])
    assert result["tasks"] == {"tiny_recall": result["subjects"]["tiny_recall"]}
    assert result["questions"] == 6
    assert "mmlu_result" not in read_info(checkpoint)
    asked = answered_anew(monkeypatch)
    assert evaluate_checkpoint(checkpoint, tasks=[str(folder)]) == {**result, "kept": True}
    assert asked == []
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("a = ", "z = "))
    changed = evaluate_checkpoint(checkpoint, tasks=[str(folder)])
    assert changed["results_dir"] != result["results_dir"]
    assert asked == ["tiny_recall"]


def test_the_same_tasks_in_another_place_are_the_same_and_what_a_definition_calls_belongs_to_it(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"context": f"{word} = ", "choices": ["one", "two"], "answer": 0} for word in "abc"]
    folder = recall_task(tmp_path / "recall", rows)
    before = evaluate_checkpoint(checkpoint, tasks=[str(folder)])
    monkeypatch.chdir(tmp_path)
    assert evaluate_checkpoint(checkpoint, tasks=["recall"]) == {**before, "kept": True}
    single = evaluate_checkpoint(checkpoint, tasks=["recall/recall.yaml"])
    (folder / "scoring.py").write_text("def process_results(doc, results): return {'acc': 1.0}")
    assert evaluate_checkpoint(checkpoint, tasks=["recall/recall.yaml"])["results_dir"] != single["results_dir"]


def test_another_right_answer_in_data_outside_the_folder_is_another_score(checkpoint, tmp_path, monkeypatch):
    """The model need not be asked anew, but what was found before does not hold."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"context": f"{word} = ", "choices": ["one", "two"], "answer": 0} for word in "abcdef"]
    folder = recall_task(tmp_path / "recall", rows)
    task = str(folder / "recall.yaml")
    before = evaluate_checkpoint(checkpoint, tasks=[task])
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace('"answer": 0', '"answer": 1'))
    asked = answered_anew(monkeypatch)
    after = evaluate_checkpoint(checkpoint, tasks=[task])
    assert asked == []
    assert not after["kept"]
    assert after["score"] == pytest.approx(1 - before["score"])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_lost_files_of_lm_eval_come_back(damage, checkpoint, mmlu, part, monkeypatch):
    folder = Path(evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)["results_dir"])
    samples = sorted(folder.glob("*/samples_*.jsonl"))
    damage(samples[3])
    asked = answered_anew(monkeypatch)
    again = evaluate_checkpoint(checkpoint, tasks=PART, mmlu_data=mmlu)
    assert asked == []
    assert again["subjects"] == part["subjects"]
    assert len(sorted(folder.glob("*/samples_*.jsonl"))) == len(samples) == 13


def test_a_group_of_mmlu_alone(checkpoint, mmlu, evaluated):
    result = evaluate_checkpoint(checkpoint, tasks=["mmlu_stem", "mmlu_virology"], mmlu_data=mmlu)
    assert result["score"] is None  # several tasks have no common score
    assert result["tasks"]["mmlu_stem"] == evaluated[1]["groups"]["stem"]
    assert result["tasks"]["mmlu_virology"] == evaluated[1]["subjects"]["virology"]
    assert not result["entered"]


def test_the_command_says_what_it_did(evaluated, mmlu, tmp_path):
    args = ["--checkpoint", evaluated[0], "--full_eval", "--skip_generation", "--mmlu_data", mmlu, "--device", "cpu"]
    done = run_command("test_checkpoint", *args, "--result_json", tmp_path / "new" / "result.json")
    assert done.returncode == 0, done.stderr
    assert f"MMLU score   {evaluated[1]['score']:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Results are in {evaluated[1]['results_dir']}"
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {**evaluated[1], "kept": True}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["mmlu_virologie"], ["has no task 'mmlu_virologie'", "did you mean mmlu_virology"]),
        (["mmlu", "mmlu"], ["is given 2 times"]),
        (["mmlu", "mmlu_virology"], ["--tasks has mmlu_virology more than once"]),
    ],
)
def test_tasks_that_do_not_work_are_refused_before_the_model_is_loaded(checkpoint_dir, mmlu, tmp_path, tasks, words):
    args = ["--checkpoint", checkpoint_dir, "--full_eval", "--mmlu_data", mmlu, "--results_dir", tmp_path]
    done = run_command("test_checkpoint", *args, "--tasks", *tasks)
    assert_refused(done, *words)
    assert "Loaded" not in done.stdout


def test_a_folder_without_tasks_and_a_broken_definition_are_named(checkpoint_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SurgeryError, match="empty holds no task definition"):
        evaluate_checkpoint(checkpoint_dir, tasks=[str(tmp_path / "empty")], results_dir=tmp_path / "results")
    folder = recall_task(tmp_path / "broken", [])
    (folder / "data.jsonl").unlink()
    with pytest.raises(SurgeryError, match="broken cannot be loaded"):
        evaluate_checkpoint(checkpoint_dir, tasks=[str(folder)], results_dir=tmp_path / "results")


def test_places_and_arguments_that_cannot_be_are_said_before_the_model_is_loaded(checkpoint_dir, mmlu, tmp_path):
    (tmp_path / "file").touch()
    for words, arguments in (
        ("--results_dir", {"results_dir": tmp_path / "file"}),
        ("No model can have the dtype 'int8'", {"dtype": "int8"}),
        ("must be a list of names", {"tasks": "mmlu_virology"}),
    ):
        with pytest.raises(SurgeryError, match=words):
            evaluate_checkpoint(checkpoint_dir, **{"mmlu_data": mmlu, **arguments})


def test_base_and_donor_are_scored_too_and_compared_with(part, base_dir, donor_dir, mmlu, tmp_path):
    results = tmp_path / "results"
    model, tokenizer = LlamaForCausalLM.from_pretrained(donor_dir), AutoTokenizer.from_pretrained(donor_dir)
    asked = {"tasks": PART, "mmlu_data": mmlu}
    donor = evaluate_checkpoint(donor_dir, **asked, results_dir=results)
    assert donor["subjects"] == evaluate_model(model, tokenizer, **asked)["subjects"]
    with pytest.raises(SurgeryError, match=r"has no tokenizer. Name one by --tokenizer"):
        evaluate_checkpoint(base_dir, **asked, results_dir=results)
    with pytest.raises(SurgeryError, match=r"is a model, not a checkpoint. Name a folder .* with --results_dir"):
        evaluate_checkpoint(donor_dir, **asked)

    flags = ["--full_eval", "--skip_generation", "--tasks", *PART, "--mmlu_data", mmlu, "--results_dir", results]
    flags += ["--device", "cpu", "--tokenizer", donor_dir]
    done = run_command("test_checkpoint", "--checkpoint", base_dir, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"Results are in {results / base_dir.name / 'mmlu_other-'}")
    assert sorted(path.name for path in base_dir.iterdir()) == ["config.json", "pytorch_model.bin"]

    folders = [results / base_dir.name, Path(part["results_dir"]).parent, results / donor_dir.name]
    compared = run_command("compare_checkpoints", *folders, "--output_dir", tmp_path / "report")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count(f"on {part['questions']} common questions") == 2


def test_a_checkpoint_that_is_not_there_is_no_model_to_look_for(tmp_path):
    with pytest.raises(SurgeryError, match=r"nowhere is not there. Build it with"):
        evaluate_checkpoint(tmp_path / "nowhere")
