"""A comparison as tables in the terminal.

In: a comparison. Out: rich tables of everything together and the groups, on request of the subjects, each model's
difference to the baseline beside its score.
"""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model_preparation.evaluation.compare import words
from model_preparation.evaluation.compare.compare import Comparison, Difference, Row
from model_preparation.evaluation.compare.layout import GROUP, OVERALL, SUBJECT
from model_preparation.terminal import escaped

_STYLES = {"better": "green", "worse": "red", "unclear": ""}


def comparison_tables(comparison: Comparison, *, subjects: bool) -> RenderableType:
    """The tables, what differs between the evaluations above them, the verdicts below."""
    overall = comparison.of_kind(OVERALL)
    parts: list[RenderableType] = [Text(escaped(f"note: {note}")) for note in comparison.notes]
    parts += [
        Text(escaped(f"{letter(model)}  {words.model_line(each)}")) for model, each in enumerate(comparison.models)
    ]
    parts.append(_table(comparison, [*overall, *comparison.of_kind(GROUP)], "group"))
    if subjects and comparison.of_kind(SUBJECT):
        parts.append(_table(comparison, comparison.of_kind(SUBJECT), "subject"))
    for kind in (OVERALL, GROUP, SUBJECT):
        if sentence := words.tests_sentence(comparison, kind):
            parts.append(Text(sentence))
    parts += [
        Text(escaped(words.verdict_sentence(comparison, overall[0], model)), "bold")
        for model in range(1, len(comparison.models))
    ]
    return Group(*parts)


def _table(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    """A row per group or subject, in it a line per model, so that 80 columns are enough for any number of models."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, overflow="fold")
    table.add_column("questions", justify="right")
    table.add_column("")
    table.add_column(Text(f"{comparison.metric} ± stderr"), justify="right", no_wrap=True)
    table.add_column("difference, 95%", justify="right", no_wrap=True)
    table.add_column("adjusted p" if comparison.binary else "", justify="right", no_wrap=True)
    for row in rows:
        differences = [_difference_cells(difference) for difference in row.differences]
        table.add_row(
            Text(row.label),
            f"{row.questions:,}",
            _stacked([Text(letter(model)) for model in range(len(row.scores))]),
            _stacked([Text(words.score(score.mean, score.stderr)) for score in row.scores]),
            _stacked([Text(), *(change for change, _ in differences)]),
            _stacked([Text(), *(p_value for _, p_value in differences)]),
        )
    return table


def _difference_cells(difference: Difference) -> tuple[Text, Text]:
    change = words.number(difference.difference, sign=True)
    if difference.interval is not None:
        change += " [{}, {}]".format(*(words.number(end, sign=True) for end in difference.interval))
    style = _STYLES[words.verdict_class(difference)]
    return Text(change, style), Text(words.p_value(difference.p_adjusted), style)


def _stacked(lines: Sequence[Text]) -> Text:
    return Text("\n").join(lines)


def letter(model: int) -> str:
    """A for the baseline, then B, C, ...; after Z their numbers."""
    return chr(ord("A") + model) if model < 26 else str(model + 1)
