"""Recall tasks: documents that fit, the answers that stand in them, lm-eval's own scores, and what is refused.

Models: the embedded pair, and the tiny pair, whose tokens are bytes.
"""

import itertools
import json
import os
import random
import re
import signal
import sys
import types
from functools import partial
from pathlib import Path
from unittest.mock import patch

import lm_eval.tasks.ruler
import nltk
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.ruler import common_utils
from transformers import AutoTokenizer

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.choice_vs_generation import asked_both_ways
from model_preparation.evaluation.evaluate import evaluate_checkpoint, evaluate_model
from model_preparation.evaluation.models import load_folder
from model_preparation.evaluation.recall_tasks import RecallRecipe, recall_names
from model_preparation.evaluation.results_folder import ResultsFolder
from model_preparation.evaluation.scoring_lm import ScoringLM
from model_preparation.evaluation.tasks import load_tasks, read_configs
from model_preparation.hub.sources import EMBEDDED
from tests.conftest import make_tokenizer, run_command
from tests.search.conftest import write_task

LENGTHS = (1500, 2000)
IN_BYTES = [name for name in recall_names() if not name.startswith("embedded") and not name.endswith("_choice")]


def documents(name: str, **changes) -> dict[int, list[dict]]:
    recipe = RecallRecipe(make_tokenizer(), 4096, **{"lengths": LENGTHS, "documents": 5, **changes})
    return {task.config.metadata["length"]: list(task.dataset["test"]) for task in recipe.tasks(name)}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", IN_BYTES)
def test_documents_are_as_long_as_asked_and_hold_their_answers(name, language):
    made = documents(name, language=language)
    assert list(made) == list(LENGTHS)
    for length, rows in made.items():
        assert len({row["input"] for row in rows}) == 5
        for row in rows:
            prompt = f"{row['input']} {row.get('gen_prefix', '')}"
            assert 0.7 * length < len(prompt.encode()) <= length
            for output in row["outputs"]:
                assert output in row["input"]
            if "choices" in row:
                assert len(set(row["choices"])) == 4
                assert row["choices"][row["answer"]] == row["outputs"][0]
                assert all(choice in row["input"] for choice in row["choices"])
    assert documents(name, language=language, documents=2)[1500] == made[1500][:2]
    assert documents(name, language=language, seed=5) != made


def test_both_forms_of_a_task_have_the_same_documents():
    assert documents("kv_retrieval") == documents("kv_retrieval_choice")


def test_what_is_asked_for_can_be_looked_up():
    for row in documents("kv_retrieval")[1500]:
        key = re.search(r'key "(\w+)"\?$', row["input"])[1]
        (dictionary,) = re.findall(r"\{.*\}", row["input"])
        assert str(json.loads(dictionary)[key]) == row["outputs"][0]
    for row in documents("variable_tracking")[1500]:
        text = row["input"].split("\n\n")[-1]
        links = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text))
        value = re.search(r"value (\d+) in", text)[1]
        found = {name for name in links if _follow(links, name) == value}
        assert found == set(row["outputs"])
    first, *others = documents("mqar")[1500][:4]
    pairs = dict(line.split() for line in first["input"].splitlines()[:-1])
    for row in [first, *others]:
        assert pairs[row["input"].splitlines()[-1]] == row["outputs"][0]
        assert row["input"].startswith(first["input"].rpartition("\n")[0])  # one text, four questions


def _follow(links: dict[str, str], name: str) -> str:
    while name in links:
        name = links[name]
    return name


def stock_generator(monkeypatch):
    """lm-eval's own maker of needles, without the word list and the download that it needs."""
    categories = {kind: ["word"] for kind in ("nouns", "adjectives", "verbs")}
    words = types.SimpleNamespace(RandomWord=lambda: types.SimpleNamespace(_categories=categories))
    monkeypatch.setitem(sys.modules, "wonderwords", words)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    return niah_utils, prepare_niah


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("niah_single", {}),
        ("niah_multikey", {"num_needle_k": 4}),
        ("niah_multivalue", {"num_needle_v": 4}),
        ("niah_multiquery", {"num_needle_k": 4, "num_needle_q": 4}),
    ],
)
def test_prompts_are_those_of_ruler_in_lm_eval(name, counts, monkeypatch):
    """Given our keys, values and filler, lm-eval's generator asks in the same words and expects the same values."""
    niah_utils, prepare_niah = stock_generator(monkeypatch)
    row = documents(name, documents=1)[1500][0]
    needles = re.findall(r"One of the special magic numbers for ([\w-]+) is: (\d+)\.", row["input"])
    values = {key: [value for other, value in needles if other == key] for key, _ in needles}

    drawn = {"words": iter(values), "numbers": itertools.chain(*values.values())}
    monkeypatch.setattr(prepare_niah, "generate_random", lambda kind: next(drawn[kind]))
    wanted = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **counts}
    text, answers, query = prepare_niah.generate_input_output(
        20, "x", type_haystack="repeat", type_needle_k="words", type_needle_v="numbers", template=niah_utils.TEMPLATE,
        **wanted,
    )  # fmt: skip
    theirs, ours = text.splitlines(), row["input"].splitlines()
    assert ours[0] == theirs[0]
    for sentence in (line for line in theirs if line.startswith("One of")):
        assert sentence in row["input"]
    asked = row["input"].splitlines()[-1]
    if name != "niah_multikey" and name != "niah_multiquery":  # these two draw the keys that they ask for
        assert asked == theirs[-1]
        assert sorted(answers) == sorted(row["outputs"])
    assert asked.replace(_asked_of(row), "KEY") == theirs[-1].replace(query, "KEY")


