"""The report in a browser: it sorts, it draws, it asks the network for nothing, and it runs no text as code."""

import re

import pytest
from PIL import Image

from model_preparation.evaluation.compare.compare import compare_evaluations
from model_preparation.evaluation.compare.report import write_report
from tests.browser import WIDTHS, look_at, needs_chromium
from tests.evaluation.compare.stock import change_samples, evaluate, write_tasks

HOSTILE = "<img src=x onerror=alert(1)>$x$ 模型"

# Clicks headers, and notes the order of the rows after each click, the requests made, and what is drawn.
DRIVER = """
const order = (id) => [...document.querySelectorAll(`#${id} tbody tr`)]
  .map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
const click = (id, name) => [...document.querySelectorAll(`#${id} th button`)]
  .find((button) => button.textContent === name).click();
const seen = {start: order("subjects")};
for (const name of ["questions", "difference", "subject"]) {
  click("subjects", name); seen[name] = order("subjects");
  click("subjects", name); seen[name + " again"] = order("subjects");
}
click("groups", "group"); seen.groups = order("groups");
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
seen.images = document.images.length;
seen.drawn = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height);
seen.ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
seen.open = document.querySelectorAll("details[open]").length;
window.seen = seen;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on a baseline and a model with a hostile name. The questions of both are hostile."""
    folder = tmp_path_factory.mktemp("report")
    tasks = write_tasks(folder / "tasks")
    evaluate(tasks, folder / "one", seed=1)
    evaluate(tasks, folder / HOSTILE, seed=2)
    for name in ("one", HOSTILE):
        change_samples(folder / name, lambda sample: sample["doc"].update(question="</pre><script>alert(2)</script>"))
    comparison = compare_evaluations([folder / "one", folder / HOSTILE], resamples=200)
    write_report(comparison, folder / "out", questions=3, as_json=False, overwrite=False)
    return comparison, folder / "out" / "comparison.html"


def test_names_and_questions_are_text_and_nothing_comes_from_elsewhere(page):
    text = page[1].read_text(encoding="utf-8")
    assert "<img" not in text
    assert text.count("<script>") == 1
    assert "&lt;/pre&gt;&lt;script&gt;alert(2)" in text
    assert "&lt;img src=x onerror=alert(1)&gt;$x$ 模型" in text
    links = set(re.findall(r"\b(?:src|href|action|data)=\"([^\"#][^\"]*)", text)) | set(re.findall(r"url\([^#)]", text))
    assert links == {"data:,"}  # the icon that stops browsers from asking for one
    assert len(text) < 500_000


@needs_chromium
def test_in_a_browser_the_tables_sort_and_the_plots_are_drawn(page, tmp_path):
    comparison, path = page
    seen = look_at(path, tmp_path, DRIVER)

    # A row per subject and model: the subject comes first, then its group, questions, model, score and difference.
    rows = comparison.of_kind("subject")
    start = [(row.label, model.name) for row in rows for model in comparison.models]
    assert [(row[0], row[3]) for row in seen["start"]] == start
    by_size = ["plants", "poems", "animals", "grammar"]
    twice = [label for label in by_size for _ in comparison.models]
    assert [[row[0] for row in seen[order]] for order in ("questions", "questions again")] == [twice, twice[::-1]]
    differences = [(row.differences[0].difference, row.label) for row in rows]
    assert len(set(differences)) > 2
    for order, sign in (("difference", -1), ("difference again", 1)):
        wanted = [difference for difference, _ in sorted(differences, key=lambda each: sign * each[0])]
        value = {label: difference for difference, label in differences}
        assert [value[row[0]] for row in seen[order] if row[5]] == wanted
        assert [row[3] for row in seen[order]] == [HOSTILE] * 4 + ["one"] * 4  # the baseline has none, so it is last
    assert [row[0] for row in seen["subject"]] == sorted(twice)
    assert [row[0] for row in seen["subject again"]] == sorted(twice, reverse=True)
    assert [row[0] for row in seen["groups"]] == ["letters", "letters", "nature", "nature"]
    assert seen["requests"] == []
    assert seen["images"] == 0
    assert len(seen["drawn"]) == 2
    assert min(seen["drawn"]) > 100
    assert len(seen["ids"]) == len(set(seen["ids"]))
    assert seen["widths"] == list(WIDTHS)  # only tables and plots scroll sideways, each by itself
    assert seen["open"] == 0

    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 22)}
    assert {(0x3B, 0x82, 0xC4), (0xE0, 0x8A, 0x1E)} <= colours  # the two models' points
