"""Compare the evaluations of several models on the questions that all of them were asked.

There are results for all questions together, for each group and for each subject: every model's score, its difference
to the first model (the baseline), and a verdict. A subject is one of lm-eval's tasks.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_preparation.checkpoint.checkpoint_info import read_info
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare import paired
from model_preparation.evaluation.compare.answers import Answers, CommonQuestions, match, read_answers
from model_preparation.evaluation.compare.choice_vs_generation import BothWays, asked_both_ways
from model_preparation.evaluation.compare.costs import AGAINST_SCORE, Cost, costs_of, pareto_front
from model_preparation.evaluation.compare.evaluation_files import EvaluationFiles, find_evaluations
from model_preparation.evaluation.compare.notes import (
    cost_notes,
    differing_settings,
    question_notes,
    score_notes,
    settings_of,
)
from model_preparation.evaluation.mmlu_questions import some
from model_preparation.evaluation.results_folder import chosen_metric

OVERALL, GROUP, SUBJECT = "overall", "group", "subject"
BETTER, WORSE, UNCLEAR = "better", "worse", "not distinguishable"


@dataclass(frozen=True)
class Model:
    """A model that is compared.

    Attributes:
        name: the last parts of its folder's path.
        results_path: relative to the folder above the model's, so that a report shows no private path.
        layers: the replaced layers of a checkpoint; None for another model.
        settings: of its evaluation, {setting in words: value}.
        cost: in time and memory; None if it was not measured.
    """

    name: str
    results_path: str
    layers: list[int] | None
    settings: dict[str, str]
    cost: Cost | None


@dataclass(frozen=True)
class Score:
    """The mean of the metric over a row's questions. Its standard error is None if no subject has two questions."""

    mean: float
    stderr: float | None


@dataclass
class Difference:
    """A model minus the baseline, over a row's questions.

    Attributes:
        difference: of the means.
        interval: the 95% bootstrap interval of the difference; None if a subject has a single question.
        gained, lost: the number of questions that only the model answers right, and that only the baseline does.
        p_value: of McNemar's exact test.
        p_adjusted: the p-value adjusted for all tests of rows of the same kind (Holm).
        tests: the number of these tests.
        verdict: "better" or "worse" if `p_adjusted` is below 0.05; without p-values, if `interval` excludes 0. In all
            other cases "not distinguishable".

    `gained`, `lost` and the p-values are None unless every value of the metric is 0 or 1.
    """

    difference: float
    interval: tuple[float, float] | None
    gained: int | None
    lost: int | None
    p_value: float | None
    p_adjusted: float | None = None
    tests: int = 1
    verdict: str = UNCLEAR


@dataclass(frozen=True)
class Row:
    """A line of the tables. `scores` has all models, `differences` all but the first, which is the baseline."""

    kind: str  # OVERALL, GROUP or SUBJECT
    name: str  # lm-eval's
    label: str  # shorter, for people
    group: str  # the label of the group that a subject belongs to, or ""
    questions: int
    scores: list[Score]
    differences: list[Difference]


