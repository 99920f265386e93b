"""The last step of a search: from the best combination to a better one that is one layer away, until there is none.

In: what was evaluated. Out: more of it.
"""

from model_preparation.search.evaluations import Evaluations
from model_preparation.search.space import Space


def refine(space: Space, evaluations: Evaluations) -> None:
    """Add, drop or swap a layer of the best combination, as long as that makes it better."""
    while candidates := [layers for layers in evaluations.complete if layers in space]:
        best = candidates[0]
        found = evaluations.evaluate([best, *space.by_promise(space.neighbours(best), evaluations)], 1)
        if evaluations.estimate(found[0]) <= evaluations.estimate(best):
            return