def _asked_of(row: dict) -> str:
    return re.search(r"for (.*) mentioned", row["input"].splitlines()[-1])[1]


def test_scores_are_those_of_lm_eval_s_ruler_on_the_same_documents():
    """lm-eval's own definition, with our documents. For its own documents, it would download filler."""
    definition = load_yaml(Path(lm_eval.tasks.ruler.__path__[0]) / "niah_single_1.yaml", resolve_func=False)
    metric = {"metric": "4096", "aggregation": common_utils.aggregate_metrics, "higher_is_better": True}
    changes = {"process_results": common_utils.process_results, "metric_list": [metric]}
    recipe = RecallRecipe(make_tokenizer(), 4096, lengths=(4096,), documents=6)
    rng = random.Random(0)
    for name in ("niah_multiquery", "variable_tracking"):
        (ours,) = recipe.tasks(name)
        dataset = {"custom_dataset": partial(dict, test=ours.dataset["test"])}
        theirs = ConfigurableTask(config={**definition, **changes, **dataset})
        scores = []
        for doc in ours.dataset["test"]:
            prompts = [each.fewshot_context(doc, 0, gen_prefix=each.doc_to_prefix(doc)) for each in (ours, theirs)]
            assert prompts[0] == prompts[1]
            answer = ", ".join(output for output in doc["outputs"] if rng.random() < 0.6) + " and 1234567"
            found, wanted = (each.process_results(doc, [answer]) for each in (ours, theirs))
            assert found == wanted
            scores.append(found["4096"])
        assert 0 < sum(scores) / 6 < 1
        assert ours.aggregation()["4096"](scores) == theirs.aggregation()["4096"](scores)


@pytest.fixture(scope="module")
def tiny_llamba():
    model, tokenizer = (
        load_folder(EMBEDDED / "tiny_llamba", None),
        AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llama"),
    )
    return model, tokenizer


def test_the_embedded_pair_has_its_own_task_in_the_suite(tmp_path):
    flags = ["--full_eval", "--skip_generation", "--results_dir", tmp_path, "--device", "cpu", "--limit", 8]
    flags += ["--suite", "recall", "--lengths", 40, 200]
    for name in ("tiny_llama", "tiny_llamba"):
        done = run_command("test_checkpoint", "--checkpoint", name, *flags)
        assert done.returncode == 0, done.stderr
        for line in (
            r"embedded_recall_40 score   [\d.]+ .*\(8 questions\); 0-shot, likeliest choice, 40 tokens",
            r"embedded_recall_generated_200 score   [\d.]+ .*\(8 questions\); 0-shot, generated, 200 tokens",
        ):
            assert re.search(line, done.stdout), done.stdout
    (result,) = tmp_path.glob("tiny_llama/*/result.json")
    kept = json.loads(result.read_text())
    assert kept["settings"]["suite"] == "recall"
    assert kept["settings"]["recall"] == {"lengths": [40, 200], "language": "en"}
    protocol = kept["subjects"]["embedded_recall_generated_40"].pop("protocol")
    asked = {"shots": 0, "output": "generate_until", "metric": "40,none", "length": 40}
    assert protocol == {**asked, "template": "{context}{query}"}
    (samples,) = tmp_path.glob("tiny_llama/*/*/samples_embedded_recall_generated_40_*.jsonl")
    assert len(samples.read_text().splitlines()) == 8

    folders = [tmp_path / "tiny_llamba", tmp_path / "tiny_llama"]
    compared = run_command("compare_checkpoints", *folders, "--subjects", "--output_dir", tmp_path / "report")
    assert compared.returncode == 0, compared.stderr
    assert "on 32 common questions" in compared.stdout
    assert re.search(r"embedded_recall_40 .*tiny_llamba .*0\.\d+ .*0\.\d+", compared.stdout)
    page = (tmp_path / "report" / "comparison.html").read_text()
    assert "By log-likelihood and by generated answers" in page
    assert page.index(">embedded recall 40<") < page.index(">embedded recall 200<")  # the shorter one first
    assert ">group<" not in page  # there is none