class _Line(NamedTuple):
    """A `Row` before its numbers are computed, and the tasks that it covers."""

    kind: str
    name: str
    label: str
    group: str
    tasks: list[str]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. The first model is the baseline. `common` has the questions for a report."""

    metric: str
    higher_is_better: bool
    binary: bool  # every value is 0 or 1
    seed: int
    resamples: int
    models: list[Model]
    rows: list[Row]  # everything together first, then groups, then subjects
    notes: list[str]
    common: list[CommonQuestions]
    both_ways: list[BothWays]
    fronts: dict[str, list[str]]  # {field of cost: names of the models on its Pareto front}

    def of_kind(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    def to_dict(self) -> dict[str, Any]:
        """Everything except the questions, for JSON."""
        fields = asdict(replace(self, common=[]))
        del fields["common"]
        return fields


def compare_evaluations(
    folders: Sequence[str | Path],
    *,
    task: str | None = None,
    metric: str | None = None,
    seed: int = 1234,
    resamples: int = 10_000,
) -> Comparison:
    """Compare the first evaluation with each of the others, question by question.

    Args:
        folders: two or more checkpoints, evaluations, or output folders of lm-eval (see evaluation_files.py).
        task: the only task or group of lm-eval to compare. If a folder has several evaluations, `task` can
            also be the name of one evaluation's folder.
        metric: the name of a number that lm-eval has for each question. "METRIC,FILTER" also chooses among several
            filters. By default it is acc, or the first metric that lm-eval names, if a task has no acc.
        seed: of the bootstrap. A subject's interval depends only on the seed and on the answers to that subject.
        resamples: how many resamples the bootstrap draws.

    Raises:
        SurgeryError: for folders without a finished evaluation, damaged files, or nothing in common.
    """
    evaluations = find_evaluations(folders, task)
    if len({evaluation.results_path for evaluation in evaluations}) < len(evaluations):
        raise SurgeryError("One evaluation is given twice. Give different ones.")
    names = _short_names(evaluations)
    metrics = {
        name: metric or (chosen_metric(row) or "acc").removesuffix(",none")
        for evaluation in reversed(evaluations)
        for name, row in evaluation.results["results"].items()
    }
    common, notes = _common_questions(evaluations, names, task, metrics)
    tasks = [each.task for each in common]
    settings = [settings_of(evaluation, tasks) for evaluation in evaluations]
    notes += question_notes(names, evaluations, common) + differing_settings(names, settings)
    notes += score_notes(metrics, names, evaluations, common)

    costs = costs_of(evaluations)
    notes += cost_notes(names, costs)

    values = {each.task: each.column("value") for each in common}
    binary = all(np.isin(each, (0, 1)).all() for each in values.values())
    known = evaluations[0].results["higher_is_better"]
    higher = all(known.get(name, {}).get(metrics[name].partition(",")[0]) is not False for name in tasks)
    means = {}  # {task: for each model except the first, the bootstrap means of its difference to the first}
    for name, each in values.items():
        key = [seed, zlib.crc32(name.encode())]
        means[name] = [
            paired.bootstrap_means(model - each[0], resamples, np.random.default_rng(key)) for model in each[1:]
        ]
    rows = [_row(line, values, means, binary) for line in _lines(evaluations, tasks, task)]
    _judge(rows, higher)
    paths = [str(each.results_path.relative_to(each.place.parent)) for each in evaluations]
    checkpoints = [each.checkpoint for each in evaluations]
    layers = [None if each is None else read_info(each)["replaced_layers"] for each in checkpoints]
    models = list(map(Model, names, paths, layers, settings, costs))
    used = list(dict.fromkeys(metrics[name] for name in tasks))
    shown = used[0] if len(used) == 1 else "score"
    both_ways = asked_both_ways({each.task: each.column("value").mean(axis=1).tolist() for each in common}, names)
    fronts = _fronts(models, [each.mean if higher else -each.mean for each in rows[0].scores])
    return Comparison(shown, higher, binary, seed, resamples, models, rows, notes, common, both_ways, fronts)


def _fronts(models: Sequence[Model], scores: Sequence[float]) -> dict[str, list[str]]:
    """Pareto fronts of the models with a known cost. Empty if fewer than two have one. Higher scores are better."""
    known = [(each.name, each.cost.values, score) for each, score in zip(models, scores, strict=True) if each.cost]
    if len(known) < 2:
        return {}
    names, costs, known_scores = zip(*known, strict=True)
    return {
        field: [names[place] for place in pareto_front([each[field] for each in costs], known_scores)]
        for field in AGAINST_SCORE
    }


def _common_questions(
    evaluations: Sequence[EvaluationFiles], names: Sequence[str], task: str | None, metrics: Mapping[str, str]
) -> tuple[list[CommonQuestions], list[str]]:
    """The common questions of each task, sorted by the tasks' names; and notes on tasks that are left out."""
    chosen = [each.tasks_of(task) if task else [] for each in evaluations]  # empty if `task` names a folder
    wanted = [
        [name for name in each.samples if name in (only or each.samples)]
        for each, only in zip(evaluations, chosen, strict=True)
    ]
    tasks = sorted((name for name in wanted[0] if all(name in each for each in wanted)), key=_in_order)
    left_out = sorted({name for each in wanted for name in each} - set(tasks))
    if not tasks:
        listed = "; ".join(f"{name} has {some(each)}" for name, each in zip(names, wanted, strict=True))
        raise SurgeryError(f"The evaluations have no task in common: {listed}. Evaluate all of them on the same task.")
    notes = [f"Tasks left out, because not every evaluation has them: {some(left_out)}."] if left_out else []

    answers: list[dict[str, Answers]] = []
    for name, evaluation in zip(names, evaluations, strict=True):
        found, without = read_answers(evaluation, {task: metrics[task] for task in tasks})
        answers.append(found)
        if without:
            listed = "; ".join(f"{task} has {some(metrics) or 'none'}" for task, metrics in list(without.items())[:3])
            metric = " or ".join(dict.fromkeys(metrics[task] for task in without))
            if not found:
                raise SurgeryError(f"{name} has no {metric} for any question: {listed}. Name a metric by --metric.")
            notes.append(f"Tasks left out, because {name} has no {metric} for them: {listed}.")
    matched = [match(name, [each[name] for each in answers]) for name in tasks if all(name in each for each in answers)]
    common = [each for each in matched if each.rows]
    if not common:
        raise SurgeryError(
            f"{' and '.join(names)} have no question in common, although all of them have {some(tasks)}. "
            "Evaluate them on the same data."
        )
    if empty := [each.task for each in matched if not each.rows]:
        notes.append(f"Tasks left out, because the models have none of their questions in common: {some(empty)}.")
    return common, notes


