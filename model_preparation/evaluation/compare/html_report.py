"""A comparison as one HTML file that needs nothing else.

In: a comparison. Out: a page with the verdicts, tables that sort by a click on their headers, the plots (inline SVG),
the questions on which the models differ most, and how all of it was computed. What comes from files is escaped by
jinja2, and the page's own policy forbids every request and every script but its own.
"""

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from model_preparation.evaluation.compare import plots, words
from model_preparation.evaluation.compare.compare import Comparison
from model_preparation.evaluation.compare.examples import differing_questions
from model_preparation.evaluation.compare.layout import GROUP, OVERALL, SUBJECT
from model_preparation.evaluation.compare.settings import SETTINGS

TEMPLATE, SCRIPT, STYLE = "report.html", "report.js", "report.css"


def html_report(comparison: Comparison, *, title: str, questions: int) -> str:
    """The page.

    Args:
        comparison: what it shows.
        title: its heading.
        questions: how many questions to show that each model scores higher than the baseline, and lower.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {name: getattr(words, name) for name in ("number", "score", "p_value", "verdict_class")}
    files = resources.files(__package__)
    template, script, style = (files.joinpath(name).read_text(encoding="utf-8") for name in (TEMPLATE, SCRIPT, STYLE))
    return environment.from_string(template).render(
        title=title,
        comparison=comparison,
        tables=_tables(comparison),
        verdicts=_verdicts(comparison),
        tests=[sentence for kind in (OVERALL, GROUP, SUBJECT) if (sentence := words.tests_sentence(comparison, kind))],
        plots=[Markup(plots.svg(plot, comparison, name)) for name, plot in plots.PLOTS.items()],
        model_lines=[words.model_line(model) for model in comparison.models],
        examples=_examples(comparison, questions),
        settings=list(SETTINGS),
        script=Markup(script),
        style=Markup(style),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _verdicts(comparison: Comparison) -> list[dict[str, str]]:
    overall = comparison.of_kind(OVERALL)[0]
    return [
        {"class": words.verdict_class(difference), "text": words.verdict_sentence(comparison, overall, model)}
        for model, difference in enumerate(overall.differences, start=1)
    ]


def _tables(comparison: Comparison) -> list[dict[str, Any]]:
    """Heading, id and rows of the tables."""
    tables = [("Groups", "groups", (OVERALL, GROUP)), ("Subjects", "subjects", (SUBJECT,))]
    found = [{"heading": heading, "id": name, "rows": comparison.of_kind(*kinds)} for heading, name, kinds in tables]
    return [table for table in found if table["rows"]]


def _examples(comparison: Comparison, count: int) -> list[dict[str, Any]]:
    """For each model but the baseline and each direction, a heading and its questions."""
    labels = {row.name: row.label for row in comparison.rows}
    names = [model.name for model in comparison.models]
    found = []
    for model in range(1, len(names)):
        higher, lower = differing_questions(comparison, model, count)
        what = ("answers right and {} wrong" if comparison.binary else "scores higher than {}").format
        for better, other, examples in ((names[model], names[0], higher), (names[0], names[model], lower)):
            if examples:
                heading = f"{better} {what(other)}"
                found.append({"heading": heading, "model": names[model], "questions": examples, "labels": labels})
    return found