def test_lengths_beyond_24_people_ask_about_one_who_is_named_once():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llama")
    (task,) = RecallRecipe(tokenizer, 512, lengths=(512,), documents=5).tasks("embedded_recall")
    for row in task.dataset["test"]:
        *sentences, asked = row["input"].split(" . ")
        assert len(sentences) > 100
        assert [sentence for sentence in sentences if sentence.startswith(asked)] == [f"{asked} {row['outputs'][0]}"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ["mqar"]}, "tokenizer does not know the words of mqar"),
        ({"tasks": ["embedded_recall"], "lengths": [64, 1024]}, "takes at most 512 tokens, but --lengths has 1024"),
        ({"tasks": ["mmlu"], "lengths": [64]}, "and mmlu does not take it. Leave out --lengths, or choose one of kv_"),
        ({"tasks": ["embedded_recall"], "language": "zh"}, "embedded_recall does not take it. Leave out --language"),
        ({"suite": "recall", "haystack": "x"}, "or choose one of niah_single, niah_multikey, niah_multikey_choice, "),
        ({"suite": "recal"}, "suite is 'recal'. Choose one of recall, zero_shot, mmlu, all."),
        ({"suite": "recall", "num_fewshot": 2}, "Leave out --tasks and --num_fewshot"),
        ({"tasks": ["kv_retrieval"], "language": "fr"}, "language is 'fr'. Choose one of en, zh."),
        ({"tasks": ["niah_single"], "haystack": "nowhere.txt"}, "haystack nowhere.txt cannot be read"),
        ({"tasks": ["gsm8k"], "task_data": ["piqa=."]}, "--task_data has piqa"),
        ({"tasks": ["gsm8k"], "task_data": ["gsm8k=nowhere"]}, "The data of gsm8k, nowhere, is not a folder"),
        ({"tasks": ["gsm8k"], "task_data": ["gsm8k"]}, "'gsm8k' is not TASK=DIR"),
    ],
)
def test_bad_input_is_a_sentence(settings, words, tiny_llamba):
    with pytest.raises(SurgeryError, match=re.escape(words)):
        evaluate_model(*tiny_llamba, **settings)


