"""A difference in plain words.

In: a comparison's rows. Out: sentences and numbers as people read them, for the terminal and the report.
"""

from model_preparation.evaluation.compare.compare import BETTER, UNCLEAR, Comparison, Difference, Model, Row
from model_preparation.evaluation.compare.layout import GROUP, SUBJECT
from model_preparation.evaluation.compare.paired import SIGNIFICANCE

_SMALLEST_P = 0.001  # below it, only that is said


def verdict_sentence(comparison: Comparison, row: Row, model: int) -> str:
    """How model number `model` (from 1) compares with the baseline on a row's questions.

    For example: "graft against base: 0.570 against 0.554 on 2,850 common questions: difference +0.016, 95% interval
    [-0.006, +0.038], p = 0.17: not distinguishable".
    """
    difference = row.differences[model - 1]
    new, old = row.scores[model].mean, row.scores[0].mean
    names = [each.name for each in comparison.models]
    return (
        f"{names[model]} against {names[0]}: {number(new)} against {number(old)} on {row.questions:,} common "
        f"question{'s' * (row.questions != 1)}: difference {number(difference.difference, sign=True)}, "
        f"{interval(difference)}{_p_clause(difference)}: {difference.verdict}"
    )


def model_line(model: Model) -> str:
    """Its name, with the layers that were replaced where that is known."""
    if model.layers is None:
        return model.name
    return f"{model.name} (layers {' '.join(map(str, model.layers)) or 'none'} replaced)"


def tests_sentence(comparison: Comparison, kind: str) -> str | None:
    """What many tests at once mean, for rows of `kind`; None where there is one test."""
    rows = comparison.of_kind(kind)
    tests = sum(len(row.differences) for row in rows)
    if tests < 2:
        return None
    what = {GROUP: "groups", SUBJECT: "subjects"}.get(kind, "models")
    chance = (
        f"{tests} differences ({what}) are tested: {tests * SIGNIFICANCE:.0f} or so would look real by chance alone"
    )
    if tests * SIGNIFICANCE < 1:
        chance = f"{tests} differences ({what}) are tested at once"
    real = sum(difference.verdict != UNCLEAR for row in rows for difference in row.differences)
    if comparison.binary:
        return (
            f"{chance}, so each p-value is adjusted for all of them (Holm). After that {real} can be told from chance."
        )
    return f"{chance}, and their intervals are not adjusted for that. {real} of them exclude 0."


def number(value: float | None, *, sign: bool = False) -> str:
    """Three decimals; fewer for large numbers."""
    if value is None:
        return "–"
    decimals = 3 if abs(value) < 100 else 1
    rounded = round(value, decimals) or 0.0  # never -0.000
    return f"{rounded:+.{decimals}f}" if sign and rounded else f"{rounded:.{decimals}f}"


def score(mean: float, stderr: float | None) -> str:
    return number(mean) + ("" if stderr is None else f" ± {number(stderr)}")


def interval(difference: Difference) -> str:
    if difference.interval is None:
        return "no interval (a single question in a subject)"
    low, high = difference.interval
    return f"95% interval [{number(low, sign=True)}, {number(high, sign=True)}]"


def p_value(value: float | None) -> str:
    """As the literature has it: 0.17, 0.032, < 0.001."""
    if value is None:
        return "–"
    if value < _SMALLEST_P:
        return f"< {_SMALLEST_P}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def verdict_class(difference: Difference) -> str:
    """One word for style sheets and colours."""
    return {UNCLEAR: "unclear", BETTER: "better"}.get(difference.verdict, "worse")


def _p_clause(difference: Difference) -> str:
    if difference.p_value is None:
        return ""
    equals = "" if difference.p_value < _SMALLEST_P else "= "
    clause = f", p {equals}{p_value(difference.p_value)}"
    if difference.tests > 1:
        clause += f" ({p_value(difference.p_adjusted)} adjusted for {difference.tests} tests)"
    return clause
