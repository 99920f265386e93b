"""The method `ratio`: which layers matter for recall more than for a second task."""

from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.layer_sets import SearchSpace, normal
from model_preparation.search.settings import SearchSettings

# Because of noise, every loss in the second task counts as at least this share of the largest loss.
_LEAST_SHARE = 0.1


def ratio(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Order layers by a ratio: what recall loses without the layer, divided by what the second task loses without it.

    The ratio is HALO's (arXiv 2601.22156). R and C are the scores in recall and in the second task without layer i, and
    the maxima are over all layers: importance of layer i = (max R - R) / (max C - C + epsilon).
    HALO scores each model without one layer once per task. Here it is scored once, with the questions of both tasks.
    HALO's code has an epsilon of 1e-10 and limits the ratio to 50. So if the second task loses nothing
    without a layer, that layer always wins. Here the divisor is at least `_LEAST_SHARE` of the largest
    divisor.
    """
    without = {layer: normal({*space.free} - {layer}) for layer in space.free}
    found = scores.evaluate(list(without.values()))
    values = {layer: scores.values(each) for layer, each in without.items() if each in found}
    second = scores.objective.second
    assert second is not None  # checks.py refuses a ratio without a second task
    recall, common = ({layer: float(each[of].mean()) for layer, each in values.items()} for of in (~second, second))
    most = max(common.values(), default=0.0)
    floor = max((most - min(common.values(), default=0.0)) * _LEAST_SHARE, 1e-9)

    def importance(layer: int) -> float:
        return (max(recall.values()) - recall[layer]) / max(most - common[layer], floor)

    order = sorted(values, key=lambda layer: (-importance(layer), layer))
    scores.evaluate([normal(order[:size]) for size in range(space.least, min(space.most, len(order)) + 1)])
