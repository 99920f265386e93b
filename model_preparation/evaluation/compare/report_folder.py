"""The folder a comparison is written to.

In: a comparison. Out: comparison.html, accuracy_by_subject.png, gain_by_subject.png, on request comparison.json. The
folder appears whole or not at all.
"""

import json
from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare import plots
from model_preparation.evaluation.compare.compare import Comparison
from model_preparation.evaluation.compare.html_report import html_report
from model_preparation.io.complete_folder import check_target, new_folder

PAGE, NUMBERS = "comparison.html", "comparison.json"
_OURS = {PAGE, NUMBERS, *(f"{name}.png" for name in plots.PLOTS)}


def check_report_folder(target: Path, *, overwrite: bool) -> None:
    """Raise SurgeryError if `target` cannot be written, holds a report (without `overwrite`) or anything else."""
    check_target(target, overwrite=overwrite, marker_file=PAGE)
    if overwrite and target.is_dir() and (others := sorted({path.name for path in target.iterdir()} - _OURS)):
        raise SurgeryError(
            f"{target} holds files that are not of a report ({others[0]}), and would be replaced as a whole. "
            "Choose another folder."
        )


def write_report(comparison: Comparison, target: Path, *, questions: int, as_json: bool, overwrite: bool) -> None:
    """Write the folder.

    Args:
        comparison: what to write.
        target: the folder.
        questions: as in `html_report`.
        as_json: whether to write comparison.json too.
        overwrite: whether a report that is there is replaced.

    Raises:
        SurgeryError: as from `check_report_folder`.
        OSError: from the file system.
    """
    check_report_folder(target, overwrite=overwrite)
    names = [model.name for model in comparison.models]
    with new_folder(target, overwrite=overwrite, marker_file=PAGE) as folder:
        page = html_report(comparison, title=f"{', '.join(names[1:])} against {names[0]}", questions=questions)
        (folder / PAGE).write_text(page, encoding="utf-8")
        for name, plot in plots.PLOTS.items():
            plots.save_png(plot, comparison, folder / f"{name}.png")
        if as_json:
            text = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
            (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")
