"""MMLU: the score is what plain forward passes give on the documented prompts, and bad logits are errors.

Questions: two or three made-up ones for each of the 57 subjects. Model: a tiny Llamba with a grafted layer, its random
weights so large that the answers differ from question to question.
"""

import functools
import math
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import evaluate_checkpoint, evaluate_model
from model_preparation.evaluation.mmlu_questions import SUBJECTS
from model_preparation.evaluation.settings import EvaluationSettings
from model_preparation.evaluation.tasks import GROUPS
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import seeded, tiny_config, tiny_llama_cfg

LETTERS = "ABCD"
NOUNS = ["river", "cell", "law", "price", "atom", "poem", "king", "nerve", "field", "treaty"]


def question(rng):
    subject, thing = rng.sample(NOUNS, 2)
    # The space at the end is stripped by the stock prompt.
    return {
        "question": f"What does the {subject} do to the {thing}? ",
        "choices": [f"the {noun} {rng.randrange(100)}" for noun in rng.sample(NOUNS, 4)],
        "answer": rng.randrange(4),
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def rows():
    """{subject: {"dev": 2 rows, "test": 2 or 3 rows}}."""
    rng = random.Random(0)
    return {
        subject: {"dev": [question(rng) for _ in range(2)], "test": [question(rng) for _ in range(2 + index % 2)]}
        for index, subject in enumerate(SUBJECTS)
    }


def write_questions(folder, rows):
    for subject, splits in rows.items():
        for split, questions in splits.items():
            with_subject = [{**row, "subject": subject} for row in questions]
            write_rows(folder / subject / f"{split}-00000-of-00001.parquet", with_subject)
    return folder


@pytest.fixture(scope="module")
def mmlu_data(rows, tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("mmlu"), rows)


@pytest.fixture(scope="module")
def tokenizer(rows):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [prompt(subject, [], row) + " A B C D" for subject, splits in rows.items() for row in splits["test"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def tiny_llama(vocab_size):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return seeded(LlamaForCausalLM(config))


def tiny_grafted_llamba(vocab_size):
    llama_cfg = tiny_llama_cfg()
    return seeded(
        LlambaForCausalLM(
            tiny_config(vocab_size=vocab_size, llama_layers=[1], llama_cfg=llama_cfg, max_position_embeddings=3000)
        )
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_grafted_llamba(len(tokenizer))


def prompt(subject, examples, row):
    """The prompt of lm-eval's mmlu 2.0, spelled out."""

    def ask(row):
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
        return f"{row['question'].strip()}\n{choices}\nAnswer:"

    topic = subject.replace("_", " ")
    shots = "".join(f"{ask(example)} {LETTERS[example['answer']]}\n\n" for example in examples)
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n{shots}{ask(row)}"


@torch.no_grad()
def chosen(model, tokenizer, text):
    """Index of the letter with the largest logit after `text`; one question per forward pass, no padding."""
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    assert all(len(ids) == 1 for ids in letters)
    logits = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
    return int(logits[[ids[0] for ids in letters]].argmax())


def expected(model, tokenizer, rows, *, num_fewshot=0):
    """{subject: [whether each question is answered right]} and the set of all answers given."""
    answers: set[int] = set()
    right: dict[str, list[bool]] = {}
    for subject, splits in rows.items():
        right[subject] = []
        for row in splits["test"]:
            choice = chosen(model, tokenizer, prompt(subject, splits["dev"][:num_fewshot], row))
            answers.add(choice)
            right[subject].append(choice == row["answer"])
    return right, answers


@pytest.fixture(scope="module")
def without_examples(tokenizer, rows):
    """A function: `expected` for a kind of model, computed once."""
    return functools.cache(lambda make: expected(make(len(tokenizer)), tokenizer, rows))


@pytest.mark.parametrize("make", [tiny_llama, tiny_grafted_llamba])
def test_the_score_is_the_share_of_questions_whose_largest_letter_is_right(
    make, tokenizer, mmlu_data, without_examples
):
    model = make(len(tokenizer))
    right, answers = without_examples(make)
    assert len(answers) > 1  # one letter for all questions would not depend on what the model reads

    result = evaluate_model(model, tokenizer, mmlu_data=mmlu_data, batch_size=5)

    every = [each for subject in right.values() for each in subject]
    assert len(result["subjects"]) == 57
    assert result["questions"] == len(every)
    assert result["score"] == pytest.approx(sum(every) / len(every))
    for subject, each in right.items():  # of unequal sizes, so that the score is no mean of means
        assert result["subjects"][subject]["score"] == pytest.approx(sum(each) / len(each))
        assert result["subjects"][subject]["questions"] == len(each)
    groups = result["groups"]
    assert set(groups) == set(GROUPS)
    assert sum(group["questions"] for group in groups.values()) == len(every)
    assert sum(group["score"] * group["questions"] for group in groups.values()) == pytest.approx(sum(every))
    assert all(0 < row["stderr"] < 0.2 for row in (result, *groups.values()))


def test_examples_are_the_first_of_the_dev_split(model, tokenizer, rows, mmlu_data, without_examples):
    asked = SUBJECTS[::4]
    right, _ = expected(model, tokenizer, {subject: rows[subject] for subject in asked}, num_fewshot=2)
    assert right != {subject: without_examples(tiny_grafted_llamba)[0][subject] for subject in asked}

    tasks = [f"mmlu_{subject}" for subject in asked]
    result = evaluate_model(model, tokenizer, tasks=tasks, mmlu_data=mmlu_data, num_fewshot=2)

    assert {name: row["score"] * row["questions"] for name, row in result["subjects"].items()} == pytest.approx(
        {subject: sum(each) for subject, each in right.items()}
    )


def test_a_limit_takes_the_first_questions_of_every_subject_and_the_result_names_it(
    model, tokenizer, mmlu_data, without_examples
):
    right = {subject: each[:1] for subject, each in without_examples(tiny_grafted_llamba)[0].items()}

    result = evaluate_model(model, tokenizer, mmlu_data=mmlu_data, limit=1, batch_size=3, seed=7)

    assert result["questions"] == 57
    assert {name: row["score"] for name, row in result["subjects"].items()} == {
        subject: float(each[0]) for subject, each in right.items()
    }
    assert result["score"] == pytest.approx(sum(each[0] for each in right.values()) / 57)
    assert result["stderr"] is None  # a single question has none
    settings = result["settings"]
    assert (settings["limit"], settings["batch_size"], settings["seed"], settings["num_fewshot"]) == (1, 3, 7, 0)
    assert (settings["device"], settings["dtype"], result["mmlu_data"]) == ("cpu", "float32", str(mmlu_data))
    assert result["max_length"] == 3000  # the config's, not lm-eval's 2048 for models that name none
    assert result["lm_eval_version"].startswith("0.4.")


def test_questions_are_looked_for_before_a_checkpoint_is_loaded_and_after_it_is_found(checkpoint_dir, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(SurgeryError, match=r"is an empty folder"):
        evaluate_checkpoint(folder, mmlu_data=tmp_path / "nowhere")
    shutil.copy(checkpoint_dir / "checkpoint_info.json", folder)
    (folder / "model_state_dict.pt").touch()  # which holds no weights
    with pytest.raises(SurgeryError, match=r"nowhere does not exist"):
        evaluate_checkpoint(folder, mmlu_data=tmp_path / "nowhere")


def test_logits_that_are_not_finite_are_an_error_and_no_score(tokenizer, mmlu_data):
    broken = tiny_llama(len(tokenizer))
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(SurgeryError, match=r"not finite, so there is no score"):
        evaluate_model(broken, tokenizer, mmlu_data=mmlu_data, limit=1)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("num_fewshot", -1), ("batch_size", 0)])
def test_a_setting_out_of_range_is_an_error(model, tokenizer, mmlu_data, name, value):
    with pytest.raises(SurgeryError, match=f"{name} is {value}"):
        evaluate_model(model, tokenizer, mmlu_data=mmlu_data, **{name: value})


def test_settings_are_an_object_or_keywords_and_one_without_effect_is_refused(model, tokenizer, mmlu_data):
    settings = EvaluationSettings(tasks=["mmlu_virology"], limit=2, mmlu_data=mmlu_data)
    result = evaluate_model(model, tokenizer, settings, limit=1)
    assert result == evaluate_model(model, tokenizer, tasks=["mmlu_virology"], limit=1, mmlu_data=mmlu_data)
    assert (result["questions"], result["settings"]["limit"]) == (1, 1)
    with pytest.raises(SurgeryError, match="results_dir has no effect on a model that is loaded"):
        evaluate_model(model, tokenizer, settings, results_dir="here")
    with pytest.raises(TypeError, match="limits"):
        evaluate_model(model, tokenizer, limits=3)
