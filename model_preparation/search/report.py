"""A search to look at: report.html, which needs nothing else, and its plots as PNG.

In: a search's result. Out: the files, each there whole or not at all. What comes from files is escaped by jinja2, and
the page's own policy forbids every request and every script but its own.
"""

import io
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from model_preparation.evaluation.compare import plots as drawing
from model_preparation.evaluation.compare.report import render_page
from model_preparation.io.new_file import write_file
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
    page = render_page(
        resources.files(__package__).joinpath(PAGE).read_text(encoding="utf-8"),
        title=f"Layers of {Path(found['base']).name}: {found['search']['method']} search",
        found=shown,
        compared=COMPARED,
        plots=plots,
    )
    write_file(folder / PAGE, page)
