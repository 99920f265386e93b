"""Find the questions on which two models differ most, as texts with both answers.

One model answers these questions right and the other wrong, or one gets a higher score. The largest differences of the
metric come first. Equal differences are ordered by the difference between the probabilities of the right answer.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_preparation.evaluation.compare.answers import CommonQuestions
from model_preparation.evaluation.compare.compare import Comparison

_TITLE_CHARACTERS, _TEXT_CHARACTERS, _ANSWER_CHARACTERS = 110, 1_500, 300  # limits, so that a report stays small


@dataclass(frozen=True)
class Example:
    """A question and two answers to it."""

    task: str
    title: str  # the beginning of the question
    text: str
    target: str
    answers: tuple[str, str]  # the baseline's, the model's
    values: tuple[float, float]  # of the metric


def differing_questions(comparison: Comparison, model: int, count: int) -> tuple[list[Example], list[Example]]:
    """The questions on which a model scores higher than the baseline, and those on which it scores lower.

    Each list has at most `count` questions. `model` is the model's index; the baseline's is 0.
    """
    found: list[tuple[float, float, CommonQuestions, int]] = []
    for common in comparison.common:
        for index, row in enumerate(common.rows):
            difference = row[model].value - row[0].value
            probability_gap = abs(row[model].right_probability - row[0].right_probability)
            if difference:
                found.append((difference, 0.0 if math.isnan(probability_gap) else probability_gap, common, index))
    found.sort(key=lambda each: (-abs(each[0]), -each[1]))
    chosen = ([each for each in found if sign * each[0] > 0][:count] for sign in (1, -1))
    higher, lower = ([_example(common, index, model) for _, _, common, index in each] for each in chosen)
    return higher, lower


def _example(common: CommonQuestions, index: int, model: int) -> Example:
    row = common.rows[index]
    samples = [common.answers[each].read_sample(row[each]) for each in (0, model)]
    options = _options(samples[0])
    targets = samples[0].get("target")
    target = ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)
    if options and target.isdigit() and int(target) < len(options):
        target = options[int(target)]
    doc = samples[0].get("doc")
    texts = [value for value in doc.values() if isinstance(value, str)] if isinstance(doc, dict) else []
    return Example(
        task=common.task,
        title=_cut(" ".join((texts or [str(doc)])[0].split()), _TITLE_CHARACTERS),
        text=_text(doc, options),
        target=_cut(target, _ANSWER_CHARACTERS),
        answers=(_answer(samples[0]), _answer(samples[1])),
        values=(row[0].value, row[model].value),
    )


def _text(doc: Any, options: list[str]) -> str:
    """The question: a line for each field and each choice.

    A choice's line begins with its letter in the prompt, or with a number.
    """
    if not isinstance(doc, dict):
        return _cut(str(doc), _TEXT_CHARACTERS)
    lines = []
    for name, value in doc.items():
        if isinstance(value, list):
            letters = options if len(options) == len(value) and max(map(len, options)) == 1 else range(len(value))
            lines += [f"{name}:", *(f"  {letter}. {item}" for letter, item in zip(letters, value, strict=True))]
        else:
            lines.append(f"{name}: {value}")
    return _cut("\n".join(lines), _TEXT_CHARACTERS)


def _options(sample: dict[str, Any]) -> list[str]:
    """The texts among which a model chooses in a multiple-choice task; empty for other tasks."""
    arguments, answers = sample.get("arguments"), sample.get("filtered_resps")
    if not isinstance(arguments, dict) or not isinstance(answers, list) or len(arguments) != len(answers) > 1:
        return []
    texts = [each.get("arg_1") for each in arguments.values() if isinstance(each, dict)]
    return [text.strip() for text in texts if isinstance(text, str)]


def _answer(sample: dict[str, Any]) -> str:
    """A model's answer: the likeliest option and its probability among the options, or the generated response."""
    answers, options = sample.get("filtered_resps"), _options(sample)
    try:
        scores = np.array([float(pair[0]) for pair in answers or []])
        best = int(scores.argmax())
        return _cut(f"{options[best]} ({np.exp(scores[best] - np.logaddexp.reduce(scores)):.0%})", _ANSWER_CHARACTERS)
    except (LookupError, TypeError, ValueError, OverflowError):
        first = answers[0] if isinstance(answers, list) and answers else answers
        return _cut(str(first), _ANSWER_CHARACTERS)


def _cut(text: str, length: int) -> str:
    """A text; if it is too long, only its beginning and its end. After a long document, the question is at the end."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