def test_haystack_and_length_must_be_long_enough(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Sentence {number} of a book. " for number in range(60)))
    (row,) = documents("niah_single", lengths=(1000,), documents=1, haystack=path)[1000]
    assert row["input"].count("of a book.") > 10
    with pytest.raises(SurgeryError, match=r"book\.txt has 60 sentences, too few for 3000 tokens of niah_single"):
        documents("niah_single", lengths=(3000,), haystack=path)
    with pytest.raises(SurgeryError, match="64 tokens are too few for a document of kv_retrieval"):
        documents("kv_retrieval", lengths=(64,))


def test_the_questions_of_a_task_of_lm_eval_come_from_a_folder(tmp_path, tiny_llamba, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"Ada likes {thing} . Ada likes", "value": thing} for thing in ("plums", "figs", "tea")]
    (tmp_path / "fda").mkdir()
    (tmp_path / "fda" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_model(*tiny_llamba, tasks=["fda"], task_data=[f"fda={tmp_path / 'fda'}"])
    assert result["questions"] == 3
    assert result["metric"] == "contains,none"
    assert result["tasks"]["fda"]["protocol"]["template"] == "FDA.doc_to_text"
    (tmp_path / "fda" / "validation.jsonl").rename(tmp_path / "fda" / "train.jsonl")
    with pytest.raises(SurgeryError, match="has no split 'validation'"):
        evaluate_model(*tiny_llamba, tasks=["fda"], task_data=[f"fda={tmp_path / 'fda'}"])


def test_the_questions_of_your_own_task_come_from_a_folder_too(tmp_path, tiny_llamba, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ("Ada", "Mia", "Rosa", "Lea")
    rows = [{"context": f"{name} likes", "choices": [" figs", " tea"], "answer": 0} for name in names]
    folder = write_task(tmp_path / "mine", "mine", rows)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    for task in (folder, folder / "mine.yaml"):
        result = evaluate_model(*tiny_llamba, tasks=[str(task)], task_data=[f"{task}={tmp_path / 'data'}"])
        assert result["questions"] == 3


@pytest.mark.parametrize("name", ["embedded_recall", "embedded_recall_generated"])
def test_prompts_that_do_not_fit_are_an_error_or_counted(name, tiny_llamba):
    model, tokenizer = tiny_llamba
    recipe = RecallRecipe(tokenizer, 512, lengths=(200, 400), documents=3)
    tasks = load_tasks([name], recall=recipe)
    with patch.object(model.config, "max_position_embeddings", 300):
        with pytest.raises(SurgeryError, match=rf"of {name}_400 are too long for the model: the longest has 39\d "):
            evaluate_model(model, tokenizer, tasks=tasks)
        result = evaluate_model(model, tokenizer, tasks=tasks, allow_truncation=True)
    assert result["truncated"] == {f"{name}_400": 3 if name.endswith("generated") else 12}


def test_generated_answers_are_those_of_stock_lm_eval(tiny_llamba):
    """Prompts of unequal lengths, with stop sequences, in batches of two sizes.

    No two runs have the same padding. Our loop writes the answers, in less time than lm-eval's loop.
    """
    model, tokenizer = tiny_llamba
    recipe = RecallRecipe(tokenizer, 512, lengths=(40, 80, 120), documents=6)
    prompts = [row["input"] for task in recipe.tasks("embedded_recall_generated") for row in task.dataset["test"]]
    assert len(prompts) == 18
    for until, most in ((["."], 4), (["apples", "tea"], 8)):
        settings = {"max_gen_toks": most, "do_sample": False, "temperature": 0.0}
        asked = [
            Instance("generate_until", {}, (prompt, {**settings, "until": list(until)}), 0, ("task", index, 1))
            for index, prompt in enumerate(prompts)
        ]
        wanted = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5).generate_until(asked, disable_tqdm=True)
        assert len(set(wanted)) > 5
        for batch_size in ("auto", 7):
            with patch.object(HFLM, "_model_generate", None):
                assert ScoringLM(model, tokenizer, batch_size).generate_until(asked, disable_tqdm=True) == wanted


def test_killed_while_it_writes_it_goes_on_after_the_last_batch(tmp_path):
    settings = {"tasks": ["embedded_recall_generated"], "lengths": [40], "limit": 20, "batch_size": 6}
    whole = evaluate_checkpoint("tiny_llamba", **settings, results_dir=tmp_path / "whole")
    child = os.fork()
    if child == 0:
        keep = ResultsFolder.keep_record
        kept = []

        def keep_and_die(folder, name, record):
            keep(folder, name, record)
            kept.append(name)
            if len(kept) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        with patch.object(ResultsFolder, "keep_record", keep_and_die):
            evaluate_checkpoint("tiny_llamba", **settings, results_dir=tmp_path / "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (record,) = tmp_path.glob("killed/*/*/answers/*.json")
    answers = json.loads(record.read_text())["answers"]
    assert len(answers) - answers.count(None) == 12

    asked = []
    texts = ScoringLM.texts
    with patch.object(ScoringLM, "texts", lambda lm, requests: asked.extend(requests) or texts(lm, requests)):
        result = evaluate_checkpoint("tiny_llamba", **settings, results_dir=tmp_path / "killed")
    assert len(asked) == 8
    assert result["tasks"] == whole["tasks"]
    first, second = (
        json.loads(next(tmp_path.glob(f"{name}/*/*/answers/*")).read_text()) for name in ("whole", "killed")
    )
    assert first["answers"] == second["answers"]


def test_log_likelihood_and_generated_answers_are_compared():
    scores = {
        "kv_retrieval_512": [0.2, 0.9, 0.9],
        "kv_retrieval_choice_512": [0.8, 0.7, 0.9],
        "kv_retrieval_1024": [0.1, 0.2, 0.3],
        "embedded_recall_64": [0.5, 0.6, 0.7],
        "embedded_recall_generated_64": [0.5, 0.6, 0.7],
        "arc_easy": [0.1, 0.2, 0.3],
    }
    first, second = asked_both_ways(scores, ["A", "B", "C"])
    assert (first.task, first.by_likelihood, first.generated) == ("kv_retrieval_512", [0.8, 0.7, 0.9], [0.2, 0.9, 0.9])
    assert first.changing == ["A", "B"]
    assert (second.task, second.changing) == ("embedded_recall_64", [])


@pytest.mark.parametrize("task", ["embedded_recall", "kv_retrieval", "niah_multivalue"])
def test_a_search_is_told_what_a_recall_task_is(task):
    """A search reads what kind of answers the task has: choices, or generated text."""
    (config,) = read_configs([task])
    assert config.output_type == ("multiple_choice" if task == "embedded_recall" else "generate_until")
