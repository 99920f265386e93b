"""A search to look at: report.html, which needs nothing else, and its plots as PNG.

In: a search's result. Out: the files, each there whole or not at all. What comes from files is escaped by jinja2, and
the page's own policy forbids every request and every script but its own.
"""

import base64
import hashlib
import io
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from model_preparation.evaluation.compare import html_report, words
from model_preparation.evaluation.compare import plots as drawing
from model_preparation.io.complete_file import write_file
from model_preparation.search.evaluations import Evaluations
from model_preparation.search.plots import TITLES
from model_preparation.search.result import COMPARED

PAGE = "report.html"


def write_report(found: dict[str, Any], evaluations: Evaluations, folder: Path) -> None:
    """Write report.html and the plots into `folder`.

    Args:
        found: what search_result.json has.
        evaluations: for the order in which combinations were evaluated.
        folder: where to.

    Raises:
        OSError: from the file system.
    """
    shown = {**found, "history": [(layers, evaluations.estimate(layers)) for layers in evaluations.order]}
    plots = []
    for name, (title, plot) in TITLES.items():
        picture = io.BytesIO()
        drawing.save_png(plot, shown, picture)
        write_file(folder / f"{name}.png", picture.getvalue())
        plots.append((title, Markup(drawing.svg(plot, shown, name))))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {name: getattr(words, name) for name in ("number", "score", "p_value")}
    ours = resources.files(__package__)
    shared = resources.files(html_report.__package__)
    script, style = (
        shared.joinpath(name).read_text(encoding="utf-8") for name in (html_report.SCRIPT, html_report.STYLE)
    )
    page = environment.from_string(ours.joinpath(PAGE).read_text(encoding="utf-8")).render(
        title=f"Layers of {Path(found['base']).name}: {found['search']['method']} search",
        found=shown,
        compared=COMPARED,
        plots=plots,
        script=Markup(script),
        style=Markup(style),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_file(folder / PAGE, page)
