"""The lines of a comparison and what they and the models are called.

In: the evaluations and their common tasks. Out: the rows (everything together, lm-eval's groups, then the tasks, which
are called subjects here) with the tasks each is made of; short names for people.
"""

from collections.abc import Sequence

from model_preparation.comparison.locate import EvaluationFiles

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


def layout(
    evaluations: Sequence[EvaluationFiles], tasks: Sequence[str], task: str | None
) -> list[tuple[str, str, str, str, list[str]]]:
    """Kind, name, label, group's label and tasks of every row."""
    first = evaluations[0]
    only = set(first.tasks_of(task)) if task else set()
    members: dict[str, list[str]] = {}
    for evaluation in evaluations:
        for group in evaluation.groups:
            inside = evaluation.tasks_of(group)
            if not only or only.issuperset(inside):  # half of a group must not be shown under its name
                members.setdefault(group, [name for name in inside if name in tasks])
    groups = [group for group in members if members[group]]
    labels = {name: _label(evaluations, name) for name in [*groups, *tasks]}
    everything = next((group for group in groups if set(members[group]) == set(tasks)), None)
    rows = [(OVERALL, everything or "", labels[everything] if everything else "all questions", "", list(tasks))]
    if len(tasks) == 1:
        return [(OVERALL, tasks[0], labels[tasks[0]], "", list(tasks))]
    rows += [(GROUP, group, labels[group], "", members[group]) for group in groups if group != everything]
    innermost = {name: min(groups, key=lambda group: _size(members[group], name), default="") for name in tasks}
    for name in tasks:
        group = innermost[name]
        belongs = bool(group) and name in members[group] and group != everything
        rows.append((SUBJECT, name, labels[name], labels[group] if belongs else "", [name]))
    return rows


def _size(members: Sequence[str], name: str) -> float:
    return len(members) if name in members else float("inf")


def _label(evaluations: Sequence[EvaluationFiles], name: str) -> str:
    """lm-eval's alias, in which its tables may have put the depth (" - stem")."""
    for evaluation in evaluations:
        given = evaluation.results["configs"].get(name, {}).get("task_alias")
        alias = given or evaluation.results["results"].get(name, {}).get("alias")
        if isinstance(alias, str) and alias.strip(" -"):
            return alias.strip(" -").replace("_", " ")
    return name
