"""What a reader must know before comparing scores: settings that differ, and questions that are left out."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from model_preparation.evaluation.compare.answers import CommonQuestions
from model_preparation.evaluation.compare.costs import Cost
from model_preparation.evaluation.compare.evaluation_files import EvaluationFiles
from model_preparation.evaluation.mmlu_questions import some
from model_preparation.terminal import escaped

_DATE, _LIMIT, _NONE = "date", "limit of questions per task", "none"
# The settings that are shown and compared: {setting in words: function of results and tasks}.
SETTINGS: dict[str, Callable[[dict[str, Any], Sequence[str]], Any]] = {
    "number of examples before each question": lambda results, tasks: _per_task(results.get("n-shot"), tasks),
    _LIMIT: lambda results, _: results["config"].get("limit"),
    "chat template": lambda results, _: _short(results.get("chat_template_sha")),
    "system instruction": lambda results, _: _short(results.get("system_instruction_sha")),
    "dtype": lambda results, _: str(results["config"].get("model_dtype")).removeprefix("torch."),
    "longest prompt, in tokens": lambda results, _: _tokens(results.get("max_length")),
    "settings of the generation": lambda results, _: results["config"].get("gen_kwargs"),
    "seed of the examples": lambda results, _: results["config"].get("fewshot_seed"),
    "version of the tasks": lambda results, tasks: _per_task(results.get("versions"), tasks),
    "version of lm-eval": lambda results, _: results.get("lm_eval_version"),
    "version of transformers": lambda results, _: results.get("transformers_version"),
}
_NO_LIMIT = 1_000_000_000  # tokens; an ungrafted Llamba has this max_position_embeddings
_SHOWN_CHARACTERS = 120
# Scores can be compared although these differ. (A limit on the length of prompts does not change shorter prompts.)
_HARMLESS = ("version of transformers", "longest prompt, in tokens", _DATE)
# The settings in the first line of a report, {setting in words: its text in that line}.
_HEAD = {
    "number of examples before each question": "{}-shot",
    _LIMIT: "the first {} of each task",
    "version of lm-eval": "lm-eval {}",
    "version of transformers": "transformers {}",
    _DATE: "{}",
}


def _tokens(tokens: int | None) -> int | str | None:
    return "no limit" if tokens is not None and tokens >= _NO_LIMIT else tokens


def settings_of(evaluation: EvaluationFiles, tasks: Sequence[str]) -> dict[str, str]:
    """The settings in an evaluation's results file, {setting in words: value}."""
    read = {words: _shown(read(evaluation.results, tasks)) for words, read in SETTINGS.items()}
    return read | {_DATE: evaluation.date}


def head_line(task: str, metric: str, questions: int, settings: Sequence[Mapping[str, str]]) -> str:
    """Task, metric, questions, shots, limit, versions and date, where known. Values that differ are joined by "or"."""
    parts = [task, metric, f"{questions:,} question{'s' * (questions != 1)}"]
    for words, text in _HEAD.items():
        values = list(dict.fromkeys(each[words] for each in settings))
        if values != [_NONE]:
            parts.append(text.format(" or ".join(values)))
        elif words == _LIMIT:
            parts.append("no limit")
    return " · ".join(parts)


def shared_and_differing(settings: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The settings with the same value for all models, {setting in words: value}; and the settings that differ."""
    differing = [words for words in settings[0] if len({each[words] for each in settings}) > 1]
    shared = {words: value for words, value in settings[0].items() if words not in differing and value != _NONE}
    return shared, differing


def differing_settings(names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each setting that differs between the models called `names`, except `_HARMLESS` ones."""
    notes = []
    for words in SETTINGS:
        values = [each[words] for each in settings]
        if len(set(values)) > 1 and words not in _HARMLESS:
            listed = ", ".join(f"{value} for {name}" for name, value in zip(names, values, strict=True))
            notes.append(f"Different {words}: {listed}.")
    return notes


def question_notes(
    names: Sequence[str], evaluations: Sequence[EvaluationFiles], common: Sequence[CommonQuestions]
) -> list[str]:
    """Sentences on questions that are left out, and on prompts, right answers and filters that differ."""
    notes = []
    questions = sum(len(each.rows) for each in common)
    every = [sum(len(each.answers[model].questions) for each in common) for model in range(len(names))]
    if set(every) != {questions}:
        listed = ", ".join(f"{name} has {count:,}" for name, count in zip(names, every, strict=True))
        notes.append(f"Only the {questions:,} common questions are compared. In these tasks, {listed}.")
    if by_prompt := [each.task for each in common if each.by_prompt]:
        notes.append(
            f"In {some(by_prompt)}, data sets have different rows: questions were matched by their prompts and targets."
        )
    for field, words in (("prompt_hash", "prompts"), ("target_hash", "right answers")):
        if differing := sum(each.differing(field) for each in common):
            notes.append(f"The {words} differ in {differing:,} of the {questions:,} common questions.")
    if filters := [each.task for each in common if len({answers.filter for answers in each.answers}) > 1]:
        notes.append(f"The responses to {some(filters)} were filtered in different ways (lm-eval's filters).")
    for name, evaluation in zip(names, evaluations, strict=True):
        if evaluation.passed_over:
            notes.append(
                f"{name}: {evaluation.results_path.name} is compared, because the newer "
                f"{evaluation.passed_over[0].name} lacks samples files."
            )
    return notes


def score_notes(
    metrics: Mapping[str, str],
    names: Sequence[str],
    evaluations: Sequence[EvaluationFiles],
    common: Sequence[CommonQuestions],
) -> list[str]:
    """Sentences on lm-eval's scores that are not means over questions, such as a group's mean over its tasks."""
    notes = []
    for model, (name, evaluation) in enumerate(zip(names, evaluations, strict=True)):
        answers = {each.task: each.answers[model] for each in common}
        for row in [*evaluation.groups, *answers]:
            tasks = evaluation.tasks_of(row)
            if not tasks or not all(task in answers for task in tasks):
                continue
            key = f"{metrics[tasks[0]].partition(',')[0]},{answers[tasks[0]].filter}"
            value = evaluation.results["results"].get(row, {}).get(key)
            mean = fmean(question.value for task in tasks for question in answers[task].questions)
            if isinstance(value, int | float) and abs(value - mean) > 1e-6 * max(1, abs(mean)):
                notes.append(
                    f"{name}: lm-eval's own score of {row} is {value:.4f}, but the mean over its questions is "
                    f"{mean:.4f}. Here every question counts the same."
                )
    return notes


def cost_notes(names: Sequence[str], costs: Sequence[Cost | None]) -> list[str]:
    """A sentence if costs were measured on different machines or in different dtypes."""
    places = {name: cost.measured_on for name, cost in zip(names, costs, strict=True) if cost is not None}
    if len(set(places.values())) < 2:
        return []
    listed = "; ".join(f"{name} on {place}" for name, place in places.items())
    return [f"Costs were measured in different ways: {listed}."]


def _per_task(values: Any, tasks: Sequence[str]) -> str | None:
    found = sorted({str(values[task]) for task in tasks if task in values}) if isinstance(values, dict) else []
    return ", ".join(found) or None


def _short(digest: Any) -> str | None:
    return str(digest)[:12] if digest else None


def _shown(value: Any) -> str:
    text = _NONE if value in (None, "None", "", {}) else str(value)
    text = escaped(text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
