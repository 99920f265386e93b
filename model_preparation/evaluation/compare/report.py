"""Show a comparison to people: sentences, tables in the terminal, and a folder with an HTML page and plots.

The page needs no other files. jinja2 escapes all text that comes from files. The page's Content-Security-Policy forbids
every request, and every script except the page's own.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare import plots
from model_preparation.evaluation.compare.compare import (
    BETTER,
    GROUP,
    OVERALL,
    SUBJECT,
    UNCLEAR,
    Comparison,
    Difference,
    Model,
    Row,
)
from model_preparation.evaluation.compare.costs import Cost
from model_preparation.evaluation.compare.examples import differing_questions
from model_preparation.evaluation.compare.notes import head_line, shared_and_differing
from model_preparation.evaluation.compare.paired import SIGNIFICANCE
from model_preparation.evaluation.efficiency import MEASURED
from model_preparation.evaluation.mmlu_questions import some
from model_preparation.io.complete_folder import check_target, new_folder
from model_preparation.terminal import escaped

PAGE, NUMBERS = "comparison.html", "comparison.json"
_OURS = {PAGE, NUMBERS, *(f"{name}.png" for name in plots.PLOTS)}
_PLURAL = {OVERALL: "models", GROUP: "groups", SUBJECT: "subjects"}
_STYLES = {"better": "green", "worse": "red", "unclear": ""}
_SMALLEST_P = 0.001  # smaller p-values are shown as "< 0.001"


# --- The folder -------------------------------------------------------------------------------------------------------


def check_report_folder(target: Path, *, overwrite: bool) -> None:
    """Raise SurgeryError if `target` cannot be written, has a report that may not be replaced, or has other files."""
    check_target(target, overwrite=overwrite, marker_file=PAGE)
    if overwrite and target.is_dir() and (others := sorted({path.name for path in target.iterdir()} - _OURS)):
        raise SurgeryError(
            f"{target} has files that no report has ({others[0]}), and --overwrite replaces the whole folder. "
            "Choose another folder."
        )


def both_ways_table(comparison: Comparison) -> Table | None:
    """A table of scores by log-likelihood and by generated answers; None if no task has both kinds of score."""
    if not comparison.both_ways:
        return None
    table = Table("task", "model", title="By log-likelihood and by generated answers")
    for words in ("log-likelihood", "generated"):
        table.add_column(words, justify="right", no_wrap=True)
    table.add_column("order")
    for each in comparison.both_ways:
        for model, name in enumerate(each.models):
            scores = (f"{each.by_likelihood[model]:.3f}", f"{each.generated[model]:.3f}")
            task = escaped(each.task) if model == 0 else ""
            table.add_row(Text(task), Text(escaped(name)), *scores, "changes" if name in each.changing else "")
    return table


def write_report(comparison: Comparison, target: Path, *, questions: int, as_json: bool, overwrite: bool) -> None:
    """Write a folder with comparison.html and the plots as PNG. The folder appears complete or not at all.

    Args:
        comparison: the numbers.
        target: the folder.
        questions: for each model, show at most this many questions on which it scores higher than the
            baseline, and at most this many on which it scores lower.
        as_json: whether to write comparison.json too.
        overwrite: whether to replace an earlier report.

    Raises:
        SurgeryError: as in `check_report_folder`.
        OSError: if the folder cannot be written.
    """
    check_report_folder(target, overwrite=overwrite)
    names = [model.name for model in comparison.models]
    with new_folder(target, overwrite=overwrite, marker_file=PAGE) as folder:
        others = names[1] if len(names) == 2 else f"{len(names) - 1} models"
        drawn = [
            (heading, plots.save_both(plot, comparison, name, folder))
            for name, (heading, plot) in plots.plots_of(comparison).items()
        ]
        page = _html_page(comparison, title=f"{others} against {names[0]}", questions=questions, drawn=drawn)
        (folder / PAGE).write_text(page, encoding="utf-8")
        if as_json:
            text = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
            (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")


def render_page(template: str, **values: Any) -> str:
    """An HTML page: a jinja2 template that fills the blocks of page.html, the frame of our reports.

    The template may use the functions `number`, `score`, `p_value`, `verdict_class` and `sortable`.
    """
    frame = jinja2.DictLoader({"page.html": _file("page.html")})
    environment = jinja2.Environment(loader=frame, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {each.__name__: each for each in (number, score, p_value, verdict_class, sortable)}
    script, style = (_file(f"report.{suffix}") for suffix in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        **values, script=Markup(script), style=Markup(style), script_digest=digest
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def sortable(words: str, kind: str = "number") -> Markup:
    """The header of a column by which the reader can sort the table. `kind` is "number" or "text"."""
    header = '<th scope="col" class="{}" data-kind="{}"><button type="button">{}</button></th>'
    return Markup(header).format("text" if kind == "text" else "", kind, words)


def _html_page(comparison: Comparison, *, title: str, questions: int, drawn: list[tuple[str, Markup]]) -> str:
    overall = comparison.of_kind(OVERALL)[0]
    settings = [model.settings for model in comparison.models]
    shared, differing = shared_and_differing(settings)
    tables = {"Models": ("models", OVERALL), "Groups": ("groups", GROUP), "Subjects": ("subjects", SUBJECT)}
    return render_page(
        _file("report.html"),
        title=title,
        head=head_line(
            overall.label if overall.name else some([row.label for row in comparison.of_kind(SUBJECT)]),
            comparison.metric,
            overall.questions,
            settings,
        ),
        comparison=comparison,
        tables=[
            {"heading": heading, "id": name, "rows": rows, "tests": _tests_sentence(comparison, kind)}
            for heading, (name, kind) in tables.items()
            if (rows := comparison.of_kind(kind))
        ],
        plots=drawn,
        costs=_costs_sentence(comparison),
        measured=MEASURED,
        model_lines=[_model_line(model) for model in comparison.models],
        examples=_examples(comparison, questions),
        has_choices=any(not isnan(row[0].right_probability) for each in comparison.common for row in each.rows),
        shared=shared,
        differing=differing,
    )


def _examples(comparison: Comparison, count: int) -> list[dict[str, Any]]:
    """Lists of questions with headings: for each model except the baseline, where it scores higher, and where lower."""
    labels = {row.name: row.label for row in comparison.rows}
    names = [model.name for model in comparison.models]
    found = []
    for model in range(1, len(names)):
        higher, lower = differing_questions(comparison, model, count)
        action = ("answers right and {} wrong" if comparison.binary else "scores higher than {}").format
        for better, other, examples in ((names[model], names[0], higher), (names[0], names[model], lower)):
            if examples:
                heading = f"{better} {action(other)}"
                found.append({"heading": heading, "model": names[model], "questions": examples, "labels": labels})
    return found


# --- The terminal -----------------------------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison, *, subjects: bool) -> RenderableType:
    """Notes on differing settings, the tables (that of the subjects only if `subjects`), and the verdicts."""
    overall = comparison.of_kind(OVERALL)
    parts: list[RenderableType] = [Text(escaped(f"note: {note}")) for note in comparison.notes]
    for model, each in enumerate(comparison.models):
        cost = "" if each.cost is None else f": {_cost_words(each.cost)}"
        parts.append(Text(escaped(f"{_letter(model)}  {_model_line(each)}{cost}")))
    parts.append(_table(comparison, [*overall, *comparison.of_kind(GROUP)], "group"))
    if subjects and comparison.of_kind(SUBJECT):
        parts.append(_table(comparison, comparison.of_kind(SUBJECT), "subject"))
    if table := both_ways_table(comparison):
        parts.append(table)
    if sentence := _front_sentence(comparison):
        parts.append(Text(escaped(sentence)))
    parts += [Text(sentence) for kind in _PLURAL if (sentence := _tests_sentence(comparison, kind))]
    parts += [
        Text(escaped(verdict_sentence(comparison, overall[0], model)), "bold")
        for model in range(1, len(comparison.models))
    ]
    return Group(*parts)


def _table(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    """A row per group or subject. It has a line per model, so any number of models fits into 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, overflow="fold")
    table.add_column("questions", justify="right")
    table.add_column("")
    table.add_column(Text(f"{comparison.metric} ± stderr"), justify="right", no_wrap=True)
    table.add_column("difference, 95%", justify="right", no_wrap=True)
    table.add_column("adjusted p" if comparison.binary else "", justify="right", no_wrap=True)
    for row in rows:
        differences = [_difference_cells(difference) for difference in row.differences]
        columns = (
            [Text(_letter(model)) for model in range(len(row.scores))],
            [Text(score(each.mean, each.stderr)) for each in row.scores],
            [Text(), *(change for change, _ in differences)],
            [Text(), *(adjusted for _, adjusted in differences)],
        )
        table.add_row(Text(row.label), f"{row.questions:,}", *(Text("\n").join(lines) for lines in columns))
    return table


