"""Evaluations made by stock lm-eval, with its scoring and its files. Only the tasks and the model are ours.

The model gives random numbers. As in MMLU, the group `quiz` has groups, and the groups have subjects.
The four subjects have unequal sizes; `plants` has one question twice.
"""

import json
import random
from pathlib import Path
from unittest.mock import patch

import lm_eval
import numpy as np
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

QUESTIONS = {"plants": 13, "animals": 7, "poems": 9, "grammar": 5}
GROUPS = {"quiz_nature": ["plants", "animals"], "quiz_letters": ["poems", "grammar"]}
TEMPLATE = """\
task: quiz_{subject}
task_alias: {subject}
custom_dataset: !function rows.read
dataset_kwargs: {{subject: {subject}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ROWS = """\
import json
from pathlib import Path
from unittest.mock import patch

import datasets


def read(*, subject, **_):
    rows = json.loads((Path(__file__).parent / f"{subject}.json").read_text())
    return {"test": datasets.Dataset.from_list(rows[1:]), "dev": datasets.Dataset.from_list(rows[:1])}
"""


def write_tasks(folder: Path) -> Path:
    """The task files of the group `quiz` and their questions."""
    folder.mkdir()
    rng = random.Random(5)
    (folder / "rows.py").write_text(ROWS)
    for subject, count in QUESTIONS.items():
        once = count - (subject == "plants")
        rows = [
            {
                "question": f"Which of the {subject},\u2028a line of Unicode, is number {number} of {count}?",
                "choices": [f"<b>{letter}</b> & {rng.randrange(1000)}" for letter in "wxyz"],
                "answer": rng.randrange(4),
            }
            for number in range(once + 1)  # the first is the example in prompts
        ]
        rows += rows[3 : 3 + count - once]
        (folder / f"{subject}.json").write_text(json.dumps(rows))
        (folder / f"quiz_{subject}.yaml").write_text(TEMPLATE.format(subject=subject))
    groups = {
        "quiz": list(GROUPS),
        **{name: [f"quiz_{subject}" for subject in subjects] for name, subjects in GROUPS.items()},
    }
    for name, children in groups.items():
        text = {"group": name, "task": children, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
        (folder / f"_{name}.yaml").write_text(json.dumps({**text, "group_alias": name.removeprefix("quiz_")}))
    return folder


class RandomModel(LM):
    """Answers each request with the next random number. The seed sets the first one."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = np.random.default_rng(seed)

    def loglikelihood(self, requests):
        return [(float(self.generator.normal()), False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def evaluate(tasks: Path, folder: Path, *, seed: int, task: str = "quiz", name: str = "a model", **settings) -> Path:
    """What `lm_eval --output_path FOLDER --log_samples` leaves; returns `folder`."""
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    loaded = manager.load(task)
    tracker = EvaluationTracker(output_path=str(folder))
    with patch("lm_eval.evaluator.add_env_info"):  # it runs pip and compilers, which takes seconds
        results = lm_eval.simple_evaluate(
            model=RandomModel(seed),
            tasks=[loaded["groups"].get(task) or loaded["tasks"][task]],
            task_manager=manager,
            evaluation_tracker=tracker,
            model_args={"pretrained": name},
            log_samples=True,
            verbosity="ERROR",
            **settings,
        )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for each in results["configs"]:
        tracker.save_results_samples(task_name=each, samples=samples[each])
    return folder


def results_of(folder: Path) -> dict:
    """The one results file below `folder`."""
    (path,) = folder.glob("**/results_*.json")
    return json.loads(path.read_text())


def samples_of(folder: Path, subject: str) -> list[dict]:
    (path,) = folder.glob(f"**/samples_quiz_{subject}_*.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def change_samples(folder: Path, change) -> None:
    """Put every sample line through `change`, which alters the dict in place."""
    for path in folder.glob("**/samples_*.jsonl"):
        lines = []
        for line in path.read_text().split("\n")[:-1]:
            sample = json.loads(line)
            change(sample)
            lines.append(json.dumps(sample))
        path.write_text("\n".join(lines) + "\n")