def _in_order(name: str) -> str:
    """A key for sorting. Numbers in names count as numbers, so niah_single_512 comes before niah_single_1024."""
    return re.sub(r"\d+", lambda found: found[0].zfill(9), name)


def _row(
    line: _Line,
    values_of: Mapping[str, NDArray[np.float64]],
    means_of: Mapping[str, Sequence[NDArray[np.float64] | None]],
    binary: bool,
) -> Row:
    """Compute a row. `values_of` has each task's values, (models, questions); `means_of` bootstrap means per model."""
    strata = [values_of[task] for task in line.tasks]
    means = [means_of[task] for task in line.tasks]
    values = np.concatenate(strata, axis=1)
    scores = [
        Score(float(values[model].mean()), paired.standard_error([each[model] for each in strata]))
        for model in range(len(values))
    ]
    sizes = [each.shape[1] for each in strata]
    differences = []
    for model in range(1, len(values)):
        difference = values[model] - values[0]
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        differences.append(
            Difference(
                difference=float(difference.mean()),
                interval=paired.stratified_interval([each[model - 1] for each in means], sizes),
                gained=gained if binary else None,
                lost=lost if binary else None,
                p_value=paired.mcnemar_p(gained, lost) if binary else None,
            )
        )
    return Row(line.kind, line.name, line.label, line.group, values.shape[1], scores, differences)


def _judge(rows: Sequence[Row], higher_is_better: bool) -> None:
    """Fill in `p_adjusted`, `tests` and `verdict`, which depend on the number of tests."""
    for kind in (OVERALL, GROUP, SUBJECT):
        together = [difference for row in rows if row.kind == kind for difference in row.differences]
        known = [each for each in together if each.p_value is not None]
        for each, adjusted in zip(known, paired.holm([each.p_value or 0.0 for each in known]), strict=True):
            each.p_adjusted = adjusted
        for each in together:
            each.tests = len(together)
            if each.p_adjusted is not None:
                is_significant = each.p_adjusted < paired.SIGNIFICANCE
            else:
                is_significant = each.interval is not None and not each.interval[0] <= 0 <= each.interval[1]
            if is_significant:
                each.verdict = BETTER if (each.difference > 0) == higher_is_better else WORSE


# --- Lines of the tables, and names -----------------------------------------------------------------------------------


def _short_names(evaluations: Sequence[EvaluationFiles]) -> list[str]:
    """The last parts of the folders' paths: as many parts as are needed for different names."""
    places = [evaluation.place for evaluation in evaluations]
    if len(set(places)) < len(places):  # evaluations of the same checkpoint
        places = [evaluation.given for evaluation in evaluations]
    if len(set(places)) < len(places):
        places = [evaluation.results_path for evaluation in evaluations]
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _lines(evaluations: Sequence[EvaluationFiles], tasks: Sequence[str], task: str | None) -> list[_Line]:
    """The lines for the common tasks `tasks`: everything together, groups, subjects.

    The label of a group says "(part)" if some of its tasks are not common. If `task` is given, groups with tasks
    outside `task` are left out.
    """
    if len(tasks) == 1:
        return [_Line(OVERALL, tasks[0], _label(evaluations, tasks[0]), "", list(tasks))]
    only = {name for each in evaluations for name in each.tasks_of(task or "")}
    members: dict[str, list[str]] = {}
    for evaluation in evaluations:
        for group in evaluation.groups:
            inside = evaluation.tasks_of(group)
            if not only or only.issuperset(inside):
                members[group] = list(dict.fromkeys(members.get(group, []) + inside))
    common = {group: [name for name in tasks if name in inside] for group, inside in members.items()}
    labels = {
        group: _label(evaluations, group) + (" (part)" if len(common[group]) < len(inside) else "")
        for group, inside in members.items()
    }
    # Of several groups with the same common tasks, the smallest describes them best.
    order = sorted(members, key=lambda group: len(members[group]))
    whole = next((group for group in order if len(common[group]) == len(tasks)), None)
    groups = [group for group in members if 0 < len(common[group]) < len(tasks)]
    lines = [_Line(OVERALL, whole or "", labels[whole] if whole else "all questions", "", list(tasks))]
    lines += [_Line(GROUP, group, labels[group], "", common[group]) for group in groups]
    for name in tasks:
        innermost = next((labels[group] for group in order if group in groups and name in common[group]), "")
        lines.append(_Line(SUBJECT, name, _label(evaluations, name), innermost, [name]))
    return lines


def _label(evaluations: Sequence[EvaluationFiles], name: str) -> str:
    """lm-eval's alias, without the indent and dash that its tables put before it (" - stem")."""
    for evaluation in evaluations:
        given = evaluation.results["configs"].get(name, {}).get("task_alias")
        alias = given or evaluation.results["results"].get(name, {}).get("alias")
        if isinstance(alias, str) and alias.strip(" -") and alias.isprintable():
            return alias.strip(" -").replace("_", " ")
    return name
