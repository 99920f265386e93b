"""What the tests of the search share: a small task, the tiny pair in memory, and its questions."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_preparation.search import report
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings
from model_preparation.search.shared_scoring import SharedScorer

WORDS = ["river", "cell", "law", "price", "atom", "poem", "king", "nerve", "field", "treaty"]


def write_task(folder: Path, name: str, rows: list[dict], **changes) -> Path:
    """A folder with a multiple-choice task and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps({**definition, **changes}))
    return folder


def make_questions(count: int, seed: int = 0) -> list[dict]:
    """Contexts of differing lengths that begin alike, with options of one letter or of one word."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        context = "A question about " + " ".join(rng.sample(WORDS, rng.randrange(1, 4))) + "? It is"
        choices = [" A", " B", " C"] if number % 2 else rng.sample([f" {word}" for word in WORDS], 3)
        rows.append({"context": context, "choices": choices, "answer": rng.randrange(3)})
    return rows


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory) -> Path:
    """Two tasks of 12 and 8 questions: the first with a common beginning that runs once, the second with none."""
    folder = tmp_path_factory.mktemp("search_task")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        write_task(folder, "tiny_words", make_questions(12))
        rows = [{**row, "context": row["context"][17 + index % 5 :]} for index, row in enumerate(make_questions(8, 1))]
        write_task(folder, "tiny_pieces", rows)
    return folder


@pytest.fixture(scope="session")
def loaded(base_dir, layers_dir, donor_dir, task_dir, tmp_path_factory) -> ScoringSetup:
    """The tiny pair with its questions."""
    folder = tmp_path_factory.mktemp("datasets")
    names = {"base": str(base_dir), "donor": str(donor_dir), "llama_layers_dir": layers_dir}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(folder))
        setup = ScoringSetup(SearchSettings(folder, **names, tasks=(str(task_dir),), batch_size=3))
    assert torch.get_num_threads() == 1
    return setup


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take most of a small search's time. A search in a module's fixture still makes all plots."""
    monkeypatch.setattr(report, "PLOTS", {})


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patched.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
        yield


@pytest.fixture(scope="session")
def make_settings(base_dir, layers_dir, donor_dir, task_dir):
    def make(folder: Path, **changes) -> SearchSettings:
        fields = {"base": str(base_dir), "llama_layers_dir": layers_dir, "tasks": (str(task_dir),)}
        return SearchSettings(folder, **{**fields, "donor": str(donor_dir), "batch_size": 3, **changes})

    return make


@pytest.fixture
def make_scorer(loaded, tmp_path):
    """Makes a scorer with other settings; its files go into `tmp_path`."""

    def make(**changes) -> SharedScorer:
        setup = copy.copy(loaded)
        setup.settings = replace(loaded.settings, output_dir=tmp_path, **changes)
        return SharedScorer(setup)

    return make