def _difference_cells(difference: Difference) -> tuple[Text, Text]:
    change = number(difference.difference, sign=True)
    if difference.interval is not None:
        change += " [{}, {}]".format(*(number(end, sign=True) for end in difference.interval))
    style = _STYLES[verdict_class(difference)]
    return Text(change, style), Text(p_value(difference.p_adjusted), style)


def _letter(model: int) -> str:
    """A for the baseline, then B, C, ...; after Z, numbers."""
    return chr(ord("A") + model) if model < 26 else str(model + 1)


# --- Words ------------------------------------------------------------------------------------------------------------


def verdict_sentence(comparison: Comparison, row: Row, model: int) -> str:
    """How a model compares with the baseline on a row's questions. `model` is its index; the baseline's is 0.

    For example: "graft against base: 0.570 against 0.554 on 2,850 common questions: difference +0.016, 95% interval
    [-0.006, +0.038], p = 0.17: not distinguishable".
    """
    difference = row.differences[model - 1]
    new, old = row.scores[model].mean, row.scores[0].mean
    names = [each.name for each in comparison.models]
    interval = "no interval (a single question in a subject)"
    if difference.interval is not None:
        interval = "95% interval [{}, {}]".format(*(number(end, sign=True) for end in difference.interval))
    return (
        f"{names[model]} against {names[0]}: {number(new)} against {number(old)} on {row.questions:,} common "
        f"question{'s' * (row.questions != 1)}: difference {number(difference.difference, sign=True)}, "
        f"{interval}{_p_clause(difference)}: {difference.verdict}"
    )


