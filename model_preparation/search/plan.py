"""What a search is going to do, in lines to print: what will be run, what it costs and what it saves.

In: a `Setup`, a `Search` and its `Space`. Out: the lines.
"""

from rich.filesize import decimal

from model_preparation.search.cached_scoring import boundary_bytes, count_tokens
from model_preparation.search.costs import Bounds, bounds
from model_preparation.search.methods import Search
from model_preparation.search.setup import Setup
from model_preparation.search.space import Space


def describe(setup: Setup, search: Search, space: Space) -> list[str]:
    """The plan."""
    spec, questions, donor = setup.spec, setup.questions, setup.planned.donor
    tokens = count_tokens(questions)
    size = boundary_bytes(setup.pair, questions)
    in_file = max(0, size - spec.memory_bytes)
    return [
        f"base        {setup.planned.base.folder}",
        f"donor       {donor.metadata['source']['id']} (layers in {donor.folder})",
        f"questions   {len(questions.questions):,} of {', '.join(spec.tasks)}, {tokens:,} tokens with padding",
        f"memory      {decimal(size)} for the base's hidden states before each of {space.total} layers"
        + (f", of which up to {decimal(in_file)} in a file in {spec.folder}" if in_file else "")
        + f"; at most {search.most + 1} more states of {decimal(size // space.total)}",
        f"method      {search.method}, {search.least} to {search.most} of {space.total} layers"
        + (", candidates race" if search.races else "")
        + f"; maximises {spec.objective}",
        *describe_cost(bounds(space, search), search, space.total),
    ]


def describe_cost(found: Bounds, search: Search, total: int) -> list[str]:
    """The lines on evaluations and layer passes."""
    evaluations, passes, step = found.search.evaluations, found.search.passes, found.step
    alone = evaluations * total
    is_whole = search.method in ("singles", "exhaustive") and evaluations == found.everything.evaluations
    most = "" if is_whole and not search.races else "at most "
    later = f", then at most {step.evaluations:,} in each step of refinement" if step else ""
    count = f"{found.everything.evaluations:,}"
    told = f", of which {most}{evaluations:,} {'is' if evaluations == 1 else 'are'} evaluated"
    if found.before:
        told = f"; {most}{evaluations:,} evaluations, smaller sets on the way included"
    lines = [
        f"candidates  {count}{told}{later}",
        f"cost        {most}{passes:,} layer passes"
        + (f", and {step.passes:,} in each step of refinement" if step else "")
        + f"; alone, {evaluations:,} combination{'s' * (evaluations != 1)} would take {alone:,}: "
        + f"{'at least ' if most else ''}{max(0.0, 1 - passes / alone):.0%} saved"
        + (", and more by races" if search.races else ""),
    ]
    if not is_whole and passes + (step.passes if step else 0) >= found.everything.passes:
        together, left = f"all {count} combinations together take", " and leave none out"
        if count == "1":
            together, left = "the only combination takes", ""
        lines.append(
            f"advice      {together} {found.everything.passes:,} layer passes{left}: "
            "use --method exhaustive, or a --budget_evaluations"
        )
    return lines
