"""The lines of a comparison and what they and the models are called.

In: the evaluations and their common tasks. Out: the rows (everything together, lm-eval's groups, then the tasks, which
are called subjects here) with the tasks each is made of; short names for people.
"""

from collections.abc import Sequence
from typing import NamedTuple

from model_preparation.evaluation.compare.locate import EvaluationFiles

OVERALL, GROUP, SUBJECT = "overall", "group", "subject"


def short_names(evaluations: Sequence[EvaluationFiles]) -> list[str]:
    """The ends of the folders' paths, as many parts of each as it takes to tell them apart."""
    places = [evaluation.place for evaluation in evaluations]
    if len(set(places)) < len(places):  # evaluations of the same checkpoint
        places = [evaluation.given for evaluation in evaluations]
    if len(set(places)) < len(places):
        places = [evaluation.results_path for evaluation in evaluations]
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


class Line(NamedTuple):
    """A row to be filled: its kind, lm-eval's name, a label, the label of the group it belongs to, and its tasks."""

    kind: str
    name: str
    label: str
    group: str
    tasks: list[str]


def layout(evaluations: Sequence[EvaluationFiles], tasks: Sequence[str], task: str | None) -> list[Line]:
    """The rows for `tasks`, those common to all: everything together, groups, subjects.

    A group of which not all tasks are common says "(part)"; with `task`, groups that reach beyond it are left out.
    """
    if len(tasks) == 1:
        return [Line(OVERALL, tasks[0], _label(evaluations, tasks[0]), "", list(tasks))]
    only = {name for each in evaluations for name in each.tasks_of(task or "")}
    members: dict[str, list[str]] = {}
    for evaluation in evaluations:
        for group in evaluation.groups:
            inside = evaluation.tasks_of(group)
            if not only or only.issuperset(inside):
                members[group] = list(dict.fromkeys(members.get(group, []) + inside))
    common = {group: [name for name in tasks if name in inside] for group, inside in members.items()}
    labels = {
        group: _label(evaluations, group) + (" (part)" if len(common[group]) < len(inside) else "")
        for group, inside in members.items()
    }
    # Of several groups that have the same tasks in common, the one that has no others says best what they are.
    order = sorted(members, key=lambda group: len(members[group]))
    whole = next((group for group in order if len(common[group]) == len(tasks)), None)
    groups = [group for group in members if 0 < len(common[group]) < len(tasks)]
    lines = [Line(OVERALL, whole or "", labels[whole] if whole else "all questions", "", list(tasks))]
    lines += [Line(GROUP, group, labels[group], "", common[group]) for group in groups]
    for name in tasks:
        innermost = next((labels[group] for group in order if group in groups and name in common[group]), "")
        lines.append(Line(SUBJECT, name, _label(evaluations, name), innermost, [name]))
    return lines


def _label(evaluations: Sequence[EvaluationFiles], name: str) -> str:
    """lm-eval's alias, in which its tables may have put the depth (" - stem")."""
    for evaluation in evaluations:
        given = evaluation.results["configs"].get(name, {}).get("task_alias")
        alias = given or evaluation.results["results"].get(name, {}).get("alias")
        if isinstance(alias, str) and alias.strip(" -") and alias.isprintable():
            return alias.strip(" -").replace("_", " ")
    return name