def _p_clause(difference: Difference) -> str:
    if difference.p_value is None:
        return ""
    equals = "" if difference.p_value < _SMALLEST_P else "= "
    clause = f", p {equals}{p_value(difference.p_value)}"
    if difference.tests > 1:
        clause += f" ({p_value(difference.p_adjusted)} adjusted for {difference.tests} tests)"
    return clause


def _model_line(model: Model) -> str:
    """The model's name, with its replaced layers if they are known."""
    if model.layers is None:
        return model.name
    return f"{model.name} (layers {' '.join(map(str, model.layers)) or 'none'} replaced)"


def _costs_sentence(comparison: Comparison) -> str:
    cost = next((model.cost for model in comparison.models if model.cost), None)
    if cost is None:
        return ""
    words = f"Costs are for one sequence after {cost.context:,} tokens, measured on {cost.measured_on}."
    return f"{words} {_front_sentence(comparison)}".rstrip()


def _front_sentence(comparison: Comparison) -> str:
    """A sentence that names the models on each Pareto front; "" if there is no front."""
    if not comparison.fronts:
        return ""
    fronts = "; ".join(
        f"of score and {MEASURED[field][0]}: {', '.join(names)}" for field, names in comparison.fronts.items()
    )
    return f"Pareto front {fronts}. Every other model costs at least as much as one of these, and scores no higher."


def _cost_words(cost: Cost) -> str:
    shown = (f"{words} {cost.values[field] / size:,.2f} {unit}" for field, (words, unit, size) in MEASURED.items())
    return f"{', '.join(shown)} after {cost.context:,} tokens"


def _tests_sentence(comparison: Comparison, kind: str) -> str:
    """A sentence about the effect of many tests at once; "" for a single test."""
    differences = [difference for row in comparison.of_kind(kind) for difference in row.differences]
    tests = len(differences)
    if tests < 2:
        return ""
    tested = f"{tests} differences ({_PLURAL[kind]}) are tested at once"
    if tests * SIGNIFICANCE >= 1:
        tested += f": about {tests * SIGNIFICANCE:.0f} would look significant by chance alone"
    significant = sum(difference.verdict != UNCLEAR for difference in differences)
    if comparison.binary:
        return f"{tested}, so each p-value is adjusted for all of them (Holm). Significant after that: {significant}."
    return f"{tested}, and their intervals are not adjusted for that. Intervals that exclude 0: {significant}."


def number(value: float | None, *, sign: bool = False) -> str:
    """A number with three decimals, or with one if it is 100 or more. None becomes a dash."""
    if value is None:
        return "–"
    decimals = 3 if abs(value) < 100 else 1
    rounded = round(value, decimals) or 0.0  # never -0.000
    return f"{rounded:+.{decimals}f}" if sign and rounded else f"{rounded:.{decimals}f}"


def score(mean: float, stderr: float | None) -> str:
    return number(mean) + ("" if stderr is None else f" ± {number(stderr)}")


def p_value(value: float | None) -> str:
    """A p-value as papers print it: 0.17, 0.032, < 0.001. None becomes a dash."""
    if value is None:
        return "–"
    if value < _SMALLEST_P:
        return f"< {_SMALLEST_P}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def verdict_class(difference: Difference) -> str:
    """The verdict as one word, for style sheets and colours: better, worse or unclear."""
    return {UNCLEAR: "unclear", BETTER: "better"}.get(difference.verdict, "worse")
